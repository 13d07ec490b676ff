"""The text of a compiled program (`compiled.as_text()`), read: what runs, how often, and on what.

HLO is a list of computations; a `while`, a fusion or a call names others. A loop's body runs as
often as its trip count says, where the program does; the caller gives the others.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ITEM_BYTES = {
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4"), 1),
    **dict.fromkeys(("f8e4m3fn", "f8e4m3", "f8e5m2", "f8e8m0fnu", "f8e4m3b11fnuz"), 1),
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)|called_computations=\{([^}]*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Fields:
        name, op: as HLO calls them ("all-gather-start", "fusion", ...).
        type: its result's type; a tuple's in parentheses.
        operands: names of the instructions it reads.
        attributes: what stands behind the operands.
        literal: of a constant, its value.
    """

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @property
    def source(self) -> str:
        """The JAX operation it comes from, as in "jit(train_step)/while/..."; "" if unknown."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs: a fusion's, a call's; of a `while`, condition and body."""
        if self.op == "while":
            return tuple(re.findall(r"(?:condition|body)=%?([\w.\-]+)", self.attributes))
        if self.op == "conditional":
            found = _BRANCHES.findall(self.attributes)
        else:
            found = _CALLS.findall(self.attributes)
        names = [name for pair in found for part in pair for name in part.split(",")]
        return tuple(name.strip().lstrip("%") for name in names if name.strip())


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations, each a list in the order they are scheduled in."""

    computations: dict[str, list[Instruction]]
    entry: str
    is_scheduled: bool

    def types(self, computation: str) -> dict[str, str]:
        """The type of every instruction of a computation, by its name."""
        return {each.name: each.type for each in self.computations[computation]}

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` loops, where the program says so; else None.

        XLA for GPUs and CPUs writes it. That for TPUs does not: there it follows from a constant
        that the condition compares a counter with, and from one that the body adds to the counter,
        which begins at 0. XLA's own loops around collectives go two steps at a time.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition, body = (self.computations.get(name, []) for name in loop.called)
        if not condition or condition[-1].op != "compare" or "=LT" not in condition[-1].attributes:
            return None
        read, made = ({each.name: each for each in part} for part in (condition, body))
        counter, limit = (read.get(name) for name in condition[-1].operands)
        place = re.search(r"\bindex=(\d+)", counter.attributes) if counter else None
        if limit is None or not limit.literal.isdigit() or place is None or not body:
            return None
        after = body[-1].operands[int(place[1]) :] if body[-1].op == "tuple" else ()
        counted = made.get(after[0]) if after else None
        if counted is None or counted.op != "add":
            return None
        added = [made[name].literal for name in counted.operands if name in made]
        steps = [int(text) for text in added if text.isdigit() and int(text)]
        return -(-int(limit.literal) // steps[0]) if len(steps) == 1 else None


@dataclass(frozen=True)
class Loop:
    """A `while` of the program.

    Fields:
        source: the JAX operation it comes from.
        body: the computation.
        trips: how often it is counted.
        known: whether the program says that count; else it is the caller's, or 1.
        runs: how often the loop itself is entered.

    Both are whole, but where the caller gave a mean.
    """

    source: str
    body: str
    trips: float
    known: bool
    runs: float


def parse(text: str) -> Program:
    """The program of a compiled module's text; ValueError for text without an entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            current = None
            if head is not None:
                current = computations.setdefault(head["name"], [])
                entry = head["name"] if head["entry"] else entry
            continue
        found = None if current is None else _INSTRUCTION.match(line)
        if current is not None and found is not None:
            operands, attributes = _split(found["rest"])
            names = tuple(_OPERAND.findall(operands))
            literal = operands if found["op"] == "constant" else ""
            current.append(
                Instruction(found["name"], found["op"], found["type"], names, attributes, literal)
            )
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Program(computations, entry, "is_scheduled=true" in text[:4000])


def executions(
    program: Program, trips: Mapping[str, float] | None = None
) -> tuple[dict[str, float], list[Loop]]:
    """How often each computation runs in one run of the program, and its loops, outermost first.

    `trips` gives the count of loops whose trip count is data, by a regular expression that is found
    in their `source`; of several, the longest. A loop that nothing tells about counts once. Both
    branches of a conditional count.
    """
    counts: dict[str, float] = defaultdict(float)
    loops: list[Loop] = []

    def told(source: str) -> float:
        matching = [part for part in trips or {} if re.search(part, source)]
        return (trips or {})[max(matching, key=len)] if matching else 1

    def run(name: str, times: float) -> None:
        counts[name] += times
        for each in program.computations.get(name, ()):
            if each.op == "while":
                known = program.trip_count(each)
                count = told(each.source) if known is None else known
                loops.append(Loop(each.source, each.called[-1], count, known is not None, times))
                for called in each.called:
                    run(called, times * count)
            else:
                for called in each.called:
                    run(called, times)

    run(program.entry, 1)
    return counts, loops


def num_bytes(type_: str) -> int:
    """Bytes of all arrays in a type; layouts and tuples are understood, tokens take none."""
    return sum(ITEM_BYTES.get(kind, 0) * size for kind, size in arrays(type_))


def arrays(type_: str) -> Iterator[tuple[str, int]]:
    """(dtype, number of elements) of every array in a type."""
    for kind, dims in _ARRAY.findall(_LAYOUT.sub("", type_)):
        yield kind, math.prod(int(size) for size in dims.split(",") if size)


def shape(type_: str) -> tuple[int, ...]:
    """The dims of a type's first array; () for none."""
    found = _ARRAY.search(type_)
    return tuple(int(size) for size in found[2].split(",") if size) if found else ()


def product_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a matrix product (a multiply-add is two): dot, convolution or cuBLAS call; else 0.

    A convolution is counted as the product that XLA:TPU makes it of: output times contracted
    features, batch dims being spatial labels that all three share.
    """
    if instruction.op == "dot" or "__cublas" in instruction.attributes:
        pattern = r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([\d",\s]*)[\]}]'
        contracted = re.search(pattern, instruction.attributes)
        if contracted is None or not instruction.operands:
            return 0.0
        lhs = shape(types.get(instruction.operands[0], ""))
        dims = [int(dim) for dim in re.findall(r"\d+", contracted[1])]
        if any(dim >= len(lhs) for dim in dims):
            return 0.0
        return 2.0 * math.prod(shape(instruction.type)) * math.prod(lhs[dim] for dim in dims)
    if instruction.op == "convolution":
        return _convolution_flops(instruction, types)
    return 0.0


def _convolution_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    if labels is None or len(instruction.operands) < 2:
        return 0.0
    lhs, rhs = (shape(types.get(name, "")) for name in instruction.operands[:2])
    out = shape(instruction.type)
    if not lhs or not rhs:
        return 0.0
    batch = 1
    for letter in set(labels[2]) - set("io"):
        places = [part.find(letter) for part in labels.groups()]
        if min(places) < 0:
            continue
        sizes = {dims[place] for dims, place in zip((lhs, rhs, out), places)}
        batch *= sizes.pop() if len(sizes) == 1 else 1
    return 2.0 * math.sqrt(math.prod(lhs) * math.prod(rhs) * math.prod(out) / batch)


def _split(rest: str) -> tuple[str, str]:
    """Operands and attributes of what stands behind an instruction's opening parenthesis."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""
