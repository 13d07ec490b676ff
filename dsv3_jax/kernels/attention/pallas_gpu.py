"""Causal attention on Hopper, in Pallas Mosaic GPU: forward and backward kernels as one function.

Memory grows with the rows: beside its operands and results the backward pass reads the log-sum-exp
and the rows' sums of dO x O. A key part that all heads share is never copied for each head; its
gradient is written for each and added up by XLA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend, hopper, manual
from dsv3_jax.kernels.attention import hopper_backward, hopper_forward, hopper_kept, hopper_ring
from dsv3_jax.kernels.attention.api import RESULTS, Documents
from dsv3_jax.kernels.attention.hopper_backward import BackwardTiles
from dsv3_jax.kernels.attention.hopper_forward import ForwardTile
from dsv3_jax.kernels.attention.hopper_kept import ProductTile
from dsv3_jax.kernels.attention.hopper_parts import Columns, Offset
from dsv3_jax.kernels.attention.hopper_ring import BackwardTile, Given

MAX_WIDTH = 256  # of a head: the widest result of one wgmma


class Tiles(NamedTuple):
    """The tiles of all kernels."""

    forward: ForwardTile
    backward: BackwardTiles


class _Call(NamedTuple):
    """What is fixed when an attention is traced."""

    value_dim: int
    scale: float
    offset: int | None  # None: an operand
    tiles: Tiles

    def offset_or(self, operand: Array | None) -> Any:
        """The offset, wherever it is."""
        return self.offset if operand is None else operand


def attention(
    q: Float[Array, "B T N P"],
    kv: tuple[Array, ...],
    k_shared: Float[Array, "B S R"] | None,
    *,
    value_dim: int,
    scale: float,
    offset: int | Int[Array, ""],
    documents: Documents | None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `api.attention`. `tiles` overrides the heuristic."""
    hopper.require()
    _require_types(q, kv, k_shared, value_dim)
    tiles = tiles or tiles_for(q.shape[-1], value_dim)
    length, keys = q.shape[1], kv[0].shape[1]
    static = isinstance(offset, int)
    if keys % 128 and static and offset + length > keys:
        raise NotImplementedError(
            f"queries that see all keys need a multiple of 128 keys, and there are {keys}"
        )
    # TMA reads rows by eights. No real query sees a row that is added, and nobody asks for its own.
    q, kv = _pad_rows(q), tuple(map(_pad_rows, kv))
    k_shared = None if k_shared is None else _pad_rows(k_shared)
    if documents is not None:
        documents = Documents(*(_pad_rows(x, mode="edge") for x in documents))
    call = _Call(value_dim, scale, offset if static else None, tiles)
    offset_operand = None if static else jnp.asarray(offset, jnp.int32)
    operands = manual.vary((q, kv, k_shared, offset_operand, documents))
    results: Any = _attention(call, *operands)
    out, lse = results
    return out[:, :length], lse[..., :length]


def tiles_for(key_dim: int, value_dim: int) -> Tiles:
    """The tiles for heads of these widths; NotImplementedError when none fits."""

    def first(tiles: Sequence[Any], shared_memory: Callable[..., int]) -> Any:
        for tile in tiles:
            if shared_memory(tile, key_dim, value_dim) <= hopper.MAX_SMEM:
                return tile
        raise NotImplementedError(
            f"no tile of heads of {key_dim} and {value_dim} fits in shared memory"
        )

    forward = first(
        [ForwardTile(kv=kv, stages=stages) for stages in (2, 1) for kv in (128, 64)],
        hopper_forward.shared_memory,
    )
    # A step's slot is still read when the next one's is waited for, so that two are the fewest.
    keys = [BackwardTile(step, stages) for step, stages in ((64, 3), (64, 2), (32, 2))]
    queries = [BackwardTile(stages=stages) for stages in (3, 2, 1)]
    waves = 2 if key_dim <= 192 else 1  # sums that fit the registers
    products = [ProductTile(waves, stages=stages) for stages in (3, 2)]
    backward = BackwardTiles(
        first(keys, hopper_ring.shared_memory),
        first(queries, hopper_ring.shared_memory),
        first(products, lambda tile, key_dim, _: hopper_kept.shared_memory(tile, key_dim)),
    )
    return Tiles(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, kv, k_shared, offset, documents):
    return _forward(call, q, kv, k_shared, offset, documents)[0]


@backend.decided
def _forward(call: _Call, q, kv, k_shared, offset, documents):
    keys, values = _columns(call, kv, k_shared)
    out, lse = hopper_forward.attend(
        q,
        keys,
        values,
        call.offset_or(offset),
        None if documents is None else documents.first_key,
        call.scale,
        call.tiles.forward,
    )
    out, lse = manual.vary((out, lse), q)
    # Here, not by the caller: what the backward pass reads is what has the name.
    out, lse = (checkpoint_name(x, RESULTS) for x in (out, lse))
    return (out, lse), (q, kv, k_shared, offset, documents, out, lse)


def _backward(call: _Call, saved, gradients):
    of_operands = _gradients if hopper.interpreted() else _gradients_lowered_once
    return *of_operands(call, saved, gradients), None, None


@backend.decided
def _gradients(call: _Call, saved, gradients):
    """The gradients of q, kv and k_shared."""
    q, kv, k_shared, offset, documents, out, lse = saved
    dout, dlse = gradients
    keys, values = _columns(call, kv, k_shared)
    sums = jnp.einsum("BTNU,BTNU->BNT", dout, out, preferred_element_type=jnp.float32)
    rows = ((0, 0), (0, 0), (0, -q.shape[1] % 128))
    given = Given(
        q,
        keys,
        values,
        dout.astype(q.dtype),
        jnp.pad(lse * (-1 / call.scale), rows),
        jnp.pad(dlse - sums, rows),
        Offset.of(call.offset_or(offset)),
        None if documents is None else documents.first_key,
        None if documents is None else documents.end_query,
        call.scale,
    )
    dq, dkv = hopper_backward.gradients(given, call.tiles.backward)
    dq, dkv = manual.vary((dq, dkv), q)
    shared = None
    if k_shared is not None:
        place = 1  # after the heads' own keys, whose array may hold the values, too
        shared = jnp.sum(dkv.pop(place), axis=2, dtype=jnp.float32).astype(k_shared.dtype)
    return dq, tuple(dkv), shared


# A backward rule is traced anew for every layer, and Mosaic would compile its kernels each time.
_gradients_lowered_once = jax.jit(_gradients, static_argnums=0)


backend.define_vjp(_attention, _forward, _backward)


def _columns(call: _Call, kv, k_shared) -> tuple[tuple[Columns, ...], Columns]:
    """The keys and the values as columns of the operands."""
    own = kv[0].shape[-1] - (call.value_dim if len(kv) == 1 else 0)
    keys = [Columns(kv[0], 0, own)]
    if k_shared is not None:
        keys.append(Columns(k_shared, 0, k_shared.shape[-1]))
    return tuple(keys), Columns(kv[-1], kv[-1].shape[-1] - call.value_dim, call.value_dim)


def _pad_rows(x: Array, mode: Any = "constant") -> Array:
    """`x` with rows (its second dim) up to a multiple of 8, and 16 at least.

    Of an array of 8 rows, one tile of TMA's, Mosaic drops the dim and with it the index: what lies
    past the end would be stored over it.
    """
    extra = max(-x.shape[1] % 8, 16 - x.shape[1])
    if not extra:
        return x
    return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)), mode=mode)


def _require_types(q, kv, k_shared, value_dim: int) -> None:
    arrays = [q, *kv, *(() if k_shared is None else (k_shared,))]
    for array in arrays:
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"operands must be bfloat16, and one is {array.dtype}")
    shared = 0 if k_shared is None else k_shared.shape[-1]
    for width in (q.shape[-1] - shared, shared, q.shape[-1], value_dim):
        if width % 16 or width > MAX_WIDTH:
            raise NotImplementedError(
                f"widths of heads must be multiples of 16 up to {MAX_WIDTH}, and one is {width}"
            )
