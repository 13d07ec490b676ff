"""What a program's time on a GPU goes to: the profiler's kernels, classed by the HLO's metadata.

A kernel's event names the HLO operation that it runs; the compiled program's text has, for each
operation, the path of the code that it came from (`op_name`) and the shapes of its result. What is
neither a product nor a kernel of ours is XLA's, and is classed by where in the model it lies.
"""

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """All launches of one kernel."""

    name: str
    path: str  # of the code, from the HLO's metadata
    result: str  # the HLO's result type
    ms: float  # of one call of the program
    launches: float


class Row(NamedTuple):
    """A class of kernels."""

    ms: float
    launches: float


PRODUCTS = ("grouped_matmul", "grouped_dgrad", "grouped_wgrad", "scaled_matmul", "scaled_wgrad")
_CUBLAS = re.compile(r"^(nvjet|gemm_fusion|sm90_xmma)|cublas|cutlass|splitK")
# NCCL's kernels, and the barrier before a kernel that reads peers' memory: each waits for the last
# of the GPUs, so this is also what they lose by doing more work than another.
_TOGETHER = re.compile(r"nccl|barrier", re.IGNORECASE)


def kernels(run: Callable[[], Any], hlo: str, calls: int = 2) -> list[Kernel]:
    """The kernels of one call of `run`, by the profiler; the mean of some calls, longest first.

    hlo is the compiled program's text. Needs a GPU; empty where the profiler saw none.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(run())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data: Any = jax.profiler.ProfileData
        planes = data.from_file(file).planes
        paths, total, count = _metadata(hlo), collections.Counter(), collections.Counter()
        for plane in planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    operation = str(dict(event.stats).get("hlo_op", ""))
                    key = event.name, *paths.get(operation, ("", ""))
                    total[key] += event.duration_ns / 1e6 / calls
                    count[key] += 1 / calls
    return [Kernel(*key, ms, count[key]) for key, ms in total.most_common()]


def classed(found: Iterable[Kernel]) -> dict[str, Row]:
    """The kernels' time and launches by class, longest first."""
    rows: dict[str, Row] = {}
    for kernel in found:
        ms, launches = rows.get(class_of(kernel), Row(0.0, 0.0))
        rows[class_of(kernel)] = Row(ms + kernel.ms, launches + kernel.launches)
    return dict(sorted(rows.items(), key=lambda row: -row[1].ms))


def class_of(kernel: Kernel) -> str:
    """The class of one kernel."""
    name, path = kernel.name, kernel.path
    if "Memcpy" in name or "Memset" in name:
        return "copies"
    if _TOGETHER.search(name):
        return "collectives, and waiting for peers"
    if "attention_" in name or "mla_attention" in path:
        return "attention"
    if "mosaic" in name:
        return _of_ours(path)
    if _CUBLAS.search(name):
        return f"products in BF16: {_part(path)}"
    if not path:
        return "XLA: unnamed"
    if "jit(" not in path:
        return "operands, turned or converted"
    if "jvp" not in path and "transpose" not in path and "while" not in path:
        if _part(path) != "head":  # a forward pass alone
            return f"elementwise: {_part(path)}"
        return "gradient norm" if "reduce" in path or "norm" in path else "optimizer"
    if re.search(r"dynamic_update_slice|dynamic_slice$|broadcast_in_dim$", path) and (
        _part(path) == "head"
    ):
        return "layer stacks, zeros"
    return f"elementwise: {_part(path)}"


def _of_ours(path: str) -> str:
    match = re.findall(r"jit\((\w+)\)", path)
    function = match[-1] if match else "?"
    if function.startswith(PRODUCTS) or "wgrad" in function:
        grad = ", weight gradients" if "wgrad" in function else ""
        part = "experts" if "grouped" in function else _part(path)
        return f"products by our kernels: {part}{grad}"
    if function == "quantize_blocks":
        return "weights quantised"
    return "quantisers" if "quantize" in function else f"{function} (ours)"


def _part(path: str) -> str:
    for key, part in (
        ("self_attn", "attention"),
        ("shared_experts", "shared"),
        ("/experts", "experts"),
        ("/mlp", "dense and router"),
        ("MTPModule", "MTP's own"),
        ("Block", "block"),
        ("MoE", "a layer's sum"),
    ):
        if key in path:
            return part
    return "head"


def _metadata(hlo: str) -> dict[str, tuple[str, str]]:
    """The path and the result type of each operation of a program's text."""
    found = {}
    for line in hlo.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^)]*\)|\S+)", line)
        if match:
            path = re.search(r'op_name="([^"]*)"', line)
            found[match[1]] = (path[1] if path else "", match[2][:200])
    return found


def table(rows: dict[str, Row]) -> str:
    """The classes as a table in Markdown."""
    whole = sum(row.ms for row in rows.values())
    lines = [f"| class | ms of {whole:.1f} | % | launches |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.ms:.1f} | {100 * row.ms / whole:.1f} | {row.launches:.0f} |")
    return "\n".join(lines)
