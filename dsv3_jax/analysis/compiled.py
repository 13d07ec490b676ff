"""What a compiled program takes and moves on each device: FLOPs, collectives, kernels, buffers.

Read from the program that XLA made (`compiled.as_text()`), so that it says what will run rather
than what was meant: which exchange spans which mesh axes, how often, whether it is asynchronous
and what lies between its start and its end.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsv3_jax.analysis.hlo import (
    Instruction,
    Loop,
    Program,
    executions,
    num_bytes,
    parse,
    product_flops,
    shape,
)

COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
)
_KERNEL_TARGETS = re.compile(r'custom_call_target="(mosaic\w*|tpu_custom_call)"')
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
    runs: int
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
    kernels: dict[str, int]
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
    trips: Mapping[str, int] | None = None,
    num_buffers: int = 12,
) -> ProgramReport:
    """The report of a compiled program's text on a mesh of this shape (axis sizes in order).

    `trips` as in `hlo.executions`. Collectives among one device are left out.
    """
    program = parse(text)
    counts, loops = executions(program, trips)
    fused, wrapped = _called_by(program, "fusion"), _called_by(program, "async-start")
    work = _Work(program)
    flops, of_kernels, kernels = 0.0, 0.0, Counter[str]()
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


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel, for a GPU or a TPU."""
    found = _KERNEL_TARGETS.search(instruction.attributes)
    return instruction.op == "custom-call" and found is not None


def kernel_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a Pallas kernel of ours by the shapes of its operands; 0 for one without products.

    A matrix kernel's operands hold the contracted dim last; a result of several groups from plain
    operands contracts each row in one group. Attention's forward is causal; its backward kernels
    are counted by the tiles of scores that they hand on.
    """
    outputs = [shape(part) for part in re.findall(r"\w+\[[\d,]*\]", instruction.type)]
    if "tpu_custom_call" in instruction.attributes:
        read = [types.get(name, "") for name in instruction.operands]
        return _tpu_kernel_flops(
            instruction.source, [shape(each) for each in read if each[:1] != "s"], outputs
        )
    operands = [shape(types.get(name, "")) for name in instruction.operands]
    if "attention_forward" in instruction.source:
        batch, length, heads, width = operands[0]
        tiles = length * (length + 128) / 2
        return 2.0 * batch * heads * tiles * (width + outputs[0][-1])
    if "attention_key_gradients" in instruction.source:
        return 2.0 * math.prod(outputs[0]) * 2 * (operands[0][-1] + operands[1][-1])
    if "attention_query_products" in instruction.source:
        return 2.0 * math.prod(operands[0]) * outputs[0][-1]
    names = ("scaled_matmul", "grouped_matmul", "grouped_wgrad")
    if not any(name in instruction.source for name in names) or len(operands) < 2:
        return 0.0
    groups = math.prod(outputs[0][:-2]) if len(operands[1]) == 2 else 1
    return 2.0 * math.prod(outputs[0]) * operands[0][-1] / groups


def _tpu_kernel_flops(
    source: str, operands: list[tuple[int, ...]], outputs: list[tuple[int, ...]]
) -> float:
    """`kernel_flops` for a TPU, by the operands that are no integers.

    Attention has heads before rows, and blocks of 512 rows along the diagonal; its two backward
    kernels both make the scores and their gradient again.
    """
    if len(operands) < 2:
        return 0.0
    if "attention" in source:
        batch, heads, length, width = operands[0]
        value = outputs[0][-1] if "forward" in source else operands[3][-1]
        products = {
            "forward": width + value,
            "key": 2 * (width + value),
            "query": 2 * width + value,
        }
        which = next((name for name in products if f"attention_{name}" in source), None)
        scores = batch * heads * length * (length + min(length, 512)) / 2
        return 2.0 * scores * products[which] if which else 0.0
    if len(operands[0]) != 2 or len(operands[1]) not in (2, 3):
        return 0.0
    groups = math.prod(outputs[0][:-2]) if len(operands[1]) == 2 else 1
    return 2.0 * math.prod(outputs[0]) * operands[0][-1] / groups


def kernel_name(instruction: Instruction) -> str:
    """The name a kernel was given, or else that of the function it was called in."""
    named = re.search(r'kernel_name\s*[=:]\s*\\?"([\w.\-]+)', instruction.attributes)
    if named is not None:
        return named[1]
    parts = [part for part in instruction.source.split("/") if part]
    functions = re.findall(r"jit\((\w+)\)", instruction.source)
    return functions[-1] if functions else (parts[-1] if parts else "kernel")


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
