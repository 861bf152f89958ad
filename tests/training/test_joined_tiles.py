"""Training on joined tiles (anyres_max_9): packing does not change the loss, and the newline weight is trained."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints import weights
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.examples import Part
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.packing import PackingConfig, empty_batch, write_bin
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters, token_grid
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training import loop
from tests.data.nano_tokenizer import write_chat_folder
from tests.data.pages import mixed_records, reader
from tests.training.batches import MODEL, stage

TILING = TilingConfig("anyres_max_9", tile_size=16, max_tiles=2, grid_side=3)
PACKING = PackingConfig(tokens_per_bin=256, tiles_per_bin=40, bins_per_microbatch=8, examples_per_bin=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatTokenizer.from_folder(write_chat_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def config(tokenizer):
    """An experiment of three steps on joined tiles, with a newline weight."""
    language = dataclasses.replace(MODEL.language, vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, language=language, newline=True),
        data=DataConfig(tiling=TILING, packing=PACKING),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        stages=(stage(name="joined", steps=3),),
        checkpoint=CheckpointConfig(every_steps=3),
    )


@pytest.fixture(scope="module")
def examples(config, tokenizer):
    parts = [Part("mixed/train", mixed_records(24), "conversation")]
    return reader(parts, tokenizer, tiling=TILING, packing=PACKING, token_grid=token_grid(config.model))


def _params(config):
    return nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(0)))())


def test_packing_does_not_change_the_loss(config, examples, tokenizer):
    """Eight examples, with pages of several sizes and without a page, are packed into two bins and into eight."""
    selected = [examples.make(*examples.measure(position)) for position in range(8)]
    params, loss = (
        _params(config),
        jax.jit(lambda params, rows: AlignVLM(config.model).apply(params, rows, method="loss")),
    )

    def pack_and_score(groups):
        """Returns loss and weight of a batch with one group of examples in each bin."""
        batch = empty_batch(1, 8, PACKING, tile_size=16, pad_id=tokenizer.pad_id, resampled=True)
        for row, group in enumerate(groups):
            write_bin(batch, (0, row), group, 4)
        output = loss({"params": params}, {name: field[0] for name, field in batch.items()})
        return float(output.loss), float(output.weight)

    two, eight = (
        pack_and_score([selected[:3], selected[3:]]),
        pack_and_score([[example] for example in selected]),
    )
    assert max(len(example.tiles) for example in selected) > 9 and min(len(example.tiles) for example in selected) == 0
    assert two[1] == eight[1] > 0
    np.testing.assert_allclose(two[0], eight[0], rtol=1e-5)


class _MemoryData:
    """Provides records in memory as the data of a run."""

    def __init__(self, examples, tokenizer):
        self._examples, self._tokenizer = examples, tokenizer

    def plan(self, stage_index, stage_config):
        return StagePlan(stage_config.steps, 1, 2.0)

    def batches(self, stage_index, stage_config, plan, state, rows):
        return Feed(self._examples, rows, plan.microbatches, state)

    def page_scale(self):
        return None

    def save_tokenizer(self, folder):
        self._tokenizer.save(folder)


def test_the_loop_trains_the_newline_and_the_model_answers(config, examples, tokenizer, tmp_path):
    before = _params(config)
    loop.train(config, tmp_path, open_data=lambda _: _MemoryData(examples, tokenizer), make_params=lambda *_: before)
    after = weights.restore_params(tmp_path)
    assert after["connector"]["newline"].shape == (16,)
    assert np.abs(after["connector"]["newline"] - _params(config)["connector"]["newline"]).max() > 1e-3
    answer = Reader(config.model, after, tokenizer, TILING).ask(mixed_records(1)[0]["images"][0], "Total 0?")
    assert isinstance(answer, str)
