"""The text of a compiled program: its computations, their instructions, and how often each of them runs.

`compiled.cost_analysis()` counts the body of a loop once. The models are loops (over layers, over blocks of the
vocabulary, over microbatches), so here a computation runs as often as the loops around it. How often that is is read
off a loop's condition; where only the data decide (the loss's chunks of answers), the caller must say.

    program = Program(compiled.as_text(), trips=lambda op_name: 4)
    program.runs                                                   # {"region_3.12": 28.0, ...}
    hlo_work.flops(program), hlo_work.bytes_moved(program)
    hlo_collectives.collectives(program, slice_of_device)
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}


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
        return sum(size_of(dtype, shape) for dtype, shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The computation or other single word that an attribute names, without its %."""
        found = re.search(rf"\b{name}=%?([^,\s{{}}]+)", self.attributes)
        return found and found.group(1)

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from: "jit(step)/.../layers/mlp/up/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Program:
    """The text of a compiled (scheduled, partitioned) program, as one device runs it.

    Attributes:
      computations: of each, its instructions, both by name.
      entry: the name of the computation that is run.
      roots: of each computation, the instruction that it returns; None if there is none.
    """

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
        self.roots = {
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
        body, root = self.computations[name], self.roots[name]

        def follow(name):
            found = body.get(name)
            while found and found.opcode in ("copy", "bitcast", "convert"):
                found = body.get(found.operands[0])
            return found

        comparison, operands = root, [follow(operand) for operand in root.operands]
        if root.opcode == "fusion":
            inner = self.computations[root.attribute("calls")]
            comparison = self.roots[root.attribute("calls")]
            numbered = {i.name: int(re.search(r"\d+", i.attributes).group()) for i in parameters(inner)}
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
    return Instruction(name, shapes_in(shape), opcode, operands, attributes, is_root)


def _matching(text: str) -> int:
    """The place of the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def shapes_in(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The dtypes and dimensions of all arrays that a text names: "(f32[2,3], pred[])"."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple((dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in found)


def size_of(dtype: str, shape: tuple[int, ...]) -> float:
    """Bytes of an array."""
    width = _BYTES.get(dtype)
    if width is None:
        bits = re.search(r"\d+", dtype)
        width = int(bits.group()) / 8 if bits else 0
    return width * math.prod(shape)


def parameters(body: dict[str, Instruction]) -> list[Instruction]:
    """What a computation is given, in no certain order."""
    return [instruction for instruction in body.values() if instruction.opcode == "parameter"]
