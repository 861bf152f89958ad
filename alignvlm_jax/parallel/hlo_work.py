"""What a compiled program does, read off its text: products and traffic, each as often as its loops run.

XLA's own analysis also knows nothing of what happens inside a Pallas kernel: the products of splash attention are
added here.
"""

import collections
import functools
import math
import re

from alignvlm_jax.parallel.hlo import Instruction, Program, parameters, shapes_in

# What only names, groups or reinterprets memory.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "iota", "copy-start", "copy-done", "async-start", "async-done", "opt-barrier",
)  # fmt: skip
# Matrix products of h-wide heads per query, key and head, for each of the kernels of splash attention.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


def flops(program: Program) -> dict[str, float]:
    """Floating-point operations of matrix products by op_name, those inside attention kernels included."""
    total = collections.defaultdict(float)
    for name, times in program.runs.items():
        body = program.computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode in ("dot", "convolution"):
                operands = [body[operand].shapes[0][1] for operand in instruction.operands[:2]]
                total[instruction.op_name] += times * _product_flops(instruction, *operands)
            elif instruction.opcode == "custom-call" and "splash" in instruction.name:
                total[instruction.op_name] += times * _splash_flops(instruction)
    return dict(total)


def kernels(program: Program) -> dict[str, float]:
    """The Pallas kernels in the program, as "part of the model: kernel", with how often each runs."""
    found = collections.defaultdict(float)
    for name, times in program.runs.items():
        for instruction in program.computations.get(name, {}).values():
            if '"tpu_custom_call"' in instruction.attributes:
                kernel = re.sub(r"\.\d+$", "", instruction.name)
                found[f"{_part(instruction.op_name).split('/')[0]}: {kernel}"] += times
    return dict(found)


def bytes_moved(program: Program) -> float:
    """Bytes between memory and the cores: operands and results of whatever runs by itself.

    Of an operand that is only sliced, the slice; of a result that is written in place, what is written.
    """
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
            continue
        body = program.computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode not in _FREE:
                total += times * _moved(program, body, instruction)
    return total


def largest_buffers(program: Program, count: int) -> list[tuple[float, str, str]]:
    """The largest results of single instructions: bytes, shape and where they come from, each shape once."""
    best = {}
    for name in program.runs:
        for instruction in program.computations.get(name, {}).values():
            if instruction.opcode in _FREE or len(instruction.shapes) > 1:
                continue
            dtype, shape = instruction.shapes[0]
            label = f"{dtype}[{','.join(map(str, shape))}]"
            origin = _part(instruction.op_name) or instruction.opcode
            best.setdefault(label, (instruction.size, label, origin))
    return sorted(best.values(), reverse=True)[:count]


def _moved(program: Program, body: dict[str, Instruction], instruction: Instruction) -> float:
    inner = program.computations.get(instruction.attribute("calls") or "", {})
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * instruction.size
    if instruction.opcode == "dynamic-update-slice":
        return 2 * body[instruction.operands[1]].size
    if not inner:
        return instruction.size + sum(body[name].size for name in instruction.operands if name in body)
    moved = instruction.size
    root = program.roots[instruction.attribute("calls")]
    if root.opcode == "dynamic-update-slice":
        moved = inner[root.operands[1]].size
    for parameter in parameters(inner):
        users = [i for i in inner.values() if parameter.name in i.operands]
        if users and all(i.opcode == "dynamic-slice" and i.operands[0] == parameter.name for i in users):
            moved += sum(user.size for user in users)
        elif not (root.opcode == "dynamic-update-slice" and users == [root]):
            moved += parameter.size
    return moved


def _part(op_name: str) -> str:
    """The modules an instruction comes from, without what jax wraps around them."""
    words = re.sub(r"jit\([^)]*\)|[()]", "/", op_name).split("/")
    dull = "while body cond closed_call shard_map jvp transpose checkpoint rematted_computation".split()
    return "/".join(word for word in words if word and word not in dull and not word.startswith("AlignVLM"))


def _product_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    out = instruction.shapes[0][1]
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    of_left, of_right, of_out = ({label: size for label, size in zip(*pair, strict=True)} for pair in zip(
        labels, (left, right, out), strict=True
    ))  # fmt: skip
    products = of_out["b"] * of_out["f"] * of_right["i"]
    for axis, window in enumerate(_windows(instruction.attributes)):
        products *= _valid(of_left[str(axis)], of_out[str(axis)], **window)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * products / (int(groups.group(1)) if groups else 1)


def _windows(attributes: str) -> list[dict[str, int]]:
    """The window of a convolution along each spatial axis: "size=1x2 pad=0_0x1_1 rhs_reversal=0x1"."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}
    if not fields:
        return []
    sizes = fields["size"].split("x")

    def values(name, default):
        return fields[name].split("x") if name in fields else [default] * len(sizes)

    return [
        dict(size=int(size), stride=int(stride), low=int(pad.split("_")[0]), spread=int(spread), dilate=int(dilate))
        for size, stride, pad, spread, dilate in zip(
            sizes,
            values("stride", 1),
            values("pad", "0_0"),
            values("lhs_dilate", 1),
            values("rhs_dilate", 1),
            strict=True,
        )
    ]


@functools.cache
def _valid(source: int, out: int, size: int, stride: int, low: int, spread: int, dilate: int) -> int:
    """How many pairs of an output and a place of the window meet a real input: what XLA writes as convolutions are
    often matrix products, with windows of which one place meets anything."""
    count = 0
    for place in range(size):
        for position in range(out):
            index = position * stride + place * dilate - low
            count += 0 <= index <= (source - 1) * spread and index % spread == 0
    return count


def _splash_flops(instruction: Instruction) -> float:
    """Of one run of a kernel of splash attention. Its causal form skips blocks above the diagonal: half of them."""
    kind = re.search(r"splash_\w+?_(fwd|dkv|dq)", instruction.name).group(1)
    shape = max((shape for _, shape in instruction.shapes), key=lambda shape: (len(shape), math.prod(shape)))
    *rows, heads, length, width = shape
    if kind == "dkv":  # its results are as many as key-value heads: the queries' heads are among its operands' shapes
        of_heads = [s for s in _operand_shapes(instruction) if len(s) >= 3 and s[-2:] == shape[-2:]]
        heads = max((s[-3] for s in of_heads), default=heads)
    pairs = length * length * (0.5 if "language" in instruction.op_name else 1.0)
    return 2.0 * _SPLASH[kind] * math.prod(rows) * heads * pairs * width


def _operand_shapes(instruction: Instruction) -> list[tuple[int, ...]]:
    layouts = instruction.attributes.partition("operand_layout_constraints=")[2].partition("}}")[0]
    return [shape for _, shape in shapes_in(layouts)]
