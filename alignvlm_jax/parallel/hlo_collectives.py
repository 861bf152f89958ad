"""Lists the collectives of a compiled program from its text: bytes sent, number of runs, and network.

Traffic between slices does not appear in the text as collectives, but as messages to the host, which reduces or
distributes them; `_between_slices` translates these messages. A collective that XLA splits to overlap it with
computation appears several times, as the parts of one chain. It is counted where the chain starts.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from alignvlm_jax.parallel.hlo import Instruction, Program, array_bytes

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: "all-gather", "all-reduce", ...
      op_name: origin in the Python program.
      count: number of runs in one step.
      bytes_sent: bytes that one device sends in one run, in a ring algorithm.
      crosses_slices: whether any of its groups spans the network between slices.
    """

    kind: str
    op_name: str
    count: float
    bytes_sent: float
    crosses_slices: bool


def collectives(program: Program, slice_of_device: Sequence[int]) -> list[Collective]:
    """Returns all collectives of a program.

    Args:
      program: the compiled program.
      slice_of_device: the slice of each device, in the order of the mesh.
    """
    found = []
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        # First parts of chains: the operands of the instructions that start an asynchronous collective.
        started = {operand for i in body.values() if '"AsyncCollectiveStart"' in i.attributes for operand in i.operands}
        for instruction in body.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind == "send" and "megascale" in instruction.attributes:
                kind, sent = _between_slices(instruction)
                found.append(Collective(kind, instruction.op_name, times, sent, True))
            if kind not in _COLLECTIVES or instruction.opcode == "send":
                continue
            if "chain_id=" in instruction.attributes and instruction.name not in started:
                continue  # a later part of a chain
            groups = _groups(instruction.attributes, len(slice_of_device))
            size = max(map(len, groups)) if groups else len(slice_of_device)
            if size == 1:
                continue
            shapes = instruction.shapes
            # The result of an asynchronous start is a tuple of the operands, followed by the results.
            if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :][:1]
            # Bytes of the result on one device. In a ring of n devices, each sends (n - 1) / n of the complete array,
            # and an all-reduce is a reduce-scatter and an all-gather. The result of a reduce-scatter is 1 / n of it.
            result = sum(array_bytes(*shape) for shape in shapes)
            sent = {
                "all-gather": result * (size - 1) / size,
                "all-reduce": 2 * result * (size - 1) / size,
                "reduce-scatter": result * (size - 1),
                "all-to-all": result * (size - 1) / size,
                "collective-permute": result,
            }[kind]
            crosses = any(len({slice_of_device[i] for i in group}) > 1 for group in groups)
            found.append(Collective(kind, instruction.op_name, times, sent, crosses))
    return found


def _between_slices(message: Instruction) -> tuple[str, float]:
    """Returns the collective that a message to the host belongs to, and the bytes that this device sends for it."""
    kind = re.search(r'transfer_type="(\w+)"', message.attributes).group(1)
    size = array_bytes(*message.shapes[0])
    target = re.search(r'_megascale_target="\{([\d,]+)\}', message.attributes)
    slices = len(target.group(1).split(",")) if target else 2
    if kind == "ALL_REDUCE":
        return "all-reduce", 2 * size * (slices - 1) / slices
    if kind == "ALL_GATHER":
        return "all-gather", size * (slices - 1)
    return "collective-permute", size


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Returns the groups of devices that communicate. An empty list means that all devices form one group.

    Each branch parses one of XLA's notations.
    """
    # source_target_pairs={{0,1},{1,0}}
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes)
    if pairs:
        return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs.group(1) + "}")]
    # replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}: the groups run along the axes in braces.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:\([^)]*\)\s*)?\{([^}]*)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        along = re.findall(r"'([^']+)'", mesh.group(2))
        sizes = list(axes.values())
        order = [i for i, name in enumerate(axes) if name not in along]
        order += [i for i, name in enumerate(axes) if name in along]
        return _split_box(num_devices, sizes, order, math.prod(axes[name] for name in along))
    # replica_groups=[2,2]<=[2,2]T(1,0): number the devices of a box, transpose its axes, and cut it into rows.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes = [int(size) for size in iota.group(3).split(",")]
        order = [int(axis) for axis in iota.group(4).split(",")] if iota.group(4) else list(range(len(sizes)))
        return _split_box(num_devices, sizes, order, int(iota.group(2)))
    # replica_groups={{0,1},{2,3}}
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    return []


def _split_box(num_devices: int, sizes: list[int], order: list[int], group_size: int) -> list[list[int]]:
    """Numbers the elements of a box of `sizes`, transposes its axes to `order`, and splits the numbers into groups."""
    # Like `np.arange(num_devices).reshape(sizes).transpose(order).reshape(-1, group_size)`.
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(sizes[axis])]
    assert len(numbers) == num_devices
    return [numbers[i : i + group_size] for i in range(0, num_devices, group_size)]
