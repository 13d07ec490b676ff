"""What a compiled program takes and moves on each device: FLOPs, collectives, kernels, buffers.

Read from the program that XLA made (`compiled.as_text()`), so that it says what will run rather
than what was meant: which exchange spans which mesh axes, how often, whether it is asynchronous
and what lies between its start and its end.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsv3_jax.analysis.compiled_kernels import is_kernel, kernel_flops, kernel_name
from dsv3_jax.analysis.hlo import (
    Instruction,
    Loop,
    Program,
    executions,
    num_bytes,
    parse,
    product_flops,
)

COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
)
_MESH_GROUPS = re.compile(r"replica_groups=(?:maximal_)?mesh\[(.*?)\](.*?)\{(.*?)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of the program.

    Fields:
        op: all-to-all, all-gather, all-reduce, reduce-scatter, collective-permute, ...
        axes: mesh axes along which the devices of a group differ.
        payload: bytes of its operands on each device.
        sent: bytes that a device sends to others, once.
        runs: how often it runs in the program.
        asynchronous: whether XLA split it into a start and an end.
        flops_inside, kernels_inside: matrix FLOPs and Pallas kernels between start and end.
        source: the JAX operation it comes from.
    """

    op: str
    axes: tuple[str, ...]
    payload: int
    sent: float
    runs: float
    asynchronous: bool
    flops_inside: float
    kernels_inside: int
    source: str

    @property
    def total(self) -> float:
        """Bytes that a device sends in the whole program."""
        return self.sent * self.runs

    @property
    def covered(self) -> bool:
        """Whether a matrix product or a kernel runs while it is under way."""
        return self.flops_inside > 0 or self.kernels_inside > 0


@dataclass(frozen=True)
class Buffer:
    """A large array that the program makes: bytes, HLO type, opcode and the JAX operation."""

    num_bytes: int
    type: str
    op: str
    source: str


@dataclass(frozen=True)
class ProgramReport:
    """What one run of a program does on each device.

    Fields:
        flops: of matrix products that XLA compiled, loop bodies as often as they run.
        kernel_flops: of those inside Pallas kernels, by the shapes that they read.
        kernels: how often each kind of Pallas kernel runs, by its name.
        collectives: every collective; see `Collective`.
        loops: every loop and how often it was counted.
        buffers: the largest arrays, largest first, one of each type and source.
    """

    flops: float
    kernel_flops: float
    kernels: dict[str, float]
    collectives: list[Collective]
    loops: list[Loop]
    buffers: list[Buffer]

    def sent_by_axes(self) -> dict[tuple[tuple[str, ...], str], float]:
        """Bytes that a device sends, by (mesh axes, opcode), most first."""
        total: dict[tuple[tuple[str, ...], str], float] = defaultdict(float)
        for each in self.collectives:
            total[each.axes, each.op] += each.total
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def covered_share(self, op: str) -> float:
        """The share of this opcode's bytes that travel beside a product or kernel; 0 for none."""
        of_op = [each for each in self.collectives if each.op == op]
        total = sum(each.total for each in of_op)
        return sum(each.total for each in of_op if each.covered) / total if total else 0.0


def read_program(
    text: str,
    mesh_shape: Mapping[str, int],
    trips: Mapping[str, float] | None = None,
    num_buffers: int = 12,
) -> ProgramReport:
    """The report of a compiled program's text on a mesh of this shape (axis sizes in order).

    `trips` as in `hlo.executions`. Collectives among one device are left out.
    """
    program = parse(text)
    counts, loops = executions(program, trips)
    fused, wrapped = _called_by(program, "fusion"), _called_by(program, "async-start")
    work = _Work(program)
    flops, of_kernels, kernels = 0.0, 0.0, defaultdict[str, float](float)
    collectives: list[Collective] = []
    buffers: dict[tuple[str, str], Buffer] = {}
    for name, runs in counts.items():
        if not runs or name not in program.computations:
            continue
        types = program.types(name)
        for place, each in enumerate(program.computations[name]):
            flops += runs * product_flops(each, types)
            if is_kernel(each):
                kernels[kernel_name(each)] += runs
                of_kernels += runs * kernel_flops(each, types)
            op = None if name in wrapped else _collective(each, program)
            if op is not None:
                axes, group = groups_of(_attributes(each, program), mesh_shape)
                if group > 1:
                    payload = sum(num_bytes(types.get(operand, "")) for operand in each.operands)
                    sent = payload * _sent_share(op, group)
                    inside = work.between(name, place)
                    asynchronous = each.op.endswith("-start")
                    collectives.append(
                        Collective(
                            op, axes, payload, sent, runs, asynchronous, *inside, each.source
                        )
                    )
            if name not in fused and each.op not in _NO_BUFFER and not each.type.startswith("("):
                buffer = Buffer(num_bytes(each.type), each.type, each.op, each.source)
                buffers.setdefault((each.type, each.op), buffer)
    largest = sorted(buffers.values(), key=lambda buffer: -buffer.num_bytes)[:num_buffers]
    return ProgramReport(flops, of_kernels, dict(kernels), collectives, loops, largest)


_NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call")


def groups_of(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which a collective's devices differ, devices in a group).

    Understands the forms XLA writes: groups by mesh axes, by iota, listed, and pairs. Without any,
    all devices are one group.
    """
    if (pairs := _PAIRS.search(attributes + ",")) is not None:
        found = re.findall(r"(\d+),(\d+)", pairs[1])
        if all(source == target for source, target in found):
            return (), 1
        axes = set().union(*(_differing([int(n) for n in pair], mesh_shape) for pair in found))
        return tuple(axis for axis in mesh_shape if axis in axes), 2
    first = _first_group(attributes)
    if first is None:
        first = list(range(math.prod(mesh_shape.values())))
    return tuple(_differing(first, mesh_shape)), len(first)


def _first_group(attributes: str) -> list[int] | None:
    if (by_mesh := _MESH_GROUPS.search(attributes)) is not None:
        return _group_by_mesh(by_mesh)
    if (iota := _IOTA_GROUPS.search(attributes)) is not None:
        count, size = int(iota[1]), int(iota[2])
        ids = np.arange(count * size).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(count, size)[0].tolist()
    if (listed := _LISTED_GROUPS.search(attributes)) is not None:
        return [int(n) for n in listed[1].split(",")]
    return None


def _group_by_mesh(found: re.Match[str]) -> list[int]:
    """The first group of `mesh['a'=2,'b'=4], device_ids=(...) {'a', 'b':(1)2}`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", found[0])
    if order is not None:
        ids = ids.reshape([int(n) for n in order[1].split(",")])
        if order[2]:
            ids = ids.transpose([int(n) for n in order[2].split(",")])
    ids = ids.reshape(list(sizes.values()))
    chosen = [slice(0, 1)] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        dim = list(sizes).index(name)
        chosen[dim] = slice(None)
        if before:  # an axis cut into before x part x after
            after = sizes[name] // (int(before) * int(part))
            chosen[dim] = slice(0, after * int(part), after)
    return ids[tuple(chosen)].ravel().tolist()


def _differing(devices: list[int], mesh_shape: Mapping[str, int]) -> list[str]:
    places = np.array(np.unravel_index(devices, tuple(mesh_shape.values())))
    differ = (places != places[:, :1]).any(1)
    return [axis for axis, differs in zip(mesh_shape, differ) if differs]


def _called_by(program: Program, op: str) -> set[str]:
    every = (each for inside in program.computations.values() for each in inside)
    return {name for each in every if each.op == op for name in each.called}


def _collective(instruction: Instruction, program: Program) -> str | None:
    """Which collective an instruction is or starts; None for any other."""
    if instruction.op == "async-start":  # a computation of that one operation
        inner = [each for name in instruction.called for each in program.computations[name]]
        return next((each.op for each in inner if each.op in COLLECTIVES), None)
    op = instruction.op.removesuffix("-start")
    return op if op in COLLECTIVES else None


def _attributes(instruction: Instruction, program: Program) -> str:
    inner = [each for name in instruction.called for each in program.computations[name]]
    own = next((each for each in inner if each.op in COLLECTIVES), instruction)
    return own.attributes


def _sent_share(op: str, group: int) -> float:
    others = (group - 1) / group
    return {
        "all-gather": float(group - 1),
        "all-reduce": 2 * others,
        "collective-permute": 1.0,
    }.get(op, others)


class _Work:
    """Matrix FLOPs and kernels of instructions, with those of the computations they call."""

    def __init__(self, program: Program):
        self._program = program
        self._of_computation: dict[str, tuple[float, int]] = {}

    def between(self, computation: str, place: int) -> tuple[float, int]:
        """FLOPs and kernels between a collective's start, at this place, and its end; else 0, 0."""
        instructions = self._program.computations[computation]
        start = instructions[place]
        if not start.op.endswith("-start"):
            return 0.0, 0
        types, flops, kernels = self._program.types(computation), 0.0, 0
        for each in instructions[place + 1 :]:
            if each.op.endswith("-done") and start.name in each.operands:
                return flops, kernels
            more = self._of(each, types)
            flops, kernels = flops + more[0], kernels + more[1]
        return 0.0, 0  # ends in another computation: nothing can be said

    def _of(self, instruction: Instruction, types: Mapping[str, str]) -> tuple[float, int]:
        flops, kernels = product_flops(instruction, types), int(is_kernel(instruction))
        for name in instruction.called:
            if name not in self._of_computation:
                self._of_computation[name] = 0.0, 0  # of a computation that calls itself
                inner = self._program.computations.get(name, [])
                of_inner = self._program.types(name) if inner else {}
                each = [self._of(one, of_inner) for one in inner]
                self._of_computation[name] = sum(f for f, _ in each), sum(k for _, k in each)
            more = self._of_computation[name]
            flops, kernels = flops + more[0], kernels + more[1]
        return flops, kernels
