"""Times the fused quantisers and the router against XLA's fusions of the same, in one run.

    python -m benchmarks.bench_fused

Needs a Hopper GPU. One row an operation: microseconds, TB/s of what must move (each input read
once, each output written once), the share of a copy's rate, and XLA's time beside ours. Random
normal data, the L2 cache flushed before every call, medians of CUPTI's kernel durations.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import copy_rate, machine, microseconds
from dsv3_jax.kernels.fused import pallas_gpu, reference
from dsv3_jax.parallel.grouping import plan
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, quantize
from dsv3_jax.quantization.e5m6 import encode

TOKENS, DIM, WIDTH, EXPERTS, EACH = 4096, 7168, 2048, 32, 8
ROUTER = dict(top_k=EACH, n_group=8, topk_group=4, best_of_group=2)


class Operation(NamedTuple):
    """What to call, in its two implementations, on what."""

    name: str
    ours: Callable[..., Any]
    xla: Callable[..., Any]
    operands: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, op: str, *operands: Any, **options: Any) -> "Operation":
        """Both implementations of an operation of kernels.fused, compiled for the operands."""
        ours, xla = (
            jax.jit(_with_scales_as_products_read_them(partial(getattr(module, op), **options)))
            for module in (pallas_gpu, reference)
        )
        operands = jax.jit(_rows_last)(operands)
        jax.block_until_ready((ours(*operands), xla(*operands)))
        return cls(name, ours, xla, operands)

    @property
    def bytes(self) -> int:
        """Bytes of all operands and results."""
        arrays = jax.tree.leaves((self.operands, jax.eval_shape(self.ours, *self.operands)))
        return sum(x.size * x.dtype.itemsize for x in arrays)

    def different(self) -> float:
        """The share of numbers that the two implementations round differently."""
        ours, xla = (jax.tree.leaves(f(*self.operands)) for f in (self.ours, self.xla))
        values = [pair for pair in zip(ours, xla) if pair[0].dtype.itemsize == 1]
        return max((float((a != b).mean()) for a, b in values or zip(ours, xla)))


def _with_scales_as_products_read_them(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with scales rows last: a program's end would turn them, products would not."""
    return lambda *operands: _rows_last(function(*_rows_last(operands)))


def _rows_last(tree: Any) -> Any:
    def turn(x):
        return BlockScaled(x.values, x.scales.mT, x.tile) if isinstance(x, BlockScaled) else x

    return jax.tree.map(turn, tree, is_leaf=lambda x: isinstance(x, BlockScaled))


def normal(key: int, *shape: int) -> jax.Array:
    """Standard normal bfloat16."""
    draw = jax.jit(partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16))
    return draw(jax.random.key(key))


def operations() -> list[Operation]:
    """Every operation at V3's sizes."""
    x, weight = normal(0, TOKENS, DIM), 1 + normal(1, DIM).astype(jnp.float32) / 10
    gate_up, d_out = normal(2, TOKENS * EACH, 2 * WIDTH), normal(3, TOKENS * EACH, WIDTH)
    logits = normal(4, TOKENS, 256).astype(jnp.float32)
    keep = jax.jit(partial(quantize, tile=PER_TOKEN))
    kept, kept_gate_up, packed = keep(x), keep(gate_up), jax.jit(encode)(x)
    chosen = jax.lax.top_k(normal(5, TOKENS, EXPERTS).astype(jnp.float32), EACH)[1]
    handle = jax.jit(partial(plan, num_experts=EXPERTS, alignment=128))(chosen)[0]
    bias, of_rows = jnp.zeros(256), jnp.ones(handle.token_M.shape)
    weights = normal(6, EXPERTS // 2, 2 * WIDTH, DIM).astype(jnp.float32)
    calls = [
        ("rows", "quantize_rows", (x,), {}),
        ("both ways", "quantize_both_ways", (x,), {}),
        ("transposed", "quantize_transposed", (x,), {}),
        ("transposed, of FP8", "quantize_transposed", (kept,), {}),
        ("rows, and E5M6", "quantize_rows_in_two_formats", (x,), {}),
        ("transposed, of E5M6", "quantize_transposed", (packed,), {}),
        ("gathered, both ways", "gather_quantize_both_ways", (x, handle.token_M, of_rows), {}),
        ("weights, both orientations", "quantize_blocks", (weights,), {}),
        ("RMSNorm", "rms_norm_quantize", (x, weight), dict(eps=1e-6)),
        ("SwiGLU", "swiglu_quantize", (gate_up,), {}),
        ("SwiGLU transposed, of FP8", "swiglu_quantize", (kept_gate_up,), dict(transposed=True)),
        ("SwiGLU backward, of FP8", "swiglu_backward_quantize", (kept_gate_up, d_out), {}),
        ("permutation", "permute_quantize", (x, handle.slot_TK, handle.token_M), {}),
        ("router", "route_top_k", (logits, bias), ROUTER),
    ]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda c: Operation.of(c[0], c[1], *c[2], **c[3]), calls))


def main() -> None:
    """Prints the table."""
    print(machine())
    copied = copy_rate()
    print(f"a copy of 1 GB: {copied:.2f} TB/s\n")
    print("| operation | us | TB/s | of a copy | x XLA | numbers that differ from XLA's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for operation in operations():
        us = microseconds(operation.ours, operation.operands)
        xla_us = microseconds(operation.xla, operation.operands)
        rate = operation.bytes / us / 1e6
        print(
            f"| {operation.name} | {us:.1f} | {rate:.2f} | {100 * rate / copied:.0f} % "
            f"| {xla_us / us:.1f} | {operation.different():.1e} |",
            flush=True,
        )
    print(machine())


if __name__ == "__main__":
    main()
