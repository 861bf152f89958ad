"""Counts the matrix products and the memory traffic of a compiled program from its text, once per iteration of a loop.

XLA's own analysis cannot see inside Pallas kernels. This module adds the products of splash attention.
"""

import collections
import functools
import math
import re

from alignvlm_jax.parallel.hlo import Instruction, Program, parameters, parse_shapes

# Opcodes that only name, group or reinterpret memory. The bodies of loops and branches are counted separately.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "iota", "copy-start", "copy-done", "async-start", "async-done", "opt-barrier",
)  # fmt: skip
# Matrix products in each kernel of splash attention. One product takes 2 * h FLOPs per query, key and head of width h.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


def flops(program: Program) -> dict[str, float]:
    """Floating-point operations of matrix products by op_name, including those inside attention kernels."""
    total = collections.defaultdict(float)
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        for instruction in body.values():
            # XLA writes matrix products as dots or convolutions, inside and outside of fusions.
            if instruction.opcode in ("dot", "convolution"):
                operands = [body[operand].shapes[0][1] for operand in instruction.operands[:2]]
                total[instruction.op_name] += times * _product_flops(instruction, *operands)
            elif instruction.opcode == "custom-call" and "splash" in instruction.name:
                origin = _origin(body, instruction)
                total[origin] += times * _splash_flops(instruction, is_causal="language" in origin)
    return dict(total)


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
    # Computations of fusions: their instructions do not run on their own.
    fused = {
        callee
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode == "fusion"
        for callee in [instruction.attribute("calls")]
    }
    total = 0.0
    for name, times in program.runs.items():
        if name in fused:
            continue  # values inside a fusion stay in registers; `_moved` counts its operands and its result
        body = program.computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode not in _FREE:
                total += times * _moved(program, body, instruction)
    return total


def largest_buffers(program: Program, count: int) -> list[tuple[float, str, str]]:
    """Returns the largest results of single instructions as (bytes, shape, origin), each shape once."""
    best = {}
    for name in program.runs:
        for instruction in program.computations.get(name, {}).values():
            if instruction.opcode in _FREE or len(instruction.shapes) > 1:
                continue
            dtype, shape = instruction.shapes[0]
            label = f"{dtype}[{','.join(map(str, shape))}]"
            origin = _module_path(instruction.op_name) or instruction.opcode
            best.setdefault(label, (instruction.size, label, origin))
    return sorted(best.values(), reverse=True)[:count]


def _moved(program: Program, body: dict[str, Instruction], instruction: Instruction) -> float:
    """Bytes that one run of an instruction reads and writes."""
    inner = program.computations.get(instruction.attribute("calls") or "", {})
    # A slice is read and then written. So is an update; the rest of its buffer is reused without being moved.
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * instruction.size
    if instruction.opcode == "dynamic-update-slice":
        return 2 * body[instruction.operands[1]].size
    if not inner:
        return instruction.size + sum(body[name].size for name in instruction.operands if name in body)
    # A fusion: its result, or the part of it that is written in place, then each operand.
    moved = instruction.size
    root = program.roots[instruction.attribute("calls")]
    if root.opcode == "dynamic-update-slice":
        moved = inner[root.operands[1]].size
    for parameter in parameters(inner):
        users = [i for i in inner.values() if parameter.name in i.operands]
        if users and all(i.opcode == "dynamic-slice" and i.operands[0] == parameter.name for i in users):
            moved += sum(user.size for user in users)
        # The buffer that the root updates in place is not read.
        elif not (root.opcode == "dynamic-update-slice" and users == [root]):
            moved += parameter.size
    return moved


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


def _splash_flops(instruction: Instruction, *, is_causal: bool) -> float:
    """Floating-point operations of one run of a splash-attention kernel."""
    kind = re.search(r"splash_\w+?_(fwd|dkv|dq)", instruction.name).group(1)
    # The result with the most axes and elements is [..., heads, length, width]. The others are softmax statistics.
    shape = max((shape for _, shape in instruction.shapes), key=lambda shape: (len(shape), math.prod(shape)))
    *rows, heads, length, width = shape
    if kind == "dkv":
        # Its results have only the key-value heads. The shapes of its operands show the number of query heads.
        head_shapes = [s for s in _operand_shapes(instruction) if len(s) >= 3 and s[-2:] == shape[-2:]]
        heads = max((s[-3] for s in head_shapes), default=heads)
    # The causal kernel skips the blocks above the diagonal, about half of all.
    pairs = length * length * (0.5 if is_causal else 1.0)
    return 2.0 * _SPLASH[kind] * math.prod(rows) * heads * pairs * width


def _operand_shapes(instruction: Instruction) -> list[tuple[int, ...]]:
    layouts = instruction.attributes.partition("operand_layout_constraints=")[2].partition("}}")[0]
    return [shape for _, shape in parse_shapes(layouts)]
