"""Builds the device mesh, which arranges all devices as a box with three named axes.

`data`    devices along it hold the same weights and read different bins
`fsdp`    devices along it read different bins and hold a part of every weight, which is gathered when it is used
`tensor`  devices along it hold a part of the heads, of the MLPs' width and of the vocabulary, and read the same bins

Within a TPU slice, all chips are connected to each other (ICI). Between slices there is only the data-center network
(DCN), which is far slower. Slices are therefore placed one after the other along `data`, where only gradients are
exchanged, and `fsdp` and `tensor` stay within a slice:

    2 slices of 8 chips, data=4 fsdp=2 tensor=2    data 0, 1: slice 0    data 2, 3: slice 1
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from alignvlm_jax.errors import UserError
from alignvlm_jax.ops.gradient_dtype import GRADIENT_DTYPES

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh, over all slices, and what they exchange.

    One axis may be -1: it gets all remaining devices.

    Attributes:
      data: devices along `data`.
      fsdp: devices along `fsdp`.
      tensor: devices along `tensor`.
      slices: number of groups of devices with only a slow network between them. -1 uses what the devices report: TPUs
        know their slices, and all other devices form one group. For GPUs, set it to the number of nodes, so that nodes
        are placed along `data`.
      gradient_dtype: dtype in which devices exchange gradients, "float32" or "bfloat16" (`ops/gradient_dtype.py`).
        bfloat16 halves the bytes.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = -1
    gradient_dtype: str = "float32"

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in (*sizes, self.slices)) or sizes.count(-1) > 1:
            raise ValueError(
                "expected sizes of 1 or more, with -1 (all remaining devices) for at most one axis, "
                f"got {self.describe()}"
            )
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ValueError(f"gradient_dtype: expected {' or '.join(GRADIENT_DTYPES)}, got {self.gradient_dtype!r}")

    def describe(self) -> str:
        """Returns the sizes as text, such as "data=2 fsdp=2 tensor=2"."""
        sizes = " ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)
        return sizes if self.slices == -1 else f"{sizes} slices={self.slices}"


def parse_mesh(text: str) -> MeshConfig:
    """Parses the value of `--mesh`, such as "data=2,fsdp=4". An axis that is not named has one device.

    Raises:
      UserError: if the text is malformed, or names an axis or size that does not exist.
    """
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
        return MeshConfig(**{"data": 1, **sizes})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--mesh {text}: expected sizes of the mesh's axes, such as data=1,fsdp=2,tensor=4 ({error})"
        ) from error


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, slices: int | None = None) -> Mesh:
    """Returns a mesh in which neighbors are close to each other in the hardware. Use it under `jax.set_mesh`.

    Args:
      config: sizes of the mesh.
      devices: devices of the mesh; None means all. They may come from a `jax.experimental.topologies` description.
      slices: replaces `config.slices`.

    Raises:
      UserError: if the sizes do not fit the number of devices, or `data` is not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    # Replace a -1 by the number of remaining devices.
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh: {config.describe()} does not fit {len(devices)} device(s): the sizes must multiply to "
            f"{len(devices)}, or one of them must be -1 and the product of the others must divide {len(devices)}"
        )
    groups = _group_by_slice(devices, config.slices if slices is None else slices)
    if sizes[0] % len(groups):
        raise UserError(
            f"config.mesh: data={sizes[0]} must be a multiple of the {len(groups)} slices, which are placed along it "
            "(the network between slices is too slow for fsdp and tensor); each slice has "
            f"{len(devices) // len(groups)} devices"
        )
    # Arrange each slice as a box, then stack the boxes along `data`.
    slice_shape = (sizes[0] // len(groups), *sizes[1:])
    box = np.concatenate([_arrange(group, slice_shape) for group in groups])
    # With Auto axes, XLA propagates shardings from constraints. Linen does not support JAX's default, Explicit.
    return Mesh(box, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Number of pieces into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _group_by_slice(devices: Sequence[jax.Device], num_slices: int) -> list[list[jax.Device]]:
    """Returns the devices of each slice; `num_slices` of -1 means the number that the devices report."""
    if devices[0].platform == "tpu":
        slices = {}
        for device in devices:
            slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
        if num_slices not in (-1, len(slices)):
            raise UserError(f"config.mesh.slices: expected {len(slices)}, as the devices report, got {num_slices}")
        return [slices[i] for i in sorted(slices)]
    # Other devices do not report slices. They are split in order, which is the order of their processes.
    if len(devices) % num_slices:  # -1 divides every number
        raise UserError(f"config.mesh.slices: {num_slices} slices do not divide {len(devices)} device(s)")
    size = len(devices) // max(1, num_slices)
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


def _arrange(devices: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    """Returns the devices of one slice as a box, whose axes follow the axes of the TPU's torus where possible."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # Two axes of the mesh must share one axis of the torus.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
