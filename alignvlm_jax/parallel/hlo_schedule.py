"""Estimates the time of one run of a compiled TPU program from the compiler's schedule.

A TPU's compiler estimates the cycles of the instructions that it schedules, and writes them into the text. This module
sums them over the schedule, with loops multiplied out, and adds the instructions without an estimate at their peak:
attention kernels by their FLOPs, others by the bytes that they move. A collective costs the bytes that it sends over
the rate of the links that its algorithm uses. If it is asynchronous, only the part counts that takes longer than the
computation between its start and its end: within a loop body, all asynchronous collectives together are compared with
all instructions between the first start and the last end.

The estimate is optimistic. It leaves out latencies, the skipped steps of a kernel's grid, stragglers, and the input.
"""

import re
from collections.abc import Sequence

from alignvlm_jax.parallel import hlo_attention, hlo_work
from alignvlm_jax.parallel.chips import Chip
from alignvlm_jax.parallel.hlo import Instruction, Program
from alignvlm_jax.parallel.hlo_attention import ExecutedBlocks
from alignvlm_jax.parallel.hlo_collectives import KINDS, Collective


def collective_seconds(chip: Chip, collective: Collective) -> float:
    """Returns the seconds of all runs of a collective at the peak rate of the links that it uses."""
    if collective.crosses_slices:
        rate = chip.dcn_bandwidth
    else:
        total = chip.ici_links or 1
        rate = chip.ici_bandwidth * min(collective.links or total, total) / total
    return collective.count * collective.bytes_sent * chip.devices_per_chip / rate


def schedule_seconds(
    program: Program,
    chip: Chip,
    collectives: Sequence[Collective],
    executed_blocks: ExecutedBlocks = hlo_attention.all_blocks,
) -> dict[str, float] | None:
    """Returns the seconds of one run of a program, by what they are spent on; None if the text has no estimates.

    Args:
      program: the program.
      chip: data of the chips.
      collectives: the collectives of the program.
      executed_blocks: the blocks of a row that attention kernels run.
    """
    fused = hlo_work.fused_computations(program)
    within_slice = [collective for collective in collectives if not collective.crosses_slices]
    total = {"instructions": 0.0, "attention": 0.0, "collectives": 0.0}
    has_estimates = False
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        if name in fused:
            continue
        overlapped = 0.0  # computation between the first start and the last end
        starts, ends = _asynchronous_parts(program, body)
        for index, instruction in enumerate(body.values()):
            cycles = _estimated_cycles(instruction)
            has_estimates |= cycles is not None
            if _is_collective(instruction) or index in starts or index in ends:
                continue
            if hlo_work.is_attention(instruction):
                flops = hlo_attention.splash_flops(instruction, executed_blocks)
                kind, seconds = "attention", flops * chip.devices_per_chip / chip.peak_flops
            elif cycles is not None:
                kind, seconds = "instructions", cycles / chip.clock_hz
            else:
                moved = hlo_work.moved(program, body, instruction)
                kind, seconds = "instructions", moved * chip.devices_per_chip / chip.hbm_bandwidth
            total[kind] += times * seconds
            is_between = starts and ends and min(starts) < index < max(ends)
            overlapped += times * seconds if is_between else 0.0
        here = [collective for collective in within_slice if collective.computation == name]
        hidden = sum(collective_seconds(chip, collective) for collective in here if collective.is_overlapped)
        total["collectives"] += max(0.0, hidden - overlapped)
        total["collectives"] += sum(collective_seconds(chip, each) for each in here if not each.is_overlapped)
    return total if has_estimates else None


def _estimated_cycles(instruction: Instruction) -> int | None:
    """Returns the compiler's estimate; None without one."""
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(cycles.group(1)) if cycles else None


def _is_collective(instruction: Instruction) -> bool:
    """Returns whether an instruction outside of fusions does nothing but communicate."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind in KINDS or 'AllReduceScatterFusion"' in instruction.attributes or kind in ("send", "recv")


def _asynchronous_parts(program: Program, body: dict[str, Instruction]) -> tuple[set[int], set[int]]:
    """Returns the indices of the instructions that start, and of those that end, an asynchronous collective."""
    starts, ends = set(), set()
    for index, instruction in enumerate(body.values()):
        inner = program.computations.get(instruction.attribute("calls") or "", {}).values()
        targets = " ".join(i.attributes for i in inner if i.opcode == "custom-call")
        kind, _, part = instruction.opcode.rpartition("-")
        if "AsyncCollectiveStart" in targets or (kind in KINDS and part == "start"):
            starts.add(index)
        if "AsyncCollectiveDone" in targets or (kind in KINDS and part == "done"):
            ends.add(index)
    return starts, ends
