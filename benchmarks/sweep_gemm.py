"""Times every candidate tile of the Hopper GEMMs, and prints the table of kernels/gemm/tiles.py.

    python -m benchmarks.sweep_gemm [--only TEXT] [--kind dense|grouped|masked|wgrad] [--out FILE]

Needs a Hopper GPU. For each product of shapes.py: the microseconds of each tile, fastest first,
with the relative error of a slice of its result. A tile that does not fit is reported with the
compiler's reason, never skipped in silence.
"""

import argparse
import json
from pathlib import Path

import jax

from benchmarks import shapes, timing
from benchmarks.gemm_cases import compile_all
from dsv3_jax.kernels.gemm.hopper_matmul import Tile

LARGE = {
    "256x128": Tile(waves=2),
    "256x128 shares a": Tile(waves=2, cluster=2),
    "128x256": Tile(parts=2),
    "128x256 shares b": Tile(parts=2, cluster=2, shared="b"),
    "192x128": Tile(warpgroups=3),
    "192x128 shares a": Tile(warpgroups=3, cluster=2, store_buffers=2),
    "192x128 shares b": Tile(warpgroups=3, cluster=2, shared="b", store_buffers=2),
    "128x192 shares b": Tile(columns=192, cluster=2, shared="b"),
    "128x128": Tile(stages=6),
}
SMALL = {
    "64x64": Tile(warpgroups=1, columns=64, stages=3, slabs=4),
    "64x32": Tile(warpgroups=1, columns=32, stages=4, slabs=4),
    "64x16": Tile(warpgroups=1, columns=16, stages=4, slabs=4),
    "128x64": Tile(columns=64, stages=4, slabs=2),
    "128x32": Tile(columns=32, stages=4, slabs=2),
    "128x128": Tile(stages=6),
}
GROUPED = {
    "256x128": Tile(waves=2, rows_first=True),
    "256x128 shares a": Tile(waves=2, cluster=2, rows_first=True),
    "256x128 shares a, columns first": Tile(waves=2, cluster=2),
    "128x256": Tile(parts=2, rows_first=True),
    "192x128": Tile(warpgroups=3, store_buffers=2),
    "192x128 shares a": Tile(warpgroups=3, cluster=2, store_buffers=2),
    "128x128": Tile(stages=6, rows_first=True),
}
BF16 = {
    "128x256": Tile(columns=256, rows_first=True),
    "128x256 shares a": Tile(columns=256, cluster=2, rows_first=True),
    "192x192": Tile(warpgroups=3, columns=192),
}
MASKED = {
    "128x128": Tile(stages=6),
    "128x128 shares a": Tile(stages=6, cluster=2),
    "128x256": Tile(parts=2),
    "128x256 shares a": Tile(parts=2, cluster=2),
    "64x128": Tile(warpgroups=1, stages=8),
    "64x128, two slabs": Tile(warpgroups=1, stages=4, slabs=2),
}
WGRAD = {
    "256x128": Tile(waves=2),
    "256x128, 4 buffers": Tile(waves=2, stages=3, store_buffers=4),
    "192x128": Tile(warpgroups=3),
    "192x128, 2 buffers": Tile(warpgroups=3, store_buffers=2),
    "192x128, 3 buffers, 3 stages": Tile(warpgroups=3, stages=3, store_buffers=3),
    "192x128, 4 buffers, 3 stages": Tile(warpgroups=3, stages=3, store_buffers=4),
    "192x128, 2 buffers, 16 tiles": Tile(warpgroups=3, store_buffers=2, band=16),
    "128x192": Tile(columns=192),
    "128x192, 3 buffers": Tile(columns=192, store_buffers=3),
    "128x160": Tile(columns=160, stages=5),
    "128x128": Tile(stages=6),
    "128x128, 2 buffers": Tile(stages=5, store_buffers=2),
}
BF16_WGRAD = {
    "128x256": Tile(columns=256),
    "192x192": Tile(warpgroups=3, columns=192),
    "128x128": Tile(stages=6),
}


def candidates(product: shapes.Product) -> dict[str, Tile | None]:
    """The tiles worth timing for a product."""
    if product.dtype == "bf16":
        return BF16_WGRAD if product.kind == "wgrad" else BF16
    if product.kind == "dense":
        return LARGE if product.m > 128 else SMALL
    if product.kind == "masked":
        return {name: tile for name, tile in MASKED.items() if tile.m <= product.m}
    return {"grouped": GROUPED, "wgrad": WGRAD}[product.kind]


def main() -> None:
    """Parses the command line and sweeps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="products whose label holds this text")
    parser.add_argument("--kind", help="dense, grouped, masked or wgrad")
    parser.add_argument("--out", type=Path, help="where to write every number as JSON")
    options = parser.parse_args()
    chosen = [
        product
        for product in shapes.ALL
        if options.only in product.label and options.kind in (None, product.kind)
    ]
    rows = []
    compiled = compile_all(chosen, candidates, peers=False)
    print(timing.machine(), flush=True)
    for programs in compiled:
        product, times = programs.case.product, []
        operands = programs.operands(jax.random.key(0))
        for name, ours in programs.ours.items():
            if isinstance(ours, Exception):  # a tile that does not fit is a result, too
                print(f"{product.label}: {name}: {type(ours).__name__}: {str(ours)[:200]}")
                continue
            error = float(programs.error(ours(*operands), *operands))
            microseconds = timing.microseconds(ours, operands)
            times.append((microseconds, name, error))
            rows.append(dict(product=product.label, tile=name, us=microseconds, error=error))
        line = ", ".join(f"{name} {us:.1f} us ({error:.1e})" for us, name, error in sorted(times))
        best = min(times)[0] if times else float("nan")
        rate = f"{product.flops / best / 1e6:.0f} TFLOP/s {product.bytes / best / 1e3:.0f} GB/s"
        print(f"{product.kind} {product.label}: {rate}: {line}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
