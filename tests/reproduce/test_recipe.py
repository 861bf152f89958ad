"""Tests that all connectors get the same pages in every step and the same weights outside the connector."""

import pathlib

import jax
import numpy as np
import pytest

from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.models.alignvlm import token_grid
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import CONNECTORS
from alignvlm_jax.reproduce.work import Work
from alignvlm_jax.training.experiment_data import ExperimentData
from alignvlm_jax.training.initial import initial_parameters
from tests.reproduce.tiny import make_options


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def experiment(out):
    """Function that returns the config of a run, given connector, seed and changes."""
    options = make_options(out, connectors=CONNECTORS)

    def make(connector, seed=0, fraction=1.0, **changes):
        work = Work(options, out, Job("accuracy", "patches", connector, seed))
        return work.on_pages(work.experiment(**changes), fraction)

    return make


def test_the_same_pages_in_the_same_steps(experiment):
    order = {}
    for seed in (0, 1):
        for connector in CONNECTORS:
            config = experiment(connector, seed)
            data = ExperimentData(config)
            order[connector, seed] = []
            for index, stage in enumerate(config.stages):
                batches = data.batches(index, stage, StagePlan(stage.steps, 1, 1.0), None, range(8))
                order[connector, seed] += [next(batches)["example_ids"].tolist() for _ in range(stage.steps)]
                batches.close()
    for connector in CONNECTORS:
        assert order[connector, 0] == order["align", 0]
        assert order[connector, 1] == order["align", 1]
    assert order["align", 0] != order["align", 1]
    pages = np.array(order["align", 0])  # [steps, 1, bins, 1]: one page per bin, no bin empty
    assert pages.shape == (4, 1, 8, 1) and pages.min() >= 0


def test_the_same_weights_except_for_the_connector(experiment):
    start = {connector: initial_parameters(experiment(connector)) for connector in CONNECTORS}
    for params in start.values():
        for part in ("vision", "language"):
            jax.tree.map(np.testing.assert_array_equal, params[part], start["align"][part])
    np.testing.assert_array_equal(start["align"]["connector"]["w2"], start["align"]["language"]["embedding"])


def test_all_else_is_equal(experiment):
    configs = {connector: config_to_dict(experiment(connector)) for connector in CONNECTORS}
    for connector, config in configs.items():
        assert config["model"]["connector"].pop("name") == connector
        config["model"].pop("connector")
        tokens = config["data"]["packing"].pop("tokens_per_bin")
        stages = config["stages"]
        rows, columns = token_grid(experiment(connector).model)
        assert tokens == 2 * rows * columns + max(stage["max_text_tokens"] for stage in stages)
        assert config == configs["align"] or connector == "align"


def test_a_factor_changes_the_learning_rates_of_the_connector_only(experiment):
    plain, fast = (experiment("mlp", factor=factor) for factor in (1.0, 4.0))
    for before, after in zip(plain.stages, fast.stages, strict=True):
        assert after.learning_rates.connector == 4 * before.learning_rates.connector
        assert after.learning_rates.language == before.learning_rates.language
        assert (after.steps, after.warmup_steps, after.schedule) == (before.steps, before.warmup_steps, before.schedule)


def test_a_share_of_the_data(experiment):
    splits = {
        fraction: experiment("mlp", fraction=fraction).stages[0].mixture[0].split for fraction in (1 / 16, 1 / 4, 1)
    }
    assert splits == {1 / 16: "train[:2]", 1 / 4: "train[:8]", 1: "train[:32]"}  # 2 stages of 2 steps of 8 pages
