"""Parses the text of a compiled program: its computations, their instructions, and how often each computation runs.

`compiled.cost_analysis()` counts the body of a loop once. The models consist of loops (over layers, blocks of the
vocabulary and microbatches), so this module counts the body of a loop once per iteration. The number of iterations is
read from the text of the loop. If it depends on the data (as for the chunks of answers in the loss), the caller must
provide it.

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
from collections.abc import Callable, Iterator

# Bytes of one element, for the dtypes whose name does not end with their number of bits.
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique within the computation.
      shapes: dtype and dimensions of the result, one pair for each element of a tuple.
      opcode: "fusion", "while", "all-gather", ...
      operands: names of other instructions.
      attributes: the rest of the line; for constants and parameters, the text in the parentheses.
      is_root: whether the computation returns the result of this instruction.
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
        return sum(array_bytes(dtype, shape) for dtype, shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """Returns the value of an attribute that is a single word, such as the name of a computation, without its %."""
        match = re.search(rf"\b{name}=%?([^,\s{{}}]+)", self.attributes)
        return match and match.group(1)

    @property
    def op_name(self) -> str:
        """Origin in the Python program: "jit(step)/.../layers/mlp/up/dot_general"; "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


class Program:
    """A compiled (scheduled, partitioned) program, as one device runs it.

    Attributes:
      computations: the instructions of each computation, by the names of both.
      entry: name of the computation where the program starts.
      roots: the instruction whose result each computation returns, or None.
    """

    def __init__(self, text: str, *, trips: Callable[[str], float] = lambda op_name: 1.0):
        """Parses the text of a program.

        Args:
          text: the value of `compiled.as_text()`.
          trips: returns the number of iterations of a loop, given its op_name, if that number depends on the data.
        """
        self._trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        # The metadata of a Pallas kernel contain line breaks. Join these lines, so that an instruction is one line.
        for line in text.replace('\n"', ' "').replace("\n}}", "}}").splitlines():
            # "%name (parameters) -> type {" or "ENTRY %name ... {" starts a computation, and "}" ends it.
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
        # The loop of each loop body, with the name of the computation that contains the loop.
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
        """Number of runs of each computation in one step. The computation of a fusion runs as often as the fusion."""
        order, seen = [], set()  # order is a postorder of the call graph: callees before their callers

        def visit(name):
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for callee, _ in self._calls(name):
                visit(callee)
            order.append(name)

        visit(self.entry)
        # Reversed, callers come before their callees, so a count is complete before it is used.
        runs = collections.defaultdict(float)
        runs[self.entry] = 1.0
        for name in reversed(order):
            for callee, times in self._calls(name):
                runs[callee] += runs[name] * times
        return dict(runs)

    def _calls(self, name: str) -> Iterator[tuple[str, float]]:
        """Yields each computation that another one calls, and how often."""
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                times = self.trip_count(name, instruction)
                yield instruction.attribute("body"), times
            elif instruction.opcode in ("fusion", "call", "async-start"):
                callee = instruction.attribute("calls") or instruction.attribute("to_apply")
                if callee:
                    yield callee, 1.0
            elif instruction.opcode == "conditional":
                # The data decide which branch runs. Counting all branches gives an upper bound.
                for callee in re.findall(r"(?:true|false)_computation=%([^,\s]+)", instruction.attributes):
                    yield callee, 1.0
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                for callee in branches.group(1).split(",") if branches else ():
                    yield callee.strip().lstrip("%"), 1.0

    def trip_count(self, computation: str, loop: Instruction) -> float:
        """Returns the number of iterations of a loop, from XLA's annotation or from the condition of the loop."""
        known = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return float(known.group(1))
        # Without XLA's annotation, find the start of the counter and its bound in the text.
        comparison = self._loop_condition(loop.attribute("condition"))
        if comparison is not None:
            counter, bound = comparison
            start = self._integer_value(computation, self._initial_value(computation, loop, counter))
            if not isinstance(bound, int):
                bound = self._integer_value(computation, self._initial_value(computation, loop, bound[0]))
            if bound is not None:
                return float(max(0, bound - (start or 0)))
        return self._trips(loop.op_name)

    def _loop_condition(self, name: str) -> tuple[int, int | tuple[int]] | None:
        """Parses a condition `counter < bound`.

        Returns:
          The index of the counter in the tuple that the loop carries, and the bound: a number, or a 1-tuple with the
          index of the bound in that tuple. None if the condition has another form.
        """
        body, root = self.computations[name], self.roots[name]

        # Skips operations that only copy or convert a value.
        def follow(name):
            instruction = body.get(name)
            while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
                instruction = body.get(instruction.operands[0])
            return instruction

        comparison, operands = root, [follow(operand) for operand in root.operands]
        if root.opcode == "fusion":
            # The comparison is inside the fusion. Replace the fusion's parameters by the operands outside of it.
            inner = self.computations[root.attribute("calls")]
            comparison = self.roots[root.attribute("calls")]
            parameter_numbers = {i.name: int(re.search(r"\d+", i.attributes).group()) for i in parameters(inner)}
            operands = [
                follow(root.operands[parameter_numbers[operand]])
                if operand in parameter_numbers
                else inner.get(operand)
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

    def _initial_value(self, computation: str, loop: Instruction, index: int) -> str | None:
        """Returns the name of the instruction that computes the initial value of one element of a loop's carry."""
        start = self.computations[computation].get(loop.operands[0])
        return start.operands[index] if start and start.opcode == "tuple" else None

    def _integer_value(self, computation: str, name: str | None) -> int | None:
        """Returns the integer that an instruction evaluates to, or None if the text does not show it.

        A value carried by an enclosing loop is assumed to keep its initial value.
        """
        instruction = self.computations[computation].get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return int(instruction.attributes) if re.fullmatch(r"-?\d+", instruction.attributes) else None
        if instruction.opcode in ("copy", "bitcast", "convert"):
            return self._integer_value(computation, instruction.operands[0])
        if instruction.opcode == "get-tuple-element" and computation in self._while_of_body:
            outer, loop = self._while_of_body[computation]
            return self._integer_value(outer, self._initial_value(outer, loop, int(instruction.attribute("index"))))
        return None


def _parse(line: str) -> Instruction:
    """Parses a line such as `ROOT %c = f32[2,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}`."""
    name, rest = line.split(" = ", 1)
    is_root = "ROOT " in name
    name = name.replace("ROOT", "").strip().lstrip("%")
    # The shape of a tuple is in parentheses and contains spaces.
    end = _closing_parenthesis(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    # "opcode(operands), attributes"
    opcode, rest = rest.split("(", 1)
    end = _closing_parenthesis("(" + rest) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    # The value of a constant and the number of a parameter are in the parentheses.
    if opcode in ("constant", "parameter"):
        attributes = inside
    return Instruction(name, parse_shapes(shape), opcode, operands, attributes, is_root)


def _closing_parenthesis(text: str) -> int:
    """Returns the index of the parenthesis that closes the one at the start of the text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def parse_shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the dtype and the dimensions of every array in a text such as "(f32[2,3], pred[])"."""
    matches = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return tuple((dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in matches)


def array_bytes(dtype: str, shape: tuple[int, ...]) -> float:
    """Bytes of an array; 0 if the dtype is unknown."""
    width = _BYTES.get(dtype)
    if width is None:
        bits = re.search(r"\d+", dtype)
        width = int(bits.group()) / 8 if bits else 0
    return width * math.prod(shape)


def parameters(body: dict[str, Instruction]) -> list[Instruction]:
    """Returns the parameters of a computation, in no particular order."""
    return [instruction for instruction in body.values() if instruction.opcode == "parameter"]
