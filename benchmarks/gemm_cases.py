"""The products of shapes.py as programs: ours, XLA's, their operands and their errors.

Everything is compiled ahead, many programs side by side, without touching the GPU but for XLA's
choice among its own GEMMs; what is left to do on it is to run.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.errors import relative_error
from benchmarks.shapes import Product
from dsv3_jax.kernels.gemm import pallas_gpu as dense
from dsv3_jax.kernels.gemm.hopper_matmul import Tile
from dsv3_jax.kernels.grouped_gemm import pallas_gpu as grouped
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled, quantize

CHECKED_ROWS = 256  # of the last group: enough to see a wrong scale, edge or expert
COMPILERS = 12  # threads


@dataclass(frozen=True)
class Case:
    """What to call for one product, and with what."""

    product: Product

    def operands(self, key: jax.Array) -> tuple[Any, ...]:
        """Normal operands, quantised where the product is FP8."""
        g, m, n, k = self.product.groups, self.product.m, self.product.n, self.product.k
        kind, fp8 = self.product.kind, self.product.dtype == "fp8"
        keys = jax.random.split(key)
        sizes = jnp.full(g, k if kind == "wgrad" else m, jnp.int32)
        if kind == "wgrad":
            # bfloat16 gradients have tokens first in memory; FP8 ones were transposed as quantised.
            order = 1 if fp8 else -1
            a, b = (_normal(key, (rows, g * k)[::order]) for key, rows in zip(keys, (m, n)))
        else:
            a = _normal(keys[0], (g, m, k) if kind == "masked" else (g * m, k))
            b = _normal(keys[1], (n, k) if kind == "dense" else (g, n, k))
        if fp8:
            a = _rows_last(quantize(a, PER_TOKEN))
            b = _rows_last(quantize(b, PER_TOKEN)) if kind == "wgrad" else quantize(b, PER_BLOCK)
        return (a, b) if kind == "dense" else (a, b, sizes)

    def multiply(self, *operands: Any, tile: Tile | None = None) -> jax.Array:
        """The product by our kernels."""
        function = {
            "dense": dense.scaled_matmul,
            "grouped": grouped.grouped_matmul,
            "masked": grouped.masked_grouped_matmul,
            "wgrad": grouped.grouped_wgrad,
        }[self.product.kind]
        a, b, *sizes = operands
        a, b = _rows_first(a), _rows_first(b)
        if self.product.kind == "wgrad" and self.product.dtype == "bf16":
            a, b = a.mT, b.mT
        return function(a, b, *sizes, tile=tile)

    def error(self, out: jax.Array, *operands: Any) -> jax.Array:
        """Relative error of a slice of the last group against a float64 product.

        Frobenius, of the operands as they are, quantised. Needs `jax.enable_x64`.
        """
        a, b = (_rows_first(x) for x in operands[:2])
        p = self.product
        if p.kind == "wgrad":
            if p.dtype == "bf16":
                a, b = a.mT, b.mT
            last = slice((p.groups - 1) * p.k, None)
            a = _cut(a, slice(min(CHECKED_ROWS, p.m)), last)
            b = _cut(b, slice(None), last)
            out = out[-1, :CHECKED_ROWS]
        else:
            rows = slice(-min(CHECKED_ROWS, p.m), None)
            if p.kind == "masked":
                a, out = _cut(a, -1), out[-1]
            a, out = _cut(a, rows), out[rows]
            b = b if p.kind == "dense" else _cut(b, -1)
        exact = jax.lax.dot_general(_float64(a), _float64(b), (((1,), (1,)), ((), ())))
        return relative_error(out, exact)

    def peer_operands(self, *operands: Any) -> tuple[Any, ...]:
        """What XLA's product takes: FP8 numbers without scales if dense, bfloat16 otherwise."""
        a, b, *sizes = operands
        p = self.product
        if p.kind == "dense":
            return a.values, b.values
        a, b = (x.values if isinstance(x, BlockScaled) else x for x in (a, b))
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        if p.kind == "wgrad":
            a, b = (x.mT if p.dtype == "fp8" else x for x in (a, b))
            return tuple(x.reshape(p.groups, p.k, -1) for x in (a, b))
        return (a, b) if p.kind == "masked" else (a, b, *sizes)

    def peer(self, *operands: Any) -> jax.Array:
        """What XLA offers instead: a plain FP8 product, or bfloat16 groups."""
        a, b, *sizes = operands
        match self.product.kind:
            case "dense":
                across = (((1,), (1,)), ((), ()))
                return jax.lax.dot_general(a, b, across, preferred_element_type=jnp.bfloat16)
            case "masked":
                return jnp.einsum("gmk,gnk->gmn", a, b)
            case "wgrad":
                return jnp.einsum("gkm,gkn->gmn", a, b, preferred_element_type=jnp.float32)
        return jax.lax.ragged_dot(a, b.mT, *sizes)


class Programs(NamedTuple):
    """A case, compiled."""

    case: Case
    operands: Callable[..., Any]
    ours: dict[str, Callable[..., Any] | Exception]  # by the tile's name; why, if it has none
    error: Callable[..., Any]
    peer_operands: Callable[..., Any]
    peer: Callable[..., Any] | None


def compile_all(
    products: Sequence[Product],
    tiles: Callable[[Product], dict[str, Tile | None]] = lambda _: {"": None},
    peers: bool = True,
) -> list[Programs]:
    """The programs of all products, with `tiles` to choose from; XLA's product if `peers`."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        begun = [_begin(pool, Case(product), tiles(product), peers) for product in products]
        return [finish() for finish in begun]


def _begin(pool, case: Case, tiles: dict[str, Tile | None], peers: bool) -> Callable[[], Programs]:
    key = jax.eval_shape(lambda: jax.random.key(0))
    operands = jax.eval_shape(case.operands, key)
    result = jax.ShapeDtypeStruct(*_result(case.product))

    def compiled(function, *args, x64=False):
        def run():
            with jax.enable_x64(x64):
                return jax.jit(function).lower(*args).compile()

        return pool.submit(run)

    make = compiled(case.operands, key)
    ours = {
        name: compiled(functools.partial(case.multiply, tile=tile), *operands)
        for name, tile in tiles.items()
    }
    error = compiled(case.error, result, *operands, x64=True)
    peer_operands = jax.eval_shape(case.peer_operands, *operands)
    select = compiled(case.peer_operands, *operands)
    peer = compiled(case.peer, *peer_operands) if peers else None

    def finish() -> Programs:
        return Programs(
            case,
            make.result(),
            {name: future.exception() or future.result() for name, future in ours.items()},
            error.result(),
            select.result(),
            peer and peer.result(),
        )

    return finish


def _result(p: Product) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the product."""
    if p.kind == "wgrad":
        return (p.groups, p.m, p.n), jnp.float32
    rows = (p.groups, p.m) if p.kind == "masked" else (p.groups * p.m,)
    return (*rows, p.n), jnp.bfloat16


def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16)


def _rows_last(x: BlockScaled) -> BlockScaled:
    """The scales' rows last in memory, as the quantising kernels leave them."""
    return BlockScaled(x.values, jnp.moveaxis(x.scales, -1, 0), x.tile)


def _rows_first(x):
    """The transpose back, which XLA drops."""
    if not isinstance(x, BlockScaled) or x.tile != PER_TOKEN:
        return x
    return BlockScaled(x.values, jnp.moveaxis(x.scales, 0, -1), x.tile)


def _cut(x, *at):
    """x[at], where the last index counts numbers of K."""
    if not isinstance(x, BlockScaled):
        return x[at]
    scales = at
    if len(at) == x.ndim:
        first = at[-1].start or 0
        assert first % 128 == 0 and at[-1].stop is None
        scales = (*at[:-1], slice(first // 128, None))
    return BlockScaled(x.values[at], x.scales[scales], x.tile)


def _float64(x) -> jax.Array:
    if not isinstance(x, BlockScaled):
        return x.astype(jnp.float64)
    scales = x.scales.astype(jnp.float64)
    for axis, tile in enumerate(x.tile):
        scales = jnp.repeat(scales, tile, axis)
    scales = scales[tuple(slice(size) for size in x.shape)]
    return x.values.astype(jnp.float64) * scales
