"""Sequences whose pages several blocks read: their partial results put together, on Hopper."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.mla_decode.kv_splits import KVSplits

LOWEST = -1e30  # finite, so that a row that sees nothing yields zeros and not NaN


def combine(
    out: Float[Array, "B rows C"],
    lse: Float[Array, "B rows"],
    partial: Float[Array, "2 parts rows C"],
    partial_lse: Float[Array, "2 parts rows"],
    schedule: KVSplits,
) -> tuple[Any, ...]:
    """`out` and `lse` with the sequences that several parts read filled in from partial results."""
    batch, rows, width = out.shape
    parts = schedule.parts
    # Loads in flight hide their latency: of many pieces where few sequences share all parts, of
    # many rows otherwise.
    pieces = min(16, pl.next_power_of_2(pl.cdiv(parts, batch)))
    row_count = 16 // pieces
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=4)

    def kernel(partial, partial_lse, begins, ends, out, lse):
        sequence, row = lax.axis_index("sequence"), lax.axis_index("rows") * row_count
        begin, end = begins[sequence], ends[sequence]

        @pl.when(end - begin > 1)
        def _():
            def chunk(index, carry):
                first = begin + index * pieces
                places = [lax.min(first + i, end - 1) for i in range(pieces)]
                kinds = [(place == begin).astype(jnp.int32) for place in places]
                real = [first + i < end for i in range(pieces)]
                results = []
                for r, (total, weight, top) in enumerate(carry):
                    at = [(kind, place, row + r) for kind, place in zip(kinds, places)]
                    values = [plgpu.load(partial.at[i], layout=layout) for i in at]
                    logs = [lax.select(ok, partial_lse[i], LOWEST) for ok, i in zip(real, at)]
                    new_top = functools.reduce(lax.max, logs, top)
                    decay = jnp.exp2(top - new_top)
                    total, weight = total * decay, weight * decay
                    for value, log in zip(values, logs):
                        share = jnp.exp2(log - new_top)
                        total, weight = total + value * share, weight + share
                    results.append((total, weight, new_top))
                return tuple(results)

            nothing = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            init = ((nothing, jnp.float32(0), jnp.float32(2 * LOWEST)),) * row_count
            results = lax.fori_loop(0, pl.cdiv(end - begin, pieces), chunk, init)
            for r, (total, weight, top) in enumerate(results):
                out[sequence, row + r] = (total / weight).astype(out.dtype)
                lse[sequence, row + r] = top + jnp.log2(weight)

    refs = jax.new_ref(out), jax.new_ref(lse)
    hopper.kernel(
        kernel,
        out_type=(),
        grid=(batch, rows // row_count),
        grid_names=("sequence", "rows"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(partial, partial_lse, schedule.begin, schedule.end, *refs)
    return tuple(map(jax.freeze, refs))
