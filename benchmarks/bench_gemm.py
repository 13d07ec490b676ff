"""Times the GEMMs on the real layer shapes against XLA and torch's cuBLASLt, in one run.

    python -m benchmarks.bench_gemm [--only TEXT] [--kind dense|grouped|masked|wgrad] [--out DIR]

Needs a Hopper GPU. One row a product: microseconds, TFLOP/s, GB/s, the percentage of the roofline
floor (datasheet peaks), and how many times faster it is than XLA and torch. Data are random normal,
the L2 cache is flushed before every call, times are medians of CUPTI's kernel durations.

What the peers compute: XLA's FP8 product has no block scales and no promotion (faster, less exact);
for grouped rows XLA runs `ragged_dot` in bfloat16; torch's `scaled_mm` is cuBLASLt with the same
1x128 and 128x128 scales as ours.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
import jax.numpy as jnp

from benchmarks import shapes
from dsv3_jax.analysis.hardware import accelerator
from dsv3_jax.kernels.gemm import pallas_gpu as dense
from dsv3_jax.kernels.grouped_gemm import pallas_gpu as grouped
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    PER_TOKEN,
    BlockScaled,
    dequantize,
    quantize,
)

REPEATS = 10
FLUSH_BYTES = 256 << 20  # several times the L2 cache
CHECKED_ROWS = 256  # of the last group: enough to see a wrong scale, edge or expert


@dataclasses.dataclass(frozen=True)
class Case:
    """A product with operands of its own: what to call, and what to compare with."""

    product: shapes.Product
    operands: tuple[Any, ...]

    @classmethod
    def random(cls, product: shapes.Product) -> "Case":
        """Normal operands, quantised where the product is FP8."""
        g, m, n, k = product.groups, product.m, product.n, product.k
        keys = jax.random.split(jax.random.key(0), 2)
        sizes = jnp.full(g, k if product.kind == "wgrad" else m, jnp.int32)
        if product.kind == "wgrad":
            # bfloat16 gradients have tokens first in memory; FP8 ones were transposed as quantised.
            order = 1 if product.dtype == "fp8" else -1
            a, b = (_normal(key, (rows, g * k)[::order]) for key, rows in zip(keys, (m, n)))
        else:
            a = _normal(keys[0], (g, m, k) if product.kind == "masked" else (g * m, k))
            b = _normal(keys[1], (n, k) if product.kind == "dense" else (g, n, k))
        if product.dtype == "fp8":
            a = _row_scaled(a)
            b = _row_scaled(b) if product.kind == "wgrad" else jax.jit(_block_scaled)(b)
        return cls(product, (a, b) if product.kind == "dense" else (a, b, sizes))

    def multiply(self, *operands, tile=None):
        """The product by our kernels."""
        function = {
            "dense": dense.scaled_matmul,
            "grouped": grouped.grouped_matmul,
            "masked": grouped.masked_grouped_matmul,
            "wgrad": grouped.grouped_wgrad,
        }[self.product.kind]
        operands = (_scales_last(operands[0]), *operands[1:])
        if self.product.kind == "wgrad":
            operands = (operands[0], _scales_last(operands[1]), *operands[2:])
            if self.product.dtype == "bf16":
                operands = (operands[0].mT, operands[1].mT, operands[2])
        return function(*operands, tile=tile)

    def error(self, out) -> float:
        """Relative error of a slice of the last group against a float32 product."""
        a, b = (_scales_last(x) for x in self.operands[:2])
        return float(_error(out, a, b, self.product))

    def xla(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What XLA offers instead: a plain FP8 product, or `ragged_dot` in bfloat16."""
        a, b, *sizes = self.operands
        if self.product.kind == "dense":
            return _xla_fp8, (a.values, b.values)
        plain = [x.values.astype(jnp.bfloat16) if isinstance(x, BlockScaled) else x for x in (a, b)]
        if self.product.kind == "masked":
            return _xla_batched, tuple(plain)
        if self.product.kind == "wgrad":
            g, k = self.product.groups, self.product.k
            if self.product.dtype == "fp8":
                plain = [x.mT for x in plain]
            return _xla_wgrad, tuple(x.reshape(g, k, -1) for x in plain)
        return _xla_ragged, (*plain, *sizes)


@jax.jit
def _xla_fp8(a, b):
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


@jax.jit
def _xla_batched(a, b):
    return jnp.einsum("gmk,gnk->gmn", a, b)


@jax.jit
def _xla_wgrad(a, b):
    return jnp.einsum("gkm,gkn->gmn", a, b, preferred_element_type=jnp.float32)


@jax.jit
def _xla_ragged(rows, weights, sizes):
    return jax.lax.ragged_dot(rows, weights.mT, sizes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal_(shape, dtype, key):
    return jax.random.normal(key, shape, dtype)


def _normal(key, shape):
    return _normal_(shape, jnp.bfloat16, key)


def _block_scaled(x):
    return quantize(x, PER_BLOCK)


def _row_scaled(x) -> BlockScaled:
    """Quantised 1x128, the scales' rows last in memory, as the quantising kernels leave them."""
    q = jax.jit(lambda x: quantize(x, PER_TOKEN))(x)
    return BlockScaled(q.values, jax.jit(lambda s: jnp.moveaxis(s, -1, 0))(q.scales), q.tile)


def _scales_last(x):
    if not isinstance(x, BlockScaled) or x.tile != PER_TOKEN:
        return x
    return BlockScaled(x.values, jnp.moveaxis(x.scales, 0, -1), x.tile)


@functools.partial(jax.jit, static_argnums=3)
def _error(out, a, b, product: shapes.Product):
    def plain(x):
        return dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x.astype(jnp.float32)

    def cut(x, at):
        return jax.tree.map(lambda leaf: leaf[at], x)

    if product.kind == "wgrad":
        if product.dtype == "bf16":
            a, b = a.mT, b.mT
        elif product.m > CHECKED_ROWS:
            a = BlockScaled(a.values[:CHECKED_ROWS], a.scales[:CHECKED_ROWS], a.tile)
        first = (product.groups - 1) * product.k
        a, b = plain(a)[:CHECKED_ROWS, first:], plain(b)[:, first:]
        out = out[-1, :CHECKED_ROWS]
    else:
        rows = slice(-min(CHECKED_ROWS, product.m), None)
        if product.kind == "masked":
            a, out = cut(a, -1), out[-1]
        a, out = plain(cut(a, rows)), out[rows]
        b = plain(b if product.kind == "dense" else cut(b, -1))
    exact = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision="highest")
    return jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)


@functools.cache
def _flush() -> Callable[[], Any]:
    """A call that fills the L2 cache with something else, as exactly one kernel."""
    state = [jnp.zeros(FLUSH_BYTES // 4, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def flush():
        state[0] = add(state[0])
        return state[0]

    return flush


def microseconds(function: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Median time of the kernels that `function(*operands)` launches, with a cold L2 cache."""
    jax.block_until_ready((function(*operands), _flush()()))

    def calls():
        for _ in range(REPEATS):
            flushed = _flush()()
            out = function(*operands)
        jax.block_until_ready((flushed, out))

    return _kernel_microseconds(calls)


def _kernel_microseconds(calls: Callable[[], None]) -> float:
    """Median over REPEATS calls of the sum of kernel times after the flush that begins each."""
    from jax._src.lib import mosaic_gpu  # CUPTI has no public door in JAX

    cupti = mosaic_gpu._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        calls()
    finally:
        timings = cupti._cupti_get_timings(True)
    each, rest = divmod(len(timings), REPEATS)
    if rest or not each:
        raise RuntimeError(f"{len(timings)} kernels do not divide into {REPEATS} calls")
    milliseconds = [
        sum(time for _, time in timings[call * each + 1 : (call + 1) * each])
        for call in range(REPEATS)
    ]
    return 1e3 * statistics.median(milliseconds)


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
    buffer = torch.zeros(FLUSH_BYTES // 4, **on_gpu)

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

    def calls():
        for _ in range(REPEATS):
            buffer.add_(1)
            multiply()
        torch.cuda.synchronize()

    multiply()
    torch.cuda.synchronize()
    return _kernel_microseconds(calls)


def machine() -> str:
    """The GPU, its clocks, power and temperature now, and JAX's version."""
    fields = "name,clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return f"{told}, jax {jax.__version__}"


class Prepared(NamedTuple):
    """A product whose functions are compiled, and have run once."""

    case: Case
    ours: Callable[..., Any]
    error: float

    @classmethod
    def of(cls, product: shapes.Product) -> "Prepared":
        """Makes operands, compiles our kernel and reads its error."""
        case = Case.random(product)
        ours = jax.jit(case.multiply)
        return cls(case, ours, case.error(ours(*case.operands)))


def prepare(products: Sequence[shapes.Product]) -> list[Prepared]:
    """All products, compiled side by side; peers after that, while nothing else uses the GPU.

    XLA chooses among GEMMs by timing them, one at a time.
    """

    def compile_peer(prepared: Prepared) -> None:
        function, operands = prepared.case.xla()
        jax.block_until_ready(function(*operands))

    with ThreadPoolExecutor(8) as pool:
        prepared = list(pool.map(Prepared.of, products))
        list(pool.map(compile_peer, prepared))
    return prepared


def measure(prepared: Prepared) -> dict[str, Any]:
    """One row of the table."""
    product = prepared.case.product
    us = microseconds(prepared.ours, prepared.case.operands)
    function, operands = prepared.case.xla()
    xla_us = microseconds(function, operands)
    torch_us = torch_microseconds(product)
    chip = accelerator("h200")
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
        "error": prepared.error,
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
        torch_ratio = f"{row['torch_us'] / row['us']:.2f}" if row["torch_us"] else ""
        lines.append(
            f"| {row['kind']} {row['product']} | {row['us']:.1f} | {row['tflops']:.0f} "
            f"| {row['gb_s']:.0f} | {row['floor_percent']:.0f} % | {row['error']:.1e} "
            f"| {row['xla_us'] / row['us']:.2f} | {torch_ratio} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of TFLOP/s: ours, and each peer's where it was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1))
    for offset, (name, key) in enumerate(
        (("ours", "us"), ("XLA", "xla_us"), ("torch", "torch_us"))
    ):
        values = [row["tflops"] * row["us"] / row[key] if row[key] else 0 for row in rows]
        axes.barh([i + 0.27 * offset for i in range(len(rows))], values, 0.25, label=name)
    axes.set_yticks(range(len(rows)), [f"{row['kind']} {row['product']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="products whose label holds this text")
    parser.add_argument("--kind", help="dense, grouped, masked or wgrad")
    parser.add_argument("--out", type=Path, help="folder for gemm.json, gemm.md and gemm.png")
    options = parser.parse_args()
    start, rows = machine(), []
    print(start, flush=True)
    chosen = [
        product
        for product in shapes.ALL
        if options.only in product.label and options.kind in (None, product.kind)
    ]
    for _, batch in itertools.groupby(chosen, lambda product: (product.kind, product.m)):
        for prepared in prepare(list(batch)):
            rows.append(measure(prepared))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    end = machine()
    print(f"{table(rows)}\nbefore: {start}\nafter: {end}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        told = dict(before=start, after=end, rows=rows)
        (options.out / "gemm.json").write_text(json.dumps(told, indent=1))
        (options.out / "gemm.md").write_text(table(rows) + "\n")
        plot(rows, options.out / "gemm.png")


if __name__ == "__main__":
    main()
