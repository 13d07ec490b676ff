"""The report of a compiled program as text, and the groups that its picture shows too."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dsv3_jax.analysis.compiled import Collective
from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.analysis.output import table

GIB, GB = 2.0**30, 1e9
SHOWN = 4  # findings of XLA that are printed


def lines(report: Any, device: Accelerator) -> list[str]:
    """The report as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    found = [
        f"{report.topology}: {report.num_devices:,} x {device.name}; mesh {mesh or 'one device'}",
        f"compiled in {report.lowering_seconds:.0f} + {report.compile_seconds:.0f} CPU seconds "
        f"(lowering + XLA), with {report.resident / GIB:.1f} GiB of memory",
        "",
        "memory of a device",
    ]
    rows = [
        ["arguments", report.arguments / GIB],
        *[[f"  {name}", size / GIB] for name, size in list(report.held.items())[:4]],
        ["temporaries", report.temporaries / GIB],
        ["peak", report.peak / GIB],
        ["capacity", report.capacity / GIB],
    ]
    found.append(table(["what", "GiB"], rows))
    found.append(f"peak / capacity: {100 * report.peak / report.capacity:.1f} %")
    largest = [[b.num_bytes / GIB, b.type.split("{")[0], b.what] for b in report.buffers]
    found += ["", "largest arrays that the program makes", table(["GiB", "type", "what"], largest)]
    if report.program is not None:
        found += _of_program(report, device)
    if report.predicted is not None and report.program is not None:
        rows = [[what, p, c, p / c if c else "-"] for what, p, c in compared(report)]
        found += ["", "predicted from the config (analysis/prediction.py) and compiled"]
        found.append(table(["of a device", "predicted", "compiled", "ratio"], rows))
    if report.choices:
        found += ["", "kernels chosen", *[f"  {choice}" for choice in report.choices]]
    if report.findings:
        found += ["", f"findings of XLA: {len(report.findings)}"]
        found += [f"  {finding[:300]}" for finding in report.findings[:SHOWN]]
        if len(report.findings) > SHOWN:
            found.append(f"  and {len(report.findings) - SHOWN} more (--json has them all)")
    return found


def _of_program(report: Any, device: Accelerator) -> list[str]:
    program = report.program
    loops = [
        [loop.trips, loop.runs, "XLA" if loop.known else "the plan", loop.source[-100:]]
        for loop in program.loops
        if loop.trips != 1 or not loop.known
    ]
    kernels = [[name, runs] for name, runs in sorted(program.kernels.items())]
    found = [
        "",
        f"matrix products of a device: {program.flops / 1e12:,.2f} TFLOP that XLA compiled and "
        f"{program.kernel_flops / 1e12:,.2f} in kernels",
        table(["kernel", "runs"], kernels) if kernels else "no Pallas kernel runs",
        "",
        "loops: how often each runs, and who says so",
        table(["trips", "entered", "by", "where"], loops),
        "",
        "bytes that a device sends in one run of the program",
    ]
    rows = []
    for (axes, op), each in by_axes(program.collectives).items():
        total = sum(c.total for c in each)
        if not total:
            continue
        rows.append(
            [
                " + ".join(axes),
                op,
                total / GB,
                sum(c.runs for c in each),
                100 * sum(c.total for c in each if c.asynchronous) / total,
                100 * sum(c.total for c in each if c.covered) / total,
                leaves_host(axes, report.mesh, device),
            ]
        )
    headers = ["axes", "collective", "GB", "runs", "async %", "beside work %", "leaves a host"]
    found.append(table(headers, rows))
    out = sum(c.total for c in program.collectives if leaves_host(c.axes, report.mesh, device))
    if device.scale_out_bandwidth and out:
        seconds = out / device.scale_out_bandwidth
        found.append(
            f"{out / GB:,.1f} GB leave the host: {seconds:,.2f} s at "
            f"{device.scale_out_bandwidth / GB:g} GB/s a device"
        )
    return found


def compared(report: Any) -> list[tuple[str, float, float]]:
    """(what, predicted, compiled) of everything that `analysis/prediction.py` predicts."""
    predicted, program = report.predicted, report.program
    sent: dict[str, float] = defaultdict(float)
    for each in program.collectives:
        kind = "+".join(each.axes) if each.op == "all-to-all" else each.op
        sent[kind] += each.total
    rows = [
        ("arguments, GB", predicted.arguments / GB, report.arguments / GB),
        ("peak memory, GB", predicted.peak / GB, report.peak / GB),
        ("TFLOP", predicted.flops / 1e12, (program.flops + program.kernel_flops) / 1e12),
    ]
    for axis, size in predicted.exchange.items():
        rows.append((f"exchange over {axis}, GB", size / GB, sent[axis] / GB))
    reduced = sent["reduce-scatter"] + sent["all-reduce"]
    rows.append(("gathers of weights, GB", predicted.gathers / GB, sent["all-gather"] / GB))
    rows.append(("reductions of gradients, GB", predicted.reductions / GB, reduced / GB))
    if predicted.hand_overs:
        handed = sent["collective-permute"]
        rows.append(("handed to next ranks, GB", predicted.hand_overs / GB, handed / GB))
        rows.append(("layers to stages and back, GB", predicted.stages / GB, sent["pipe"] / GB))
    return rows


def by_axes(collectives: list[Collective]) -> dict[tuple[tuple[str, ...], str], list[Collective]]:
    """Collectives by (mesh axes, opcode), most bytes first."""
    groups: dict[tuple[tuple[str, ...], str], list[Collective]] = defaultdict(list)
    for each in collectives:
        groups[each.axes, each.op].append(each)
    return dict(sorted(groups.items(), key=lambda item: -sum(c.total for c in item[1])))


def leaves_host(axes: tuple[str, ...], mesh: dict[str, int], device: Accelerator) -> bool:
    """Whether devices that differ along these axes lie in different scale-up domains.

    Devices are numbered with the last axis innermost, those of a domain one after the other.
    """
    span = 1
    for axis in reversed(mesh):
        if axis in axes and span * mesh[axis] > device.scale_up_domain:
            return True
        span *= mesh[axis]
    return False


def over(peak: int, capacity: float) -> str:
    """By how much a peak exceeds a device's memory."""
    return f"{(peak - capacity) / GIB:.1f} GiB more than the {capacity / GIB:.1f} GiB of a device"
