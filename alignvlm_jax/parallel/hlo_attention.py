"""Counts the matrix products inside the splash-attention kernels of a compiled program.

Axes: H query heads, L positions, h head width, n blocks per row.

A kernel is a single instruction. Its operands show what it computes: tables of blocks (integers of one byte or more),
queries [..., H, L, h], keys and values, then the segments and, only if the mask is causal, the position of each query.
Rows may be joined into one sequence. The tables then have n entries along one axis, and n for each row along the other.
Which of these blocks run is not in the text, because the program makes the tables from its batch.
"""

import math
import re
from collections.abc import Callable

from alignvlm_jax.parallel.hlo import Instruction, parse_shapes

ExecutedBlocks = Callable[[str, int, bool], float]
"""Returns the blocks of one row that run, given the kernel ("fwd", "dq" or "dkv"), n, and whether it is causal."""

# Matrix products in each kernel. The fused backward kernel computes all three gradients.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}


def all_blocks(kernel: str, num_blocks: int, is_causal: bool) -> float:
    """Returns the number of blocks on and below the diagonal of a causal row; all n² blocks of another row."""
    return num_blocks * (num_blocks + 1) / 2 if is_causal else num_blocks**2


def splash_flops(instruction: Instruction, executed_blocks: ExecutedBlocks = all_blocks) -> float:
    """Returns the floating-point operations of one run of a splash-attention kernel."""
    kernel = re.search(r"splash_\w+?_(fwd|dkv|dq)", instruction.name).group(1)
    layouts = instruction.attributes.partition("operand_layout_constraints=")[2].partition("}}")[0]
    operands = parse_shapes(layouts)
    queries = next(shape for dtype, shape in operands if len(shape) >= 3 and dtype in ("bf16", "f32"))
    *_, length, width = queries
    first = operands[0]
    table = first[1] if first[1] != queries and re.fullmatch(r"[su]\d+", first[0]) else (1, 1, 1)
    num_blocks, joined_blocks = sorted(table[-2:])
    # Segments are two operands of 32-bit integers. A third one holds the positions.
    integers = [shape for dtype, shape in operands if dtype == "s32" and len(shape) >= 2 and length in shape[-2:]]
    is_causal = len(integers) > (2 if "segmented" in instruction.name else 0)

    block = length // joined_blocks  # blocks are square
    blocks = joined_blocks // num_blocks * executed_blocks(kernel, num_blocks, is_causal)
    # The fused kernel returns a part of the gradient of the queries for each block of keys.
    is_fused = kernel == "dkv" and any(len(shape) > len(queries) for _, shape in instruction.shapes)
    products = _PRODUCTS["fused" if is_fused else kernel]
    return 2.0 * products * math.prod(queries[:-2]) * blocks * block**2 * width
