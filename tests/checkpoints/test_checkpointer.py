"""Checkpoints outside the training loop: written completely or not at all, read in slices, and started from."""

import dataclasses
import errno

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alignvlm_jax.checkpoints import arrays, weights
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import AlignVLMConfig, random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.sharding import parameter_shardings
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from tests.training.batches import MODEL, stage

# The tokenizer of the nano backbone has 512 entries.
MODEL = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=512))
CONFIG = ExperimentConfig(
    model=MODEL,
    data=DataConfig(tiling=TilingConfig(tile_size=16)),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    stages=(stage(name="only", steps=4),),
)
HISTORY = [{"what": "imported", "language": "a folder"}]


@pytest.fixture(scope="module")
def chat(request):
    folder = request.config.rootpath / "alignvlm_jax" / "backbones" / "nano" / "language"
    return ChatTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def params():
    """Random weights, sharded over eight devices."""
    mesh = make_mesh(CONFIG.mesh)
    boxed = jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))()
    return jax.device_put(nn.unbox(boxed), parameter_shardings(boxed, mesh))


@pytest.fixture(scope="module")
def written(params, chat, tmp_path_factory):
    # The name has a space, which a path that is treated as a URL would not survive.
    workdir = tmp_path_factory.mktemp("written") / "a checkpoint"
    weights.write_checkpoint(workdir, CONFIG, params, chat, history=HISTORY)
    return workdir


def test_a_reader_returns_every_weight_and_slices_of_it(written, params):
    reader = weights.ParameterReader(written)
    expected = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    assert reader.shapes == {path: leaf.shape for path, leaf in expected.items()}
    assert set(map(str, reader.dtypes.values())) == {"float32"}
    for path, leaf in expected.items():
        np.testing.assert_array_equal(reader.read(path), leaf)
    path = "language/layers/mlp/gate/kernel"
    np.testing.assert_array_equal(reader.read(path, (1, slice(2, 7))), expected[path][1, 2:7])
    assert (reader.config, reader.step, reader.history) == (CONFIG, 0, HISTORY)
    assert reader.meta["progress"]["step"] == 0


def test_bfloat16_weights_stay_bfloat16_and_can_be_restored_as_float32(params, chat, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    weights.write_checkpoint(tmp_path / "half", CONFIG, half, chat, history=[])
    assert set(map(str, weights.ParameterReader(tmp_path / "half").dtypes.values())) == {"bfloat16"}
    for dtype in ("float32", "bfloat16"):
        restored = weights.restore_params(tmp_path / "half", dtype=dtype)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} == {dtype}
        # bfloat16 values are exact in float32, so neither dtype loses anything.
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), half, restored)


def test_a_stack_of_layers_is_stored_layer_by_layer(params, chat, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 4096)  # smaller than the largest weights of the tiny model
    weights.write_checkpoint(tmp_path / "small", CONFIG, params, chat, history=[])
    reader = weights.ParameterReader(tmp_path / "small")
    assert reader.shapes["language/layers/mlp/gate/kernel"][0] > 1
    assert reader.chunk_shape("language/layers/mlp/gate/kernel")[0] == 1
    assert max(4 * np.prod(shape) for shape in reader.shapes.values()) > 4096
    assert max(4 * np.prod(reader.chunk_shape(path)) for path in reader.shapes) <= 4096


def test_a_run_starts_from_a_checkpoint_with_its_weights_tokenizer_and_history(written, params, chat):
    config = dataclasses.replace(CONFIG, init_from=str(written))
    started = initial_parameters(config)
    jax.tree.map(np.testing.assert_array_equal, started, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, started, params)))
    assert load_tokenizer(config).vocab_size == chat.vocab_size
    assert weights.history_of_run(written) == HISTORY  # Nothing was trained in this run, so no entry is added.
    other = dataclasses.replace(config, model=AlignVLMConfig(MODEL.vision, MLPConfig(), MODEL.language))
    with pytest.raises(UserError, match=r"config\.model\.connector is MLPConfig.*has AlignConfig"):
        initial_parameters(other)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(written, params, chat, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        weights.write_checkpoint(written, CONFIG, params, chat, history=[])

    def fail_with_full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpointer, "save_params", fail_with_full_disk)
    with pytest.raises(UserError, match="No space left"):
        weights.write_checkpoint(tmp_path / "out", CONFIG, params, chat, history=[])
    assert not list(tmp_path.iterdir())
