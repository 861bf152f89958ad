"""A connector that only this file defines can be configured, trained, saved, restored, counted and exported.

Axes: B tiles, N features per tile (a square grid of side g), d encoder width, D decoder width, V vocabulary.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from alignvlm_jax.checkpoints.weights import restore_params, write_checkpoint
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config import load_config
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, tables
from alignvlm_jax.interop.assemble import abstract_parameters, assemble
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.interop.tensor_writer import write_parameters
from alignvlm_jax.models import layers
from alignvlm_jax.models.alignvlm import random_parameters, token_grid, tokens_per_tile
from alignvlm_jax.models.connectors import (
    ConnectorConfig,
    ConnectorOutput,
    ConnectorSpec,
    connector_names,
    make_connector,
    register,
    unregister,
)
from alignvlm_jax.models.weight_table import Row, linear_rows
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.train_step import create_state, make_train_step
from tests.interop.exported import nano_tokenizer, tiny_config
from tests.training.batches import random_batch, stage


@dataclasses.dataclass(frozen=True)
class RowMeanConfig(ConnectorConfig):
    """Settings of the connector below.

    Attributes:
      gain: factor of the features.
    """

    gain: float = 1.0


class RowMeanConnector(nn.Module):
    """Averages each row of features into one token, projects it, and adds the mean row of the LM head."""

    config: RowMeanConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features, text_embedding):
        batch, num_features, width = features.shape
        grid = math.isqrt(num_features)
        rows = self.config.gain * jnp.mean(features.reshape(batch, grid, grid, width), axis=2)
        tokens = layers.Dense(self.output_size, ("embed", "mlp"), False, self.dtype, name="project")(rows)
        shift = layers.param(self, "shift", nn.initializers.zeros, (None,), (self.output_size,))
        return ConnectorOutput(tokens + shift)


def check(config, shape):
    if config.gain <= 0:
        raise UserError(f"config.model.connector.gain: expected more than 0, got {config.gain}")


SPEC = ConnectorSpec(
    name="row_mean",
    title="Row mean",
    description="the mean of each row of features, projected",
    config=RowMeanConfig,
    module=RowMeanConnector,
    token_grid=lambda config, shape: (shape.grid_size, 1),
    flops=lambda config, shape, trained: trained.first_product(
        2 * shape.grid_size * shape.source_width * shape.output_width
    ),
    weight_rows=lambda config, shape: (*linear_rows("project", "project", bias=False), Row("shift", "shift")),
    check=check,
    seeded=("shift",),
    seed=lambda config, shape, head: {"shift": jnp.mean(nn.unbox(head), axis=0)},
    removed_settings={"old": False},
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(SPEC)
    yield
    unregister(SPEC.name)


@pytest.fixture(scope="module")
def config(registered):
    """An experiment around the connector, as a config file would describe it."""
    raw = config_to_dict(tiny_config("mlp"))
    raw["model"]["connector"] = {"name": "row_mean", "gain": 2.0}
    for part in ("vision", "language"):
        raw["model"][part]["num_layers"] = 1
    return config_from_dict(raw)


@pytest.fixture(scope="module")
def trained(config):
    """The weights before and after four training steps, and the losses."""
    params = nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(0)))())
    batch = random_batch(0, model=config.model)
    state, losses = create_state(stage(), params), []
    step = jax.jit(make_train_step(config.model, stage()))
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return params, state.params, losses


def test_a_config_selects_it_by_name(config):
    assert config.model.connector == RowMeanConfig(gain=2.0)
    assert config_to_dict(config)["model"]["connector"] == {"name": "row_mean", "gain": 2.0}
    overrides = ["model.connector=row_mean", "model.connector.gain=3"]
    assert load_config("configs/nano.py", overrides).model.connector == RowMeanConfig(gain=3.0)
    assert load_config("configs/nano.py", [*overrides, "model.connector.old=False"]).model.connector.gain == 3.0
    for override, reason in (
        ("model.connector=row_maen", r"connector\.name: .*did you mean 'row_mean'"),
        ("model.connector.gian=2", r"connector\.gian: no such key.*'gain'"),
        ("model.connector.gain=-1", r"connector\.gain: expected more than 0, got -1"),
        ("model.connector.old=True", r"connector\.old: expected False or no such key, got .*: .* was removed"),
    ):
        with pytest.raises(UserError, match=reason):
            load_config("configs/nano.py", ["model.connector=row_mean", override])


def test_its_token_grid_matches_its_output(config):
    assert token_grid(config.model) == (4, 1) and tokens_per_tile(config.model) == 4
    module = make_connector(config.model.connector, output_size=8, dtype="float32")
    output, _ = module.init_with_output(jax.random.key(0), jnp.ones((2, 16, 6)), jnp.ones((5, 8)))
    assert output.tokens.shape == (2, 4, 8) and output.entropy is None


def test_it_trains(trained):
    before, after, losses = trained
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before["connector"], after["connector"])
    assert moved == {"project": {"kernel": True}, "shift": True}


def test_its_shift_is_seeded_from_the_lm_head(config, trained):
    before, _, _ = trained
    head = before["language"]["embedding"]
    np.testing.assert_allclose(before["connector"]["shift"], head.mean(axis=0), rtol=1e-5, atol=1e-7)
    # The same when a model is assembled from backbones, here random ones.
    joined = assemble(config.model, None, None)
    head = joined["language"]["embedding"]
    np.testing.assert_allclose(joined["connector"]["shift"], head.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_it_is_saved_and_restored(config, trained, tmp_path):
    _, params, _ = trained
    write_checkpoint(tmp_path / "run", config, params, nano_tokenizer(), history=[])
    assert read_run_config(tmp_path / "run").model == config.model
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "run"), params)


def test_its_flops_are_counted(config):
    sizes = dict(tiles=5, tokens=1, answer_tokens=1, squared_lengths=1)
    forward = 5 * 2 * 4 * 16 * 16  # 5 tiles of 4 tokens, each a product with a 16 x 16 matrix
    for trainable, times in (((), 1), (("connector",), 2), (("vision", "connector"), 3)):
        assert train_flops(config.model, trainable, **sizes).connector == times * forward


def test_it_is_exported_to_safetensors_and_read_back(config, trained, tmp_path):
    _, params, _ = trained
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    rows = tables.alignvlm(config.model)
    write_parameters(
        tmp_path,
        rows,
        shapes={path: array.shape for path, array in flat.items()},
        dtypes={path: array.dtype for path, array in flat.items()},
        read=lambda path, index: flat[path][index],
    )
    with TensorFiles(tmp_path) as files:
        assert {"model.connector.project.weight", "model.connector.shift"} <= set(files.dtypes)
        restored = convert.load_params(files, rows, abstract_parameters(config.model), source=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_unregistered_and_duplicate_connectors_are_refused():
    @dataclasses.dataclass(frozen=True)
    class OtherConfig(ConnectorConfig):
        """Settings that belong to no registered connector."""

    with pytest.raises(ValueError, match="OtherConfig is not the config of a registered connector: .*align.*row_mean"):
        make_connector(OtherConfig(), output_size=8, dtype="float32")
    with pytest.raises(ValueError, match="'row_mean' is registered with this name"):
        register(dataclasses.replace(SPEC, config=OtherConfig))
    assert connector_names()[-1] == "row_mean"
