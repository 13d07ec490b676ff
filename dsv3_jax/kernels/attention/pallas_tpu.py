"""Causal attention on TPU, in Pallas: an online softmax over key blocks, forward and backward.

The grid walks over batch, heads and blocks of rows; its last dimension walks over the blocks of the
other side, adding up in VMEM. Blocks above the diagonal are neither fetched nor computed. The
backward pass is two kernels, one for keys and values and one for queries, as in splash attention
(jax.experimental.pallas.ops.tpu.splash_attention). The per-head log-sum-exp and the rows' sums of
dO x O have a lane dimension of their own, as TPU memory wants of a column.

Letters: B batch, T query rows, S key rows, N heads, P and U widths, R of the shared part of keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend, manual, tpu
from dsv3_jax.kernels.attention.api import Documents
from dsv3_jax.kernels.tpu import LOWEST, pltpu


class _Call(NamedTuple):
    """What is fixed when an attention is traced."""

    value_dim: int
    scale: float
    block: int  # rows of queries and of keys in a step
    keys: int  # without those that fill the last block


def attention(
    q: Float[Array, "B T N P"],
    kv: tuple[Array, ...],
    k_shared: Float[Array, "B S R"] | None,
    *,
    value_dim: int,
    scale: float,
    offset: int | Int[Array, ""],
    documents: Documents | None,
    block: int = 512,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `api.attention`."""
    tpu.require()
    length = q.shape[1]
    block = min(block, -(-length // 128) * 128)
    call = _Call(value_dim, scale, block, kv[0].shape[1])
    # Heads before rows: a block is rows by width. No real query sees a row that is added.
    q, kv = jax.tree.map(lambda x: _pad(jnp.swapaxes(x, 1, 2), block, 2), (q, kv))
    shared = None if k_shared is None else _pad(k_shared, block, 1)
    first = None
    if documents is not None:
        first = _pad(documents.first_key, block, 1)[..., None]
    offset = jnp.asarray(offset, jnp.int32).reshape(1)
    results: Any = _attention(call, *manual.vary((q, kv, shared, offset, first)))
    out, lse = results
    return jnp.swapaxes(out[:, :, :length], 1, 2), lse[:, :, :length, 0]


def _pad(x: Array, multiple: int, axis: int) -> Array:
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, kv, shared, offset, first):
    return _forward(call, q, kv, shared, offset, first)[0]


def _forward(call: _Call, q, kv, shared, offset, first):
    grid = _Grid(call, q, kv, shared, first, rows_are_queries=True)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, grid),
        grid_spec=grid.spec(
            outputs=[grid.block("row", call.value_dim), grid.block("row", 1)],
            scratch=[(call.block, 1), (call.block, 1), (call.block, call.value_dim)],
        ),
        out_shape=[
            manual.result((*q.shape[:3], call.value_dim), q.dtype, q),
            manual.result((*q.shape[:3], 1), jnp.float32, q),
        ],
        compiler_params=_PARAMS,
        name="attention_forward",
    )(offset, *grid.operands)
    return (out, lse), (q, kv, shared, offset, first, out, lse)


def _backward(call: _Call, saved, gradients):
    q, kv, shared, offset, first, out, lse = saved
    dout, dlse = gradients
    sums = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    extra = (dout.astype(q.dtype), lse, dlse - sums)
    widths = [x.shape[-1] for x in kv]
    own = q.shape[-1] - (0 if shared is None else shared.shape[-1])

    grid = _Grid(call, q, kv, shared, first, rows_are_queries=False, extra=extra)
    shapes = [manual.result(x.shape, x.dtype, q) for x in kv]
    outputs = [grid.block("row", width) for width in widths]
    if shared is not None:
        shapes.append(manual.result((*kv[0].shape[:3], shared.shape[-1]), shared.dtype, q))
        outputs.append(grid.block("row", shared.shape[-1]))
    gradients = pl.pallas_call(
        functools.partial(_key_kernel, grid, own),
        grid_spec=grid.spec(
            outputs=outputs, scratch=[(call.block, q.shape[-1]), (call.block, call.value_dim)]
        ),
        out_shape=shapes,
        compiler_params=_PARAMS,
        name="attention_key_gradients",
    )(offset, *grid.operands)
    dkv = tuple(gradients[: len(kv)])
    dshared = None
    if shared is not None:
        dshared = gradients[-1].sum(axis=1, dtype=jnp.float32).astype(shared.dtype)

    grid = _Grid(call, q, kv, shared, first, rows_are_queries=True, extra=extra)
    dq = pl.pallas_call(
        functools.partial(_query_kernel, grid),
        grid_spec=grid.spec(
            outputs=[grid.block("row", q.shape[-1])], scratch=[(call.block, q.shape[-1])]
        ),
        out_shape=[manual.result(q.shape, q.dtype, q)],
        compiler_params=_PARAMS,
        name="attention_query_gradients",
    )(offset, *grid.operands)[0]
    return dq, dkv, dshared, None, None


backend.define_vjp(_attention, _forward, _backward)

_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


class _Grid:
    """The grid of one kernel: its operands' blocks, and which of them a step works on.

    The third grid dimension is the block of rows that stays, of queries or of keys, and the fourth
    the block of the other side. Steps above the diagonal name the nearest block that is needed, so
    that nothing is fetched for them.
    """

    def __init__(self, call, q, kv, shared, first, *, rows_are_queries, extra=()) -> None:
        self.call, self.rows_are_queries = call, rows_are_queries
        self.q_blocks, self.k_blocks = q.shape[2] // call.block, kv[0].shape[2] // call.block
        self.own = q.shape[-1] - (0 if shared is None else shared.shape[-1])
        self.packed, self.has_shared, self.has_first = len(kv) == 1, shared is not None, False
        self.batch, self.heads = q.shape[:2]
        query, key = ("row", "other") if rows_are_queries else ("other", "row")
        self.operands, self.blocks = [q, *kv], [self.block(query, q.shape[-1])]
        self.blocks += [self.block(key, x.shape[-1]) for x in kv]
        if shared is not None:
            self.operands.append(shared)
            self.blocks.append(self.block(key, shared.shape[-1], headless=True))
        if first is not None:
            self.has_first = True
            self.operands.append(first)
            self.blocks.append(self.block(query, 1, headless=True))
        for array in extra:
            self.operands.append(array)
            self.blocks.append(self.block(query, array.shape[-1]))

    def last_key(self, q_block, offset):
        """The last key block that a query block sees."""
        end = (q_block + 1) * self.call.block + offset
        return jnp.minimum(lax.div(end - 1, self.call.block), self.k_blocks - 1)

    def first_query(self, k_block, offset):
        """The first query block that sees a key block."""
        start = lax.div(jnp.maximum(k_block * self.call.block - offset, 0), self.call.block)
        return jnp.minimum(start, self.q_blocks - 1)

    def needed(self, row, other, offset):
        """Whether a step has anything to do."""
        if self.rows_are_queries:
            return other <= self.last_key(row, offset)
        return other >= self.first_query(row, offset)

    def block(self, which: str, width: int, headless: bool = False) -> pl.BlockSpec:
        """The block of an array: of the rows that stay ("row"), or of the "other" side."""

        def index(batch, head, row, other, offset):
            at = row
            if which == "other":
                nearest, bound = (
                    (jnp.minimum, self.last_key)
                    if self.rows_are_queries
                    else (jnp.maximum, self.first_query)
                )
                at = nearest(other, bound(row, offset[0]))
            return (batch, at, 0) if headless else (batch, head, at, 0)

        one = (1,) if headless else (1, 1)
        return pl.BlockSpec((*one, self.call.block, width), index)

    def spec(self, outputs, scratch) -> pltpu.PrefetchScalarGridSpec:
        """The grid with these outputs' blocks and float32 scratch shapes."""
        sides = (self.q_blocks, self.k_blocks)
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(self.batch, self.heads, *(sides if self.rows_are_queries else sides[::-1])),
            in_specs=self.blocks,
            out_specs=outputs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )

    def step(self, refs: Any) -> tuple[Any, Any, Any, Any, Any, Any, list[Any]]:
        """First?, last?, needed?, and functions: q; keys and values; visible logits; other refs."""
        offset, refs = refs[0][0], list(refs[1:])
        row, other = pl.program_id(2), pl.program_id(3)
        q_block, k_block = (row, other) if self.rows_are_queries else (other, row)
        q_ref = refs.pop(0)
        kv_refs = [refs.pop(0) for _ in range(1 if self.packed else 2)]
        shared_ref = refs.pop(0) if self.has_shared else None
        first_ref = refs.pop(0) if self.has_first else None

        def keys_and_values():
            k = kv_refs[0][0, 0, :, : self.own]
            v = kv_refs[-1][0, 0]
            return (k, None if shared_ref is None else shared_ref[0]), v[:, -self.call.value_dim :]

        def logits(k):
            q = q_ref[0, 0]
            s = _dot(q[:, : self.own], k[0], 1, 1)
            if k[1] is not None:
                s += _dot(q[:, self.own :], k[1], 1, 1)
            size = self.call.block
            query = offset + q_block * size + lax.broadcasted_iota(jnp.int32, s.shape, 0)
            key = k_block * size + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            mask = (key <= query) & (key < self.call.keys)
            if first_ref is not None:
                mask &= key >= first_ref[0]
            return jnp.where(mask, s * self.call.scale, LOWEST)

        count = self.k_blocks if self.rows_are_queries else self.q_blocks
        needed = self.needed(row, other, offset)
        return other == 0, other == count - 1, needed, q_ref, keys_and_values, logits, refs


def _dot(a, b, a_dim: int, b_dim: int):
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_kernel(grid: _Grid, *refs):
    first, last, needed, _, keys_and_values, logits, rest = grid.step(refs)
    out_ref, lse_ref, m_ref, l_ref, sum_ref = rest

    @pl.when(first)
    def _():
        m_ref[...] = jnp.full_like(m_ref, LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(needed)
    def _():
        k, v = keys_and_values()
        s = logits(k)
        m = jnp.maximum(m_ref[...], s.max(axis=1, keepdims=True))
        # A row that has seen no key yet has m = LOWEST, and must not count what it does not see.
        p = jnp.where(s > LOWEST, jnp.exp(s - m), 0.0)
        alpha = jnp.exp(m_ref[...] - m)
        l_ref[...] = l_ref[...] * alpha + p.sum(axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * alpha + _dot(p.astype(v.dtype), v, 1, 0)
        m_ref[...] = m

    @pl.when(last)
    def _():
        total = jnp.maximum(l_ref[...], jnp.finfo(jnp.float32).tiny)
        out_ref[0, 0] = (sum_ref[...] / total).astype(out_ref.dtype)
        lse_ref[0, 0] = m_ref[...] + jnp.log(total)


def _probabilities_and_ds(grid: _Grid, logits, k, v, dout_ref, lse_ref, minus_sums_ref):
    s = logits(k)
    p = jnp.where(s > LOWEST, jnp.exp(s - lse_ref[0, 0]), 0.0)
    ds = p * (_dot(dout_ref[0, 0], v, 1, 1) + minus_sums_ref[0, 0]) * grid.call.scale
    return p.astype(v.dtype), ds.astype(v.dtype)


def _key_kernel(grid: _Grid, own: int, *refs):
    first, last, needed, q_ref, keys_and_values, logits, rest = grid.step(refs)
    dout_ref, lse_ref, minus_sums_ref, *outs, dk_ref, dv_ref = rest

    @pl.when(first)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(needed)
    def _():
        k, v = keys_and_values()
        rows = (dout_ref, lse_ref, minus_sums_ref)
        p, ds = _probabilities_and_ds(grid, logits, k, v, *rows)
        dv_ref[...] += _dot(p, dout_ref[0, 0], 0, 0)
        dk_ref[...] += _dot(ds, q_ref[0, 0], 0, 0)

    @pl.when(last)
    def _():
        if grid.packed:
            outs[0][0, 0, :, :own] = dk_ref[:, :own].astype(outs[0].dtype)
            outs[0][0, 0, :, own:] = dv_ref[...].astype(outs[0].dtype)
        else:
            outs[0][0, 0] = dk_ref[:, :own].astype(outs[0].dtype)
            outs[1][0, 0] = dv_ref[...].astype(outs[1].dtype)
        if grid.has_shared:
            outs[-1][0, 0] = dk_ref[:, own:].astype(outs[-1].dtype)


def _query_kernel(grid: _Grid, *refs):
    first, last, needed, _, keys_and_values, logits, rest = grid.step(refs)
    dout_ref, lse_ref, minus_sums_ref, out_ref, dq_ref = rest
    own = grid.own

    @pl.when(first)
    def _():
        dq_ref[...] = jnp.zeros_like(dq_ref)

    @pl.when(needed)
    def _():
        k, v = keys_and_values()
        rows = (dout_ref, lse_ref, minus_sums_ref)
        _, ds = _probabilities_and_ds(grid, logits, k, v, *rows)
        dq_ref[:, :own] += _dot(ds, k[0], 1, 0)
        if k[1] is not None:
            dq_ref[:, own:] += _dot(ds, k[1], 1, 0)

    @pl.when(last)
    def _():
        out_ref[0, 0] = dq_ref[...].astype(out_ref.dtype)
