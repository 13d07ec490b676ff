"""The backward pass of causal attention on Hopper, in Pallas Mosaic GPU: two kernels.

With P the probabilities, of rows t and columns s, and D the rows' sums of dO x O:

    dV = P^T dO    dP = dO V^T    dS = P x (dP - D)    dK = scale dS^T Q    dQ = scale dS K

`hopper_key_gradients` forms all but dQ, block by block of keys. dQ is a product with a dS that it
kept in device memory (`hopper_kept`), a few heads at a time, so that memory stays linear in the
rows: 1664 operations a pair of tokens and head of 192 and 128 dims, as many as are needed. Where
not one head's dS may be kept, dQ's kernel forms the logits again (`hopper_query_gradients`): 2304.
Either way each sum has one owner, so that results are the same in every run, and nothing is added
up in memory.

Letters: B batch, T query rows, S key rows, N heads, P width of queries and keys, U of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.kernels.attention import (
    hopper_kept,
    hopper_key_gradients,
    hopper_query_gradients,
)
from dsv3_jax.kernels.attention.hopper_kept import Kept, ProductTile
from dsv3_jax.kernels.attention.hopper_parts import unique
from dsv3_jax.kernels.attention.hopper_ring import BackwardTile, Given


class BackwardTiles(NamedTuple):
    """The tiles of the backward kernels, and how many bytes of dS may be kept at a time."""

    keys: BackwardTile
    queries: BackwardTile
    products: ProductTile
    kept_bytes: int = 1152 << 20  # 66 heads of 4096 rows, 4 of 16384


def gradients(
    given: Given, tiles: BackwardTiles
) -> tuple[Float[Array, "B T N P"], list[Float[Array, "B S N D"]]]:
    """dQ, and the gradients of the arrays that the keys and the values are columns of.

    Those are in the order in which arrays come up in the keys and then the values, for each head
    also of an array that all heads share.
    """
    batch, _, heads, _ = given.q.shape
    arrays, _ = unique((*given.keys, given.values))
    shapes = [(batch, given.key_length, heads, array.shape[-1]) for array in arrays]
    dq, *dkv = (jax.new_ref(lax.empty(shape, jnp.bfloat16)) for shape in (given.q.shape, *shapes))
    kept = Kept.within(tiles.kept_bytes, given)
    bounds = [0, given.heads] if kept is None else kept.bounds
    of_keys = hopper_key_gradients.work(given, bounds, tiles.keys)

    def one_chunk(chunk, _):
        ds = hopper_key_gradients.key_gradients(dkv, given, of_keys, tiles.keys, kept, chunk)
        if kept is None:
            of_queries = hopper_query_gradients.work(given, bounds, tiles.queries)
            hopper_query_gradients.query_gradients(dq, given, of_queries, tiles.queries)
        else:
            of_queries = hopper_kept.work(given, bounds, tiles.products)
            hopper_kept.query_gradients(dq, ds, given, of_queries, tiles.products, kept, chunk)

    lax.fori_loop(0, len(bounds) - 1, one_chunk, None)
    return jax.freeze(dq), [jax.freeze(ref) for ref in dkv]
