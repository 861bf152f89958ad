"""The device mesh: the devices as a box with three named axes.

`data`    each slice holds the same weights and reads other bins
`fsdp`    each slice reads other bins and holds a part of every weight, gathered when it is used
`tensor`  each slice holds a part of the heads, of the MLPs' width and of the vocabulary, and reads the same bins
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from alignvlm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; one of them may be -1: as many as are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"expected sizes of 1 or more, at most one of them -1 (what is left), got {self.describe()}"
            )

    def describe(self) -> str:
        """For instance "data=2 fsdp=2 tensor=2"."""
        return " ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays all devices (or the given ones) out as a mesh; use it under `jax.set_mesh`."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh: {config.describe()} does not divide up {len(devices)} device(s): the sizes must multiply to "
            f"{len(devices)}, or leave one of them at -1 and let the others divide it"
        )
    # Auto axes: XLA propagates shardings from what is constrained. The default, Explicit, is refused by Linen.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
