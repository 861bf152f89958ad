"""The device mesh: the devices as a box with three named axes.

`data`    each slice holds the same weights and reads other bins
`fsdp`    each slice reads other bins and holds a part of every weight, gathered when it is used
`tensor`  each slice holds a part of the heads, of the MLPs' width and of the vocabulary, and reads the same bins

Within a TPU slice all chips are wired to each other (ICI); between slices there is only the data center's network
(DCN), far slower. So several slices lie one after the other along `data`, where nothing but gradients crosses, and
`fsdp` and `tensor` stay within a slice:

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

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis, over all slices; one of them may be -1: as many as are left.

    Attributes:
      data, fsdp, tensor: the axes.
      slices: into how many groups with a slow network between them the devices fall. -1 asks the devices: TPU slices
        are known, all others are one. For GPUs, say the nodes, `data` then lies over them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = -1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in (*sizes, self.slices)) or sizes.count(-1) > 1:
            raise ValueError(
                f"expected sizes of 1 or more, at most one of the axes -1 (what is left), got {self.describe()}"
            )

    def describe(self) -> str:
        """For instance "data=2 fsdp=2 tensor=2"."""
        sizes = " ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)
        return sizes if self.slices == -1 else f"{sizes} slices={self.slices}"


def parse_mesh(text: str) -> MeshConfig:
    """A mesh from the command line: "data=2,fsdp=4"; an axis that is not named has one device."""
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
        return MeshConfig(**{"data": 1, **sizes})
    except (ValueError, TypeError) as error:
        raise UserError(f"--mesh {text}: expected such as data=1,fsdp=2,tensor=4 ({error})") from error


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, slices: int | None = None) -> Mesh:
    """Lays devices out as a mesh, neighbours on it near each other in the hardware; use it under `jax.set_mesh`.

    Args:
      config: the sizes.
      devices: all there are if not given; or those of a `jax.experimental.topologies` description.
      slices: overrides the config's.

    Raises:
      UserError: the sizes do not divide up the devices, or `data` not the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh: {config.describe()} does not divide up {len(devices)} device(s): the sizes must multiply to "
            f"{len(devices)}, or leave one of them at -1 and let the others divide it"
        )
    groups = _slices(devices, config.slices if slices is None else slices)
    if sizes[0] % len(groups):
        raise UserError(
            f"config.mesh: data={sizes[0]} must be a multiple of the {len(groups)} slices, which lie along it "
            f"(between slices the network is too slow for fsdp and tensor): {len(devices) // len(groups)} devices are "
            "left in each for the rest"
        )
    within = (sizes[0] // len(groups), *sizes[1:])
    box = np.concatenate([_arrange(group, within) for group in groups])
    # Auto axes: XLA propagates shardings from what is constrained. The default, Explicit, is refused by Linen.
    return Mesh(box, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _slices(devices: Sequence[jax.Device], wanted: int) -> list[list[jax.Device]]:
    """The devices of each slice. Devices that know of no slices are cut in order: as their processes are numbered."""
    if devices[0].platform == "tpu":
        slices = {}
        for device in devices:
            slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
        if wanted not in (-1, len(slices)):
            raise UserError(f"config.mesh.slices: expected {len(slices)}, as the devices say, got {wanted}")
        return [slices[i] for i in sorted(slices)]
    if len(devices) % wanted:  # -1 divides everything
        raise UserError(f"config.mesh.slices: {wanted} slices do not divide {len(devices)} device(s)")
    size = len(devices) // max(1, wanted)
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


def _arrange(devices: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice as a box, axes along the wires of a TPU's torus where that can be done."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # an axis of the torus must be shared by two of the mesh
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
