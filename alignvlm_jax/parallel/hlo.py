"""What a compiled program does, read off its text: products, traffic, collectives, each as often as its loops run.

`compiled.cost_analysis()` counts the body of a loop once, and knows nothing of what happens inside a Pallas kernel. The
models are loops (over layers, over blocks of the vocabulary, over microbatches), so here every instruction is counted
as often as the loops around it run. How often that is is read off a loop's condition; where only the data decide (the
loss's chunks of answers), the caller must say.

    program = Program(compiled.as_text(), trips=lambda op_name: 4)
    program.flops(), program.bytes_moved(), program.collectives(slice_of_device)

What goes from slice to slice is not written as collectives but as messages to the host, which reduces or spreads them:
`_between_slices` says what they stand for. Collectives that XLA takes apart to overlap them with other work appear
several times in the text, as parts of one chain: each is counted where it starts.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What only names, groups or reinterprets memory.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "iota", "copy-start", "copy-done", "async-start", "async-done", "opt-barrier",
)  # fmt: skip
# Matrix products of h-wide heads per query, key and head, for each of the kernels of splash attention.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: in its computation.
      shapes: dtype and dimensions of the result, one pair for each part of a tuple.
      opcode: "fusion", "while", "all-gather", ...
      operands: names.
      attributes: the rest of the line.
      is_root: whether it is what its computation returns.
    """

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum(_size(dtype, shape) for dtype, shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The computation or other single word that an attribute names, without its %."""
        found = re.search(rf"\b{name}=%?([^,\s{{}}]+)", self.attributes)
        return found and found.group(1)

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from: "jit(step)/.../layers/mlp/up/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


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


class Program:
    """The text of a compiled (scheduled, partitioned) program, as one device runs it."""

    def __init__(self, text: str, *, trips: Callable[[str], float] = lambda op_name: 1.0):
        """Args:
        text: `compiled.as_text()`.
        trips: how often a loop runs whose end is in the data; asked with its op_name.
        """
        self._trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        # The metadata of a Pallas kernel has line breaks in it.
        for line in text.replace('\n"', ' "').replace("\n}}", "}}").splitlines():
            if line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations.setdefault(name, {})
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith("}"):
                current = None
            elif current is not None and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        self._while_of_body = {
            instruction.attribute("body"): (name, instruction)
            for name, body in self.computations.items()
            for instruction in body.values()
            if instruction.opcode == "while"
        }
        self._roots = {
            name: next((i for i in body.values() if i.is_root), None) for name, body in self.computations.items()
        }

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in a step; those inside fusions as often as the fusion."""
        order, seen = [], set()

        def visit(name):
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for callee, _ in self._calls(name):
                visit(callee)
            order.append(name)

        visit(self.entry)
        runs = collections.defaultdict(float)
        runs[self.entry] = 1.0
        for name in reversed(order):
            for callee, times in self._calls(name):
                runs[callee] += runs[name] * times
        return dict(runs)

    def _calls(self, name: str):
        """The computations that one calls, with how often."""
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                times = self.trip_count(name, instruction)
                yield instruction.attribute("body"), times
            elif instruction.opcode in ("fusion", "call", "async-start"):
                callee = instruction.attribute("calls") or instruction.attribute("to_apply")
                if callee:
                    yield callee, 1.0
            elif instruction.opcode == "conditional":
                for callee in re.findall(r"(?:true|false)_computation=%([^,\s]+)", instruction.attributes):
                    yield callee, 1.0
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                for callee in branches.group(1).split(",") if branches else ():
                    yield callee.strip().lstrip("%"), 1.0

    def trip_count(self, computation: str, loop: Instruction) -> float:
        """How often a loop runs: what XLA knows, else what its condition compares the counter with."""
        known = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return float(known.group(1))
        compared = self._condition(loop.attribute("condition"))
        if compared is not None:
            counter, bound = compared
            start = self._value(computation, self._carried(computation, loop, counter))
            if not isinstance(bound, int):
                bound = self._value(computation, self._carried(computation, loop, bound[0]))
            if bound is not None:
                return float(max(0, bound - (start or 0)))
        return self._trips(loop.op_name)

    def _condition(self, name: str) -> tuple[int, int | tuple[int]] | None:
        """Of a condition `counter < bound`: which part of what the loop carries counts, and the bound: a number, or (in
        a tuple) which part it is."""
        body, root = self.computations[name], self._roots[name]

        def follow(name):
            found = body.get(name)
            while found and found.opcode in ("copy", "bitcast", "convert"):
                found = body.get(found.operands[0])
            return found

        comparison, operands = root, [follow(operand) for operand in root.operands]
        if root.opcode == "fusion":
            inner = self.computations[root.attribute("calls")]
            comparison = self._roots[root.attribute("calls")]
            numbered = {i.name: int(re.search(r"\d+", i.attributes).group()) for i in _parameters(inner)}
            operands = [
                follow(root.operands[numbered[operand]]) if operand in numbered else inner.get(operand)
                for operand in comparison.operands
            ]
        if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes or None in operands:
            return None
        left, right = operands
        if left.opcode != "get-tuple-element":
            return None
        counter = int(left.attribute("index"))
        if right.opcode == "constant":
            return counter, int(right.attributes)
        return (counter, (int(right.attribute("index")),)) if right.opcode == "get-tuple-element" else None

    def _carried(self, computation: str, loop: Instruction, index: int) -> str | None:
        """The name of what a loop starts with at one place of what it carries."""
        start = self.computations[computation].get(loop.operands[0])
        return start.operands[index] if start and start.opcode == "tuple" else None

    def _value(self, computation: str, name: str | None) -> int | None:
        """The whole number that an instruction has, if it can be told; what an outer loop carries is taken to stay."""
        found = self.computations[computation].get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            return int(found.attributes) if re.fullmatch(r"-?\d+", found.attributes) else None
        if found.opcode in ("copy", "bitcast", "convert"):
            return self._value(computation, found.operands[0])
        if found.opcode == "get-tuple-element" and computation in self._while_of_body:
            outer, loop = self._while_of_body[computation]
            return self._value(outer, self._carried(outer, loop, int(found.attribute("index"))))
        return None

    def flops(self) -> dict[str, float]:
        """Floating-point operations of matrix products by op_name, those inside attention kernels included."""
        total = collections.defaultdict(float)
        for name, times in self.runs.items():
            body = self.computations.get(name, {})
            for instruction in body.values():
                if instruction.opcode in ("dot", "convolution"):
                    operands = [body[operand].shapes[0][1] for operand in instruction.operands[:2]]
                    total[instruction.op_name] += times * _product_flops(instruction, *operands)
                elif instruction.opcode == "custom-call" and "splash" in instruction.name:
                    total[instruction.op_name] += times * _splash_flops(instruction)
        return dict(total)

    def kernels(self) -> dict[str, float]:
        """The Pallas kernels in the program, as "part of the model: kernel", with how often each runs."""
        found = collections.defaultdict(float)
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, {}).values():
                if '"tpu_custom_call"' in instruction.attributes:
                    kernel = re.sub(r"\.\d+$", "", instruction.name)
                    found[f"{_part(instruction.op_name).split('/')[0]}: {kernel}"] += times
        return dict(found)

    def bytes_moved(self) -> float:
        """Bytes between memory and the cores: operands and results of whatever runs by itself.

        Of an operand that is only sliced, the slice; of a result that is written in place, what is written.
        """
        fused = {
            callee
            for body in self.computations.values()
            for instruction in body.values()
            if instruction.opcode == "fusion"
            for callee in [instruction.attribute("calls")]
        }
        total = 0.0
        for name, times in self.runs.items():
            if name in fused:
                continue
            body = self.computations.get(name, {})
            for instruction in body.values():
                if instruction.opcode not in _FREE:
                    total += times * self._moved(body, instruction)
        return total

    def _moved(self, body: dict[str, Instruction], instruction: Instruction) -> float:
        inner = self.computations.get(instruction.attribute("calls") or "", {})
        if instruction.opcode in ("dynamic-slice", "gather"):
            return 2 * instruction.size
        if instruction.opcode == "dynamic-update-slice":
            return 2 * body[instruction.operands[1]].size
        if not inner:
            return instruction.size + sum(body[name].size for name in instruction.operands if name in body)
        moved = instruction.size
        root = self._roots[instruction.attribute("calls")]
        if root.opcode == "dynamic-update-slice":
            moved = inner[root.operands[1]].size
        for parameter in _parameters(inner):
            users = [i for i in inner.values() if parameter.name in i.operands]
            if users and all(i.opcode == "dynamic-slice" and i.operands[0] == parameter.name for i in users):
                moved += sum(user.size for user in users)
            elif not (root.opcode == "dynamic-update-slice" and users == [root]):
                moved += parameter.size
        return moved

    def collectives(self, slice_of_device: Sequence[int]) -> list[Collective]:
        """All collectives.

        Args:
          slice_of_device: for each device, in the mesh's order, the slice it belongs to.
        """
        found = []
        for name, times in self.runs.items():
            body = self.computations.get(name, {})
            started = {
                operand for i in body.values() if '"AsyncCollectiveStart"' in i.attributes for operand in i.operands
            }
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
                whole = sum(_size(*shape) for shape in shapes)
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

    def largest_buffers(self, count: int) -> list[tuple[float, str, str]]:
        """The largest results of single instructions: bytes, shape and where they come from, each shape once."""
        best = {}
        for name in self.runs:
            for instruction in self.computations.get(name, {}).values():
                if instruction.opcode in _FREE or len(instruction.shapes) > 1:
                    continue
                dtype, shape = instruction.shapes[0]
                label = f"{dtype}[{','.join(map(str, shape))}]"
                origin = _part(instruction.op_name) or instruction.opcode
                best.setdefault(label, (instruction.size, label, origin))
        return sorted(best.values(), reverse=True)[:count]


def _parse(line: str) -> Instruction:
    name, rest = line.split(" = ", 1)
    is_root = "ROOT " in name
    name = name.replace("ROOT", "").strip().lstrip("%")
    end = _matching(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    end = _matching("(" + rest) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if opcode in ("constant", "parameter"):
        attributes = inside
    return Instruction(name, _shapes(shape), opcode, operands, attributes, is_root)


def _matching(text: str) -> int:
    """The place of the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple((dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in found)


def _size(dtype: str, shape: tuple[int, ...]) -> float:
    width = _BYTES.get(dtype)
    if width is None:
        bits = re.search(r"\d+", dtype)
        width = int(bits.group()) / 8 if bits else 0
    return width * math.prod(shape)


def _parameters(body: dict[str, Instruction]) -> list[Instruction]:
    return [instruction for instruction in body.values() if instruction.opcode == "parameter"]


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
    return [shape for _, shape in _shapes(layouts)]


def _between_slices(message: Instruction) -> tuple[str, float]:
    """Which collective a message to the host is part of, and the bytes that this device sends for it."""
    kind = re.search(r'transfer_type="(\w+)"', message.attributes).group(1)
    size = _size(*message.shapes[0])
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
