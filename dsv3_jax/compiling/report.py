"""A program compiled, and read: what it takes on a device, and moves between devices."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.analysis.compiled import ProgramReport, read_program
from dsv3_jax.analysis.prediction import Prediction
from dsv3_jax.compiling.naming import WeightNames, bytes_held, describe
from dsv3_jax.compiling.programs import Built
from dsv3_jax.compiling.targets import Target
from dsv3_jax.config import RunError
from dsv3_jax.kernels import backend

_REMATERIALIZED = re.compile(r"Involuntary full rematerialization[^\n]*")


@dataclass(frozen=True)
class Finding:
    """A buffer and what it is in the model."""

    num_bytes: int
    type: str
    what: str


@dataclass(frozen=True)
class Report:
    """What one run of a program takes on each device; sizes in bytes.

    Fields:
        arguments, temporaries, peak: by XLA's own analysis; the peak holds the arguments.
        capacity: of a device.
        held: the largest arguments, by name.
        buffers: the largest arrays that the program makes.
        program: FLOPs, kernels, collectives and loops; None where XLA refused for want of memory.
        choices: which implementation runs each operation, and why.
        findings: what XLA warned of: arrays that it gathers whole against what was asked.
        lowering_seconds, compile_seconds: of CPU, child processes included.
        resident: memory that compiling took here.
        predicted: the same of a training step, by analysis/prediction.py, where it is predicted.
    """

    topology: str
    num_devices: int
    mesh: dict[str, int]
    arguments: int
    temporaries: int
    peak: int
    capacity: float
    held: dict[str, int]
    buffers: list[Finding]
    program: ProgramReport | None
    choices: list[str]
    findings: list[str] = field(default_factory=list)
    lowering_seconds: float = 0.0
    compile_seconds: float = 0.0
    resident: int = 0
    predicted: Prediction | None = None

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.peak <= self.capacity


def compile_program(
    built: Built, target: Target, hlo: Path | None = None, log: Path | None = None
) -> Report:
    """The report of a program compiled for a target's devices; its text is kept in `hlo`.

    log: where what XLA writes meanwhile is kept, for whoever outlives this process.

    RunError, with the compiler's message, for a program that it refuses for another reason than
    memory.
    """
    layout, mesh = built.layout, built.layout.mesh
    assert isinstance(mesh, Mesh)
    held = bytes_held(built.arguments)
    known = len(backend.choices())
    with jax.set_mesh(mesh), _warnings(log) as said:
        begun = _cpu_seconds()
        lowered = built.lower()
        lowered_at = _cpu_seconds()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            asked = _memory_asked(str(error), sum(held.values()))
            if asked is None:
                raise RunError(f"XLA refuses the program for {target.name}: {error}") from error
            compiled, refusal = None, str(error)
        done = _cpu_seconds()
    costs = {
        "lowering_seconds": lowered_at - begun,
        "compile_seconds": done - lowered_at,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "findings": sorted(set(_REMATERIALIZED.findall(said()))),
        "choices": [str(c) for c in backend.choices()[known:] if c.platform == target.platform],
        "topology": target.name,
        "num_devices": target.num_devices,
        "mesh": dict(layout.mesh.shape),
        "capacity": target.accelerator.hbm_bytes,
        "held": held,
    }
    names = WeightNames(_params(built.arguments), layout)
    if compiled is None:
        return _refused(refusal, asked, sum(held.values()), **costs)
    text = compiled.as_text()
    if hlo is not None:
        hlo.parent.mkdir(parents=True, exist_ok=True)
        hlo.write_text(text)
    memory = compiled.memory_analysis()
    program = read_program(text, layout.mesh.shape, built.trips)
    return Report(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak_bytes(memory),
        buffers=[Finding(b.num_bytes, b.type, describe(b, names)) for b in program.buffers],
        program=program,
        **costs,
    )


def peak_bytes(memory: Any) -> int:
    """The peak of a program by XLA's analysis, arguments included, donated ones once."""
    if peak := getattr(memory, "peak_memory_in_bytes", 0):
        return peak
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return total + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _params(arguments: dict[str, Any]) -> Any:
    owner = arguments.get("state") or arguments["weights"]
    return owner["params"]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _memory_asked(refusal: str, arguments: int) -> int | None:
    """The bytes of a device's memory that XLA says it would need, 0 where it does not say how many.

    None where it refuses for another reason: a kernel that exceeds a core's own memory (VMEM) is
    RESOURCE_EXHAUSTED to it, too.
    """
    if "RESOURCE_EXHAUSTED" not in refusal or "memory space vmem" in refusal:
        return None
    if beside := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", refusal):
        return arguments + _size(beside[1], beside[2])
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", refusal)
    needed = re.search(r"requirements?.*?\(?([\d.]+)([KMGT])\)? ?exceeds", refusal, re.S)
    found = used or needed
    return _size(found[1], found[2]) if found else 0


def _refused(refusal: str, peak: int, arguments: int, **costs: Any) -> Report:
    """XLA:TPU refuses what does not fit, and says how much it is and what is large."""
    buffers = []
    for block in re.split(r"\n\s*\d+\. (?=Size: )", refusal)[1:]:
        shape = re.search(r"Shape: (\S+)", block)
        amount = re.match(r"Size: ([\d.]+)([KMGT]?)", block)
        if shape and amount:
            source = re.search(r"op_name=\"([^\"]+)\"", block)
            what = source[1] if source else "an argument"
            buffers.append(Finding(_size(amount[1], amount[2]), shape[1], what))
    finding = refusal.split("\n")[0]
    costs["findings"] = [finding, *costs["findings"]]
    return Report(
        arguments=arguments,
        temporaries=max(peak - arguments, 0),
        peak=max(peak, int(costs["capacity"]) + 1),
        buffers=buffers[:12],
        program=None,
        **costs,
    )


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@contextlib.contextmanager
def _warnings(log: Path | None) -> Iterator[Any]:
    """Inside, what is written to stderr (XLA does so from C++) is kept; gives a function of it."""
    said = ""
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as file:
        there = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: said
        finally:
            os.dup2(there, 2)
            os.close(there)
            file.seek(0)
            said = file.read().decode(errors="replace")
