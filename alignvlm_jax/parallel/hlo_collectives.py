"""The collectives of a compiled program, read off its text: what is sent, how often, and over which network.

What goes from slice to slice is not written as collectives but as messages to the host, which reduces or spreads them:
`_between_slices` says what they stand for. Collectives that XLA takes apart to overlap them with other work appear
several times in the text, as parts of one chain: each is counted where it starts.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from alignvlm_jax.parallel.hlo import Instruction, Program, size_of

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: "all-gather", "all-reduce", ...
      op_name: where it comes from.
      count: how often a step runs it.
      bytes_sent: by one device in one run, as a ring does it.
      crosses_slices: whether any of its groups reaches over the network between slices.
    """

    kind: str
    op_name: str
    count: float
    bytes_sent: float
    crosses_slices: bool


def collectives(program: Program, slice_of_device: Sequence[int]) -> list[Collective]:
    """All collectives.

    Args:
      slice_of_device: for each device, in the mesh's order, the slice it belongs to.
    """
    found = []
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
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
            if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :][:1]  # operands come first
            whole = sum(size_of(*shape) for shape in shapes)
            sent = {
                "all-gather": whole * (size - 1) / size,
                "all-reduce": 2 * whole * (size - 1) / size,
                "reduce-scatter": whole * (size - 1),
                "all-to-all": whole * (size - 1) / size,
                "collective-permute": whole,
            }[kind]
            crosses = any(len({slice_of_device[i] for i in group}) > 1 for group in groups)
            found.append(Collective(kind, instruction.op_name, times, sent, crosses))
    return found


def _between_slices(message: Instruction) -> tuple[str, float]:
    """Which collective a message to the host is part of, and the bytes that this device sends for it."""
    kind = re.search(r'transfer_type="(\w+)"', message.attributes).group(1)
    size = size_of(*message.shapes[0])
    target = re.search(r'_megascale_target="\{([\d,]+)\}', message.attributes)
    slices = len(target.group(1).split(",")) if target else 2
    if kind == "ALL_REDUCE":
        return "all-reduce", 2 * size * (slices - 1) / slices
    if kind == "ALL_GATHER":
        return "all-gather", size * (slices - 1)
    return "collective-permute", size


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Which devices talk to which, in any of the three ways XLA writes it; empty means all with all."""
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes)
    if pairs:
        return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs.group(1) + "}")]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:\([^)]*\)\s*)?\{([^}]*)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        along = re.findall(r"'([^']+)'", mesh.group(2))
        sizes = list(axes.values())
        order = [i for i, name in enumerate(axes) if name not in along]
        order += [i for i, name in enumerate(axes) if name in along]
        return _cut(num_devices, sizes, order, math.prod(axes[name] for name in along))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes = [int(size) for size in iota.group(3).split(",")]
        order = [int(axis) for axis in iota.group(4).split(",")] if iota.group(4) else list(range(len(sizes)))
        return _cut(num_devices, sizes, order, int(iota.group(2)))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    return []


def _cut(num_devices: int, sizes: list[int], order: list[int], group_size: int) -> list[list[int]]:
    """Numbers 0 ... in a box of `sizes`, its axes put in `order`, cut into groups."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(sizes[axis])]
    assert len(numbers) == num_devices
    return [numbers[i : i + group_size] for i in range(0, num_devices, group_size)]
