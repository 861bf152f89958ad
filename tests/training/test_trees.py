"""Training with the questions of a page as branches of a tree: the same loss as alone, and exact resumption."""

import contextlib
import dataclasses
import io
import itertools
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data import store
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.synthetic.corpus import FEATURES
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.models.alignvlm import AlignVLM, parameter_shapes
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import loop
from alignvlm_jax.training.experiment_data import ExperimentData
from alignvlm_jax.training.trainer import _count_answers
from tests.data.nano_tokenizer import write_chat_folder
from tests.data.pages import pages
from tests.parallel.tiny import MODEL
from tests.training.batches import stage
from tests.training.recording import RecordingData

NUM_PAGES = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentConfig:
    """One epoch over pages with up to three questions each. The data set "alone" has a page for each question."""
    root = tmp_path_factory.mktemp("data")
    together, alone = pages(NUM_PAGES), []
    for page in together:
        for question, answer in zip(page["questions"], page["answers"], strict=True):
            alone.append(page | {"questions": [question], "answers": [answer]})
    for name, records in (("together", together), ("alone", alone)):
        records = [record | {"image": io.BytesIO(record["image"])} for record in records]
        store.write_dataset(root / name, FEATURES, {"train": records})
    packing = PackingConfig(
        tokens_per_bin=160,
        tiles_per_bin=8,
        bins_per_microbatch=4,
        examples_per_bin=8,
        branch_tokens_per_bin=96,
        window=6,
    )
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=352)),
        tokenizer=str(write_chat_folder(root / "tokenizer")),
        data=DataConfig(str(root), TilingConfig(tile_size=16, max_tiles=3), packing, group_questions="tree"),
        mesh=MeshConfig(data=1),
        stages=(
            stage(
                mixture=(MixturePart("together", task="qa"),), steps=None, epochs=1.0, global_batch=8, warmup_steps=0
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )


@pytest.fixture(scope="module")
def params(config):
    rng = np.random.default_rng(0)
    shapes = nn.unbox(parameter_shapes(config.model))
    return jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes)


def all_bins(config, dataset, grouping):
    """Returns the bins of one epoch as one batch, [B, ...]."""
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, group_questions=grouping),
        stages=(dataclasses.replace(config.stages[0], mixture=(MixturePart(dataset, task="qa"),)),),
    )
    data, first = ExperimentData(config), config.stages[0]
    plan = data.plan(0, first)
    feed = data.batches(0, first, plan, None, range(4))
    assert isinstance(feed, Feed)
    try:
        batches = list(itertools.islice(feed, plan.steps))
    finally:
        feed.close()
    return {
        name: np.concatenate([batch[name] for batch in batches]).reshape(-1, *field.shape[2:])
        for name, field in batches[0].items()
    }


def test_a_tree_has_the_loss_and_gradients_of_its_questions_alone(config, params):
    results = []
    for dataset, grouping, branch_tokens in (("alone", "off", None), ("together", "tree", config.data.branch_tokens)):
        batch = all_bins(config, dataset, grouping)
        assert ("branch_ids" in batch) == (grouping == "tree")

        @jax.jit
        def loss(params, batch, branch_tokens=branch_tokens):
            output = AlignVLM(config.model).apply({"params": params}, batch, branch_tokens, method="loss")
            return output.loss, output.weight

        arrays = {name: jnp.asarray(field) for name, field in batch.items()}
        results.append((*jax.value_and_grad(loss, has_aux=True)(params, arrays), batch))
    ((alone, weight), gradients, single), ((together, tree_weight), tree_gradients, tree) = results
    assert single["num_examples"].sum() == tree["num_examples"].sum() > NUM_PAGES
    assert np.count_nonzero(tree["tile_valid_hw"][..., 0]) < np.count_nonzero(single["tile_valid_hw"][..., 0])
    assert _count_answers(tree["loss_weights"][None]) == tree["num_examples"].sum()
    assert weight == tree_weight
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), tree_gradients, gradients)


def test_a_stopped_and_resumed_run_trains_on_the_same_trees(config, params, tmp_path, capsys, monkeypatch):
    # One device: tests of the ops and of the data have several.
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))

    def train(config, workdir, **options):
        RecordingData.recorded = []
        with contextlib.suppress(KeyboardInterrupt):
            result = loop.train(config, workdir, open_data=RecordingData, make_params=lambda _: params, **options)
            return result, RecordingData.recorded
        return None, RecordingData.recorded

    result, expected = train(config, tmp_path / "uninterrupted")
    assert result.progress.step == len(expected) >= 2
    assert "as branches of a tree (at most 96 tokens a bin)" in capsys.readouterr().out

    def interrupt(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    _, batches = train(config, tmp_path / "run", on_step=interrupt)
    # The config of the second session groups nothing, but the run keeps its trees.
    off = dataclasses.replace(config, data=dataclasses.replace(config.data, group_questions="off"))
    resumed, rest = train(off, tmp_path / "run")
    assert batches + rest == expected
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(result.params))


def test_answers_are_counted_by_their_targets():
    rows = [
        [0, 0, 1, 1, 0, 0, 1, 1, 1, 0],  # two answers
        [1, 0, 0, 0, 1, 0, 0, 0, 0, 1],  # one answer at each end, and one of a single target
        [0] * 10,
    ]
    assert _count_answers(np.array([rows], np.float32)) == 5
