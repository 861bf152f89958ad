"""Lists the collectives of a compiled program from its text: bytes sent, number of runs, and network.

Traffic between slices does not appear in the text as collectives, but as messages to the host, which reduces or
distributes them; `_between_slices` translates these messages. A collective that XLA splits to overlap it with
computation appears several times, as the parts of one chain. It is counted where the chain starts. A reduce-scatter
that XLA's TPU compiler fuses appears as an all-reduce followed by a slice, inside a fusion.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from alignvlm_jax.parallel.hlo import Instruction, Program, array_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Opcodes of collectives."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: "all-gather", "all-reduce", ...
      op_name: origin in the Python program.
      count: number of runs in one step.
      bytes_sent: bytes that one device sends in one run, in a ring algorithm.
      crosses_slices: whether any of its groups spans the network between slices.
      links: number of a TPU's links that the compiler's algorithm uses at a time; None if the text does not name it.
      is_overlapped: whether it is asynchronous, so that computation can run between its start and its end.
      computation: the computation that runs it. For one inside a fusion, it is the one that contains the fusion.
    """

    kind: str
    op_name: str
    count: float
    bytes_sent: float
    crosses_slices: bool
    links: int | None
    is_overlapped: bool
    computation: str


def collectives(program: Program, slice_of_device: Sequence[int]) -> list[Collective]:
    """Returns all collectives of a program.

    Args:
      program: the compiled program.
      slice_of_device: the slice of each device, in the order of the mesh.
    """
    found = []
    # Fusions of an all-reduce and a slice, by the name of their computation.
    fused_scatters = {
        i.attribute("calls"): i for body in program.computations.values() for i in body.values() if _is_scatter(i)
    }
    # The computation that contains each fusion, by the name of the fusion's computation.
    callers = {
        i.attribute("calls"): name
        for name, body in program.computations.items()
        for i in body.values()
        if i.opcode == "fusion"
    }
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        caller = callers.get(name, name)
        # First parts of chains: the operands of the instructions that start an asynchronous collective.
        started = {operand for i in body.values() if '"AsyncCollectiveStart"' in i.attributes for operand in i.operands}
        for instruction in body.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind == "send" and "megascale" in instruction.attributes:
                kind, sent = _between_slices(instruction)
                found.append(Collective(kind, instruction.op_name, times, sent, True, None, True, caller))
            if kind not in KINDS or instruction.opcode == "send":
                continue
            is_chain = "chain_id=" in instruction.attributes
            if is_chain and instruction.name not in started:
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
            scatter = fused_scatters.get(name)
            if kind == "all-reduce" and scatter is not None:
                kind, result = "reduce-scatter", result / size
            sent = {
                "all-gather": result * (size - 1) / size,
                "all-reduce": 2 * result * (size - 1) / size,
                "reduce-scatter": result * (size - 1),
                "all-to-all": result * (size - 1) / size,
                "collective-permute": result,
            }[kind]
            crosses = any(len({slice_of_device[i] for i in group}) > 1 for group in groups)
            links = _num_links((scatter or instruction).attributes, size)
            is_overlapped = is_chain or instruction.opcode.endswith("-start")
            found.append(Collective(kind, instruction.op_name, times, sent, crosses, links, is_overlapped, caller))
    return found


def _is_scatter(instruction: Instruction) -> bool:
    """Returns whether an instruction is a reduce-scatter written as a fusion of an all-reduce and a slice."""
    return instruction.opcode == "fusion" and 'AllReduceScatterFusion"' in instruction.attributes


def _num_links(attributes: str, group_size: int) -> int | None:
    """Returns the number of links of a TPU that an algorithm sends on at a time; None if it is not one of rings.

    A chip of a torus has two links along each axis. A ring uses both, one for each direction, and "colors" is the
    number of rings; a "UniDirection" ring uses one of them. Two neighbors have a single link.
    """
    config = attributes.partition('"collective_algorithm_config":{')[2]
    strategy = re.search(r"(\w*)Strategy\w*\{colors:(\d+)", config)
    emitter = re.match(r'"emitter":"(\w+)"', config)
    if strategy:
        links = int(strategy.group(2)) * (1 if "UniDirection" in strategy.group(1) else 2)
    elif emitter and re.match(r"1D|\w*Ring", emitter.group(1)):
        links = 2
    else:
        return None
    return 1 if group_size == 2 else links


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
    # replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}: the groups run along the axes in braces. The devices of the
    # mesh may be in another order: mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}
    device_ids = r"(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\]{device_ids}\s*\{{([^}}]*)\}}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        along = re.findall(r"'([^']+)'", mesh.group(4))
        sizes = list(axes.values())
        order = [i for i, name in enumerate(axes) if name not in along]
        order += [i for i, name in enumerate(axes) if name in along]
        groups = _split_box(num_devices, sizes, order, math.prod(axes[name] for name in along))
        if mesh.group(2):
            box = _integers(mesh.group(2))
            device_order = _integers(mesh.group(3)) if mesh.group(3) else list(range(len(box)))
            (devices,) = _split_box(num_devices, box, device_order, num_devices)
            groups = [[devices[i] for i in group] for group in groups]
        return groups
    # replica_groups=[2,2]<=[2,2]T(1,0): number the devices of a box, transpose its axes, and cut it into rows.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes = _integers(iota.group(3))
        order = _integers(iota.group(4)) if iota.group(4) else list(range(len(sizes)))
        return _split_box(num_devices, sizes, order, int(iota.group(2)))
    # replica_groups={{0,1},{2,3}}
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    return []


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _split_box(num_devices: int, sizes: list[int], order: list[int], group_size: int) -> list[list[int]]:
    """Numbers the elements of a box of `sizes`, transposes its axes to `order`, and splits the numbers into groups."""
    # Like `np.arange(num_devices).reshape(sizes).transpose(order).reshape(-1, group_size)`.
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(sizes[axis])]
    assert len(numbers) == num_devices
    return [numbers[i : i + group_size] for i in range(0, num_devices, group_size)]
