"""Counts the matrix products and the memory traffic of a compiled program from its text, once per iteration of a loop.

XLA's own analysis cannot see inside Pallas kernels. `hlo_attention` adds the products of splash attention.
"""

import collections
import functools
import math
import re

from alignvlm_jax.parallel.hlo import Instruction, Program, parameters
from alignvlm_jax.parallel.hlo_attention import ExecutedBlocks, all_blocks, splash_flops

# Opcodes that only name, group or reinterpret memory. The bodies of loops and branches are counted separately.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-start", "copy-done", "slice-start", "slice-done", "async-start",
    "async-done", "opt-barrier",
)  # fmt: skip


def flops(program: Program, executed_blocks: ExecutedBlocks = all_blocks) -> dict[str, float]:
    """Floating-point operations of matrix products by op_name, including those inside attention kernels.

    Args:
      program: the program.
      executed_blocks: the blocks of a row that attention kernels run; by default all that the mask does not exclude.
    """
    total = collections.defaultdict(float)
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        for instruction in body.values():
            # XLA writes matrix products as dots or convolutions, inside and outside of fusions.
            if instruction.opcode in ("dot", "convolution"):
                operands = [body[operand].shapes[0][1] for operand in instruction.operands[:2]]
                total[instruction.op_name] += times * _product_flops(instruction, *operands)
            elif is_attention(instruction):
                total[_origin(body, instruction)] += times * splash_flops(instruction, executed_blocks)
    return dict(total)


def is_attention(instruction: Instruction) -> bool:
    """Returns whether an instruction is a splash-attention kernel."""
    return instruction.opcode == "custom-call" and "splash" in instruction.name


def kernels(program: Program) -> dict[str, float]:
    """Number of runs of each Pallas kernel, with keys such as "language: splash_mha_fwd_segmented"."""
    found = collections.defaultdict(float)
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        for instruction in body.values():
            if '"tpu_custom_call"' in instruction.attributes:
                kernel = re.sub(r"\.\d+$", "", instruction.name)
                found[f"{_module_path(_origin(body, instruction)).split('/')[0]}: {kernel}"] += times
    return dict(found)


def bytes_moved(program: Program) -> float:
    """Bytes between memory and the cores: operands and results of every instruction outside of fusions.

    An operand that is only sliced counts as many bytes as the slice; a result that is updated in place counts as many
    as the update.
    """
    fused = fused_computations(program)
    total = 0.0
    for name, times in program.runs.items():
        if name in fused:
            continue  # values inside a fusion stay in registers; `moved` counts its operands and its result
        body = program.computations.get(name, {})
        total += times * sum(moved(program, body, instruction) for instruction in body.values())
    return total


def fused_computations(program: Program) -> set[str]:
    """Returns the names of the computations of fusions. Their instructions do not run on their own."""
    bodies = program.computations.values()
    return {i.attribute("calls") or "" for body in bodies for i in body.values() if i.opcode == "fusion"}


def largest_buffers(program: Program, count: int) -> list[tuple[float, str, str]]:
    """Returns the largest results of single instructions as (bytes, shape, origin), each shape once."""
    best = {}
    for name in program.runs:
        for instruction in program.computations.get(name, {}).values():
            if instruction.opcode in _FREE or len(instruction.shapes) != 1:
                continue
            dtype, shape = instruction.shapes[0]
            label = f"{dtype}[{','.join(map(str, shape))}]"
            origin = _module_path(instruction.op_name) or instruction.opcode
            best.setdefault(label, (instruction.size, label, origin))
    return sorted(best.values(), reverse=True)[:count]


def moved(program: Program, body: dict[str, Instruction], instruction: Instruction) -> float:
    """Bytes that one run of an instruction reads and writes; 0 if it does not move memory by itself."""
    if instruction.opcode in _FREE or re.search(r'"(AllocateBuffer|ConcatBitcast)"', instruction.attributes):
        return 0.0
    # A slice is read and then written. So is an update; the rest of its buffer is reused without being moved.
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * instruction.size
    if instruction.opcode == "dynamic-update-slice":
        return 2 * body[instruction.operands[1]].size
    callee = instruction.attribute("calls") or ""
    if callee not in program.computations:
        return instruction.size + sum(body[name].size for name in instruction.operands if name in body)
    inner, root = program.computations[callee], program.roots[callee]
    written = instruction.size if root is None else _bytes_written(program, callee, root.name)
    return written + sum(_bytes_read(program, callee, parameter.name) for parameter in parameters(inner))


def _bytes_written(program: Program, computation: str, name: str) -> float:
    """Bytes that a fusion writes for one value of its computation that is a part of its result."""
    body = program.computations[computation]
    value = body[name]
    if value.opcode == "parameter" or _is_later_part(value):
        return 0.0  # an operand that is passed on keeps its memory
    if value.opcode in ("tuple", "bitcast"):
        return sum(_bytes_written(program, computation, operand) for operand in value.operands)
    if value.opcode == "dynamic-update-slice":
        return body[value.operands[1]].size  # in place
    callee = value.attribute("calls") or ""
    if value.opcode == "fusion" and program.roots.get(callee):
        return _bytes_written(program, callee, program.roots[callee].name)
    if value.opcode == "get-tuple-element" and body[value.operands[0]].opcode == "fusion":
        callee = body[value.operands[0]].attribute("calls")
        element = program.roots[callee].operands[int(value.attribute("index"))]
        return _bytes_written(program, callee, element)
    return value.size


def _bytes_read(program: Program, computation: str, name: str) -> float:
    """Bytes of one value of a fusion's computation that are read: all, unless every user reads only a slice of it."""
    body = program.computations[computation]
    size, total = body[name].size, 0.0
    for user in body.values():
        if name not in user.operands or _is_later_part(user):
            continue
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            total += user.size
        elif user.opcode == "bitcast" or (user.opcode == "dynamic-update-slice" and name not in user.operands[1:]):
            total += _bytes_read(program, computation, user.name)  # the rest of an updated buffer is not read
        elif user.opcode == "fusion" and user.attribute("calls") in program.computations:
            callee = user.attribute("calls")
            numbers = {int(i.attributes): i.name for i in parameters(program.computations[callee])}
            inside = [numbers[number] for number, operand in enumerate(user.operands) if operand == name]
            total += sum(_bytes_read(program, callee, parameter) for parameter in inside)
        elif user.opcode != "tuple":
            return size
    return min(total, size)


def _is_later_part(instruction: Instruction) -> bool:
    """Returns whether an instruction continues an asynchronous collective, whose bytes count where it starts."""
    is_done = '"AsyncCollectiveDone"' in instruction.attributes
    return is_done or (instruction.opcode != "custom-call" and "chain_id=" in instruction.attributes)


def _origin(body: dict[str, Instruction], kernel: Instruction) -> str:
    """Returns the op_name of an attention kernel, preceded by that of an operand if its own does not name the part.

    JAX 0.11 gives the operations of a function that it has traced before only the path inside that function. The
    nearest operand whose path names a part of the model is then as good: the queries come from the same layer.
    """
    queue, seen = collections.deque([kernel]), set()
    while queue:
        current = queue.popleft()
        if re.search(r"\b(vision|language)/", current.op_name):
            return current.op_name if current is kernel else f"{current.op_name}/{kernel.op_name}"
        names = [name for name in current.operands if name in body and name not in seen]
        seen.update(names)
        queue.extend(body[name] for name in names)
    return kernel.op_name


def _module_path(op_name: str) -> str:
    """Returns the path of the Flax modules that an instruction comes from, without the names that JAX adds."""
    words = re.sub(r"jit\([^)]*\)|[()]", "/", op_name).split("/")
    added = "while body cond closed_call eval_jaxpr shard_map jvp transpose checkpoint rematted_computation".split()
    return "/".join(word for word in words if word and word not in added and not word.startswith("AlignVLM"))


def _product_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Floating-point operations of a dot or convolution with operands of these shapes."""
    out = instruction.shapes[0][1]
    # Every element of the result sums over the contracted axes of the left operand.
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    # dim_labels name the axes: b batch, f features, i and o input and output features of the kernel, and a digit for
    # each spatial axis.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    left_sizes, right_sizes, out_sizes = ({label: size for label, size in zip(*pair, strict=True)} for pair in zip(
        labels, (left, right, out), strict=True
    ))  # fmt: skip
    products = out_sizes["b"] * out_sizes["f"] * right_sizes["i"]
    for axis, window in enumerate(_windows(instruction.attributes)):
        products *= _count_valid_pairs(left_sizes[str(axis)], out_sizes[str(axis)], **window)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * products / (int(groups.group(1)) if groups else 1)


def _windows(attributes: str) -> list[dict[str, int]]:
    """Parses the window of a convolution along each spatial axis: "size=1x2 pad=0_0x1_1 rhs_reversal=0x1"."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in match.group(1).split()) if match else {}
    if not fields:
        return []
    sizes = fields["size"].split("x")

    def values(name, default):
        # XLA omits fields that have their defaults.
        return fields[name].split("x") if name in fields else [default] * len(sizes)

    return [
        dict(
            size=int(size),
            stride=int(stride),
            padding=int(pad.split("_")[0]),  # "low_high"; the end of the input limits the high side
            input_dilation=int(input_dilation),
            window_dilation=int(window_dilation),
        )
        for size, stride, pad, input_dilation, window_dilation in zip(
            sizes,
            values("stride", 1),
            values("pad", "0_0"),
            values("lhs_dilate", 1),
            values("rhs_dilate", 1),
            strict=True,
        )
    ]


@functools.cache
def _count_valid_pairs(
    source: int, out: int, size: int, stride: int, padding: int, input_dilation: int, window_dilation: int
) -> int:
    """Number of pairs of an output and a window position that read an input, not padding or a gap of a dilation.

    XLA often writes matrix products as convolutions in which only one window position of each output reads an input.

    Args:
      source: length of the input.
      out: length of the output.
      size: length of the window.
      stride: step of the window.
      padding: padding before the input.
      input_dilation: distance between the elements of the input; there are gaps between them.
      window_dilation: distance between the positions of the window.
    """
    count = 0
    for offset in range(size):
        for position in range(out):
            # A dilated input has values only at multiples of the dilation.
            index = position * stride + offset * window_dilation - padding
            count += 0 <= index <= (source - 1) * input_dilation and index % input_dilation == 0
    return count
