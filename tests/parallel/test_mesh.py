"""Meshes built from configs, and the sharding rules applied to shapes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.config import load_config
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh, num_batch_shards


@pytest.mark.parametrize(
    "config, shape",
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(fsdp=8), (1, 8, 1)),
    ],
)
def test_minus_one_gets_the_remaining_devices(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert num_batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=16), MeshConfig(2, 2, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(config):
    with pytest.raises(UserError, match="config.mesh: .* 8 device"):
        make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Attributes that `make_mesh` reads from the chips of two v5p:2x2x2 slices.

    Ids alternate between the slices, so a mesh that ignores the slices mixes them.
    """

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def slice_index(self):
        return self.id % 2

    @property
    def coords(self):
        number = self.id // 2
        return number % 2, number // 2 % 2, number // 4


def test_slices_are_placed_along_data():
    chips = [Chip(i) for i in range(16)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), chips)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert make_mesh(MeshConfig(data=-1, fsdp=4), chips, slices=2).shape["data"] == 4
    with pytest.raises(UserError, match="data=1 must be a multiple of the 2 slices.*each slice has 8 devices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), chips)
    with pytest.raises(UserError, match="mesh.slices: expected 2, as the devices report, got 4"):
        make_mesh(MeshConfig(slices=4), chips)


def test_devices_without_slices_are_split_in_order():
    mesh = make_mesh(MeshConfig(data=4, tensor=-1, slices=2))
    assert [device.id for device in mesh.devices[:2].flat] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="3 slices do not divide 8"):
        make_mesh(MeshConfig(slices=3))


def boxed(axes, shape):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


def test_axis_names_become_partition_specs():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tree = {
        "embedding": boxed(("vocab", "embed"), (64, 16)),
        "down": boxed(("layers", "mlp", "embed"), (3, 32, 16)),
        "norm": boxed(("norm",), (16,)),
        "odd": boxed(("vocab", "embed"), (65, 16)),
    }
    specs = jax.tree.map(lambda leaf: leaf.spec, sharding.parameter_shardings(tree, mesh))
    assert specs["embedding"] == jax.P("tensor", "fsdp")
    assert specs["down"] == jax.P(None, "tensor", "fsdp")
    assert specs["norm"] == jax.P(None)
    assert specs["odd"] == jax.P(None, "fsdp"), "an axis whose length the mesh does not divide is not split"


def test_every_weight_of_every_connector_has_a_rule():
    from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes
    from alignvlm_jax.models.connectors import connector_named, connector_names

    known_names = {name for name, _ in sharding.RULES} | {None}
    for connector in map(connector_named, connector_names()):
        config = AlignVLMConfig(connector=connector.config())
        tree = parameter_shapes(config)
        for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
            assert isinstance(leaf, nn.LogicallyPartitioned), "every weight names its axes"
            assert set(leaf.names) <= known_names, leaf.names
        sharding.parameter_shardings(tree, make_mesh(MeshConfig(2, 2, 2)))


def test_batches_are_split_along_the_bins():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = sharding.shard_batch({"tokens": jnp.zeros((3, 8, 5), jnp.int32)}, mesh)
    assert placed["tokens"].addressable_shards[0].data.shape == (3, 2, 5)


def test_one_process_holds_all_rows():
    assert sharding.local_rows(make_mesh(MeshConfig(2, 2, 2)), 8) == tuple(range(8))
    with pytest.raises(UserError, match="bins_per_microbatch: expected a multiple of 4 .*data=2 x fsdp=2.*got 6"):
        sharding.local_rows(make_mesh(MeshConfig(2, 2, 2)), 6)


def test_the_dtype_of_exchanged_gradients_is_checked():
    experiment = load_config("configs/nano.py", ["mesh.gradient_dtype=bfloat16"])
    assert experiment.mesh.gradient_dtype == "bfloat16"
    with pytest.raises(UserError, match="gradient_dtype: expected float32 or bfloat16, got 'float16'"):
        load_config("configs/nano.py", ["mesh.gradient_dtype=float16"])
