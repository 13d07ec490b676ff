"""Times the GEMMs on the real layer shapes against XLA and torch's cuBLASLt, in one run.

    python -m benchmarks.bench_gemm [--only TEXT] [--kind dense|grouped|masked|wgrad] [--out DIR]

Needs a Hopper GPU. One row a product: microseconds, TFLOP/s, GB/s, the percentage of the roofline
floor (datasheet peaks), the error of a slice against a float64 product, and how many times faster
it is than XLA and torch. Data are random normal, the L2 cache is flushed before every call, times
are medians of CUPTI's kernel durations.

What the peers compute: XLA's FP8 product has no block scales and no promotion (faster, less exact);
for grouped rows XLA runs `ragged_dot` in bfloat16; torch's `scaled_mm` is cuBLASLt with the same
1x128 and 128x128 scales as ours.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import shapes
from benchmarks.bars import plot
from benchmarks.gemm_cases import Programs, compile_all
from benchmarks.timing import copy_rate, machine, microseconds, microseconds_in_torch
from dsv3_jax.analysis.hardware import accelerator

PEERS = {"XLA": "xla_us", "torch": "torch_us"}


def torch_microseconds(product: shapes.Product) -> float | None:
    """Time of torch's block-scaled `scaled_mm` (cuBLASLt); None where torch does not have it."""
    if product.kind != "dense":
        return None
    try:
        import torch
        from torch.nn.functional import ScalingType, scaled_mm
    except ImportError:
        return None
    m, n, k = product.m, product.n, product.k
    on_gpu = dict(device="cuda")
    a = torch.randn(m, k, **on_gpu).to(torch.float8_e4m3fn)
    b = torch.randn(n, k, **on_gpu).to(torch.float8_e4m3fn)
    a_scales = torch.rand(k // 128, m, **on_gpu).add(0.5).t()
    columns = -(-k // 512) * 4  # cuBLASLt wants rows of scales padded to 16 bytes
    b_scales = torch.rand(-(-n // 128), columns, **on_gpu).add(0.5).t()

    def multiply():
        return scaled_mm(
            a,
            b.t(),
            scale_a=a_scales,
            scale_recipe_a=ScalingType.BlockWise1x128,
            scale_b=b_scales,
            scale_recipe_b=ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )

    return microseconds_in_torch(multiply)


def measure(programs: Programs) -> dict[str, Any]:
    """One row of the table."""
    product = programs.case.product
    ours = programs.ours[""]
    if isinstance(ours, Exception):
        raise ours
    operands = programs.operands(jax.random.key(0))
    error = float(programs.error(ours(*operands), *operands))
    us = microseconds(ours, operands)
    xla_us = None
    if programs.peer is not None:
        operands = programs.peer_operands(*operands)
        xla_us = microseconds(programs.peer, operands)
    del operands
    torch_us = torch_microseconds(product)
    chip = accelerator("h200" if "H200" in jax.devices()[0].device_kind else "h100")
    floor = max(
        product.flops / chip.peak_flops(product.dtype == "fp8"),
        product.bytes / chip.hbm_bandwidth,
    )
    return {
        "product": product.label,
        "kind": product.kind,
        "us": us,
        "tflops": product.flops / us / 1e6,
        "gb_s": product.bytes / us / 1e3,
        "floor_percent": 100 * floor / (us * 1e-6),
        "error": error,
        "xla_us": xla_us,
        "torch_us": torch_us,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| product | us | TFLOP/s | GB/s | of the floor | error | x XLA | x torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        xla, torch = (
            f"{row[key] / row['us']:.2f}" if row[key] else "" for key in ("xla_us", "torch_us")
        )
        lines.append(
            f"| {row['kind']} {row['product']} | {row['us']:.1f} | {row['tflops']:.0f} "
            f"| {row['gb_s']:.0f} | {row['floor_percent']:.0f} % | {row['error']:.1e} "
            f"| {xla} | {torch} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="products whose label holds this text")
    parser.add_argument("--kind", help="dense, grouped, masked or wgrad")
    parser.add_argument("--out", type=Path, help="folder for gemm.json, gemm.md and gemm.png")
    options = parser.parse_args()
    chosen = [
        product
        for product in shapes.ALL
        if options.only in product.label and options.kind in (None, product.kind)
    ]
    began = time.monotonic()
    compiled = compile_all(chosen)
    copied = copy_rate()
    start, rows = machine(), []
    print(
        f"compiled in {time.monotonic() - began:.0f} s",
        start,
        f"copy {copied:.2f} TB/s",
        flush=True,
    )
    for programs in compiled:
        rows.append(measure(programs))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    end = machine()
    print(f"{table(rows)}\nbefore: {start}\nafter: {end}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        told = dict(before=start, after=end, copy_tb_s=copied, rows=rows)
        (options.out / "gemm.json").write_text(json.dumps(told, indent=1))
        (options.out / "gemm.md").write_text(table(rows) + "\n")
        labels = [f"{row['kind']} {row['product']}" for row in rows]
        plot(rows, labels, PEERS, options.out / "gemm.png")


if __name__ == "__main__":
    main()
