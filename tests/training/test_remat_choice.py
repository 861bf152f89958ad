"""`remat="auto"`: the least recomputation that fits is chosen, recorded and read again."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.models.language import LanguageModel
from alignvlm_jax.models.rematerialization import CANDIDATES, Candidate
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import remat_choice
from alignvlm_jax.training.remat_choice import choose_remat
from tests.training.batches import MODEL, stage

# The kernel "xla" keeps no statistics of its softmax besides the values that `remat` names.
DECODER = dataclasses.replace(MODEL.language, remat="auto", num_layers=3, attention="xla")
AUTO = dataclasses.replace(MODEL, language=DECODER)
LAYERS, ROWS, LENGTH, WIDTH = 3, 2, 8, MODEL.language.hidden_size


def make_step(model):
    """Returns a jitted function of parameters and batch in place of a training step: the gradient of the decoder."""
    decoder = LanguageModel(model.language)

    def loss(params, batch):
        hidden, _ = decoder.apply(params, batch["inputs"], positions=batch["positions"], segment_ids=batch["positions"])
        return jnp.sum(hidden**2)

    return jax.jit(jax.grad(loss))


@pytest.fixture(scope="module")
def arguments():
    batch = {
        "inputs": jax.device_put(jnp.ones((ROWS, LENGTH, WIDTH)), jax.devices()[0]),
        "positions": jax.device_put(jnp.ones((ROWS, LENGTH), jnp.int32), jax.devices()[0]),
    }
    decoder = LanguageModel(AUTO.language)
    inputs, positions = batch.values()
    init = jax.jit(lambda: decoder.init(jax.random.key(0), inputs, positions=positions, segment_ids=positions))
    return init(), batch


@pytest.mark.parametrize(
    "limit, chosen, tried, compiled",
    [
        (None, 0, 0, 0),
        (1000, 0, 1, 1),
        (65, 3, 3, 2),  # the lower bound of the first is above the limit; the third is the same as the second
        (42, 5, 5, 2),  # the compiler gives up on the fifth
        (5, 6, 6, 0),
    ],
)
def test_the_first_candidate_that_fits_is_chosen(limit, chosen, tried, compiled):
    needed = dict(zip(CANDIDATES, (100, 80, 80, 60, None, 40, 20), strict=True))
    bounds = dict(zip(CANDIDATES, (90, 50, 50, 45, 35, 30, 10), strict=True))
    calls = []
    choice = choose_remat(bounds.get, lambda remat: calls.append(remat) or needed[remat], limit)
    assert choice.remat == CANDIDATES[chosen] and len(choice.trials) == tried and len(calls) == compiled
    assert [trial.fits for trial in choice.trials[:-1]] == [False] * max(0, tried - 1)


def test_the_lower_bound_counts_what_the_layers_keep(arguments):
    """The difference between two candidates is the size of the values that one of them names."""

    def kept(remat):
        traced = make_step(remat_choice.with_remat(AUTO, Candidate("none", remat))).trace(*arguments)
        return remat_choice.least_bytes(traced, arguments, 1)

    config, positions = AUTO.language, LAYERS * ROWS * LENGTH * 4  # bytes of one float32 per position and layer
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
    assert kept("full") - sum(leaf.nbytes for leaf in jax.tree.leaves(arguments)) == positions * WIDTH
    assert kept("attention_out") - kept("full") == positions * config.num_heads * config.head_width
    assert kept("attention_out,qkv") - kept("attention_out") == positions * heads
    assert kept("attention_out,qkv,mlp_in") - kept("attention_out,qkv") == positions * 2 * config.intermediate_size
    assert kept("none") > kept("attention_out,qkv,mlp_in")


def test_a_choice_is_recorded_and_read_again(arguments, tmp_path, monkeypatch, capsys):
    mesh, stages = make_mesh(MeshConfig(data=8)), [stage(name="captions"), stage(name="tasks", trainable=("language",))]
    needed, models = iter([900, None, 300]), []  # what the first three candidates need
    monkeypatch.setattr(remat_choice, "usable_bytes", lambda devices: 500)
    bounds = itertools.count()
    monkeypatch.setattr(remat_choice, "least_bytes", lambda *_: next(bounds))
    monkeypatch.setattr(remat_choice, "_try_to_compile", lambda lowered: next(needed))

    def make(model):
        models.append((model.vision.remat, model.language.remat))
        return jax.jit(lambda params, batch: batch["inputs"])

    def choose(stage_config):
        models.clear()
        remat_choice.choose_step(AUTO, stage_config, mesh, make, arguments, tmp_path)
        return models

    # The encoder keeps its own setting.
    assert choose(stages[0]) == [("none", candidate.language) for candidate in CANDIDATES[:3]]
    record = json.loads((tmp_path / "remat.json").read_text())["captions"]
    assert (record["vision"], record["language"]) == CANDIDATES[2] and record["limit"] == 500
    assert [trial["num_bytes"] for trial in record["trials"]] == [900, None, 300]
    assert f"{CANDIDATES[2]}, which needs 0.00 MB of 0.00 MB; recorded in" in capsys.readouterr().out
    # The record is read: nothing is compiled (the iterator is exhausted).
    assert choose(stages[0]) == [("none", CANDIDATES[2].language)]
    # Another stage, and another limit, are chosen anew, and records of other stages stay.
    monkeypatch.setattr(remat_choice, "_try_to_compile", lambda lowered: 400)
    assert choose(stages[1]) == [("none", "none")]
    monkeypatch.setattr(remat_choice, "usable_bytes", lambda devices: 450)
    assert choose(stages[0]) == [("none", "none")]
    assert set(json.loads((tmp_path / "remat.json").read_text())) == {"captions", "tasks"}
    # A damaged record is replaced.
    (tmp_path / "remat.json").write_text("{")
    assert choose(stages[0]) == [("none", "none")]
    assert set(json.loads((tmp_path / "remat.json").read_text())) == {"captions"}


def test_the_limit_is_that_of_the_device_with_the_least_memory():
    class Device:
        platform = "gpu"

        def __init__(self, limit):
            self._limit = limit

        def memory_stats(self):
            return self._limit and {"bytes_limit": self._limit}

    assert remat_choice.usable_bytes([Device(1000), Device(500)]) == 490
    assert remat_choice.usable_bytes([Device(None)]) is None
    # CPU devices share half of the machine's memory.
    one, eight = remat_choice.usable_bytes(jax.devices()[:1]), remat_choice.usable_bytes(jax.devices())
    assert one // 8 == eight > 0
