"""Causal attention for training and prefill, with F32 softmax and a backward pass.

Letters: B batch, T query rows, S key rows, N heads, H and P widths of keys and of queries, R of the
part of the keys that all heads share, U of values. P = H + R: in MLA (V3 report, section 2.1.1) a
head's keys are H dims of its own and the R that carry positions.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.kernels import backend

PACKAGE = "dsv3_jax.kernels.attention"
Bias = Callable[[Array, Array], Array]  # see `mla_attention`
RESULTS = "attention_results"  # the name, for rematerialisation, of what kernels' backward reads


class Documents(NamedTuple):
    """Where the documents of packed rows begin and end, as the kernels want to know it."""

    first_key: Int[Array, "B T"]  # of the query's document
    end_query: Int[Array, "B S"]  # one more than the last query of the key's document


def attention(
    q: Float[Array, "B T N P"],
    k: Float[Array, "B S N P"],
    v: Float[Array, "B S N U"],
    *,
    scale: float,
    offset: int | Int[Array, ""] = 0,
    segments: Int[Array, "B S"] | Documents | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Causal attention's output, and its log-sum-exp in float32.

    Query t sees the keys up to offset + t, its own; from an offset of S on it sees all of them.
    With `segments`, the document number of every key, it sees only those of its document, which
    must be one run of equal numbers; or with `documents_between`, for keys that queries are not
    among. A query that sees no key has an output of no use and a log-sum-exp below -1e29. Both
    results may be differentiated. The output has q's dtype, and memory grows with T and S, not with
    their product, except in `reference`.

    Raises ValueError for shapes that do not fit; NotImplementedError when an implementation asked
    for by name cannot.
    """
    return _attention(q, (k, v), None, v.shape[-1], scale, offset, segments, implementation)


def mla_attention(
    q: Float[Array, "B T N P"],
    kv: Float[Array, "B S N W"],
    k_shared: Float[Array, "B S R"],
    *,
    scale: float,
    offset: int | Int[Array, ""] = 0,
    segments: Int[Array, "B S"] | Documents | None = None,
    bias: Bias | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N W+R-P"], Float[Array, "B N T"]]:
    """`attention` for the keys and values that MLA has in training and prefill.

    kv holds, for each head, its own P - R dims of the key and then its value, as one product with
    `kv_b_proj` leaves them; k_shared is the rotated part of all heads' keys. Neither is copied.

    bias(query positions [T, 1], key positions [1, S]) gives [T, S], or [N, T, S] for each head: f32
    that is added to the scaled logits, or booleans, which keys may be seen besides the causal rule.
    It is computed by `reference`, whose memory grows with T times S.
    """
    value_dim = kv.shape[-1] - (q.shape[-1] - k_shared.shape[-1])
    return _attention(q, (kv,), k_shared, value_dim, scale, offset, segments, implementation, bias)


def _attention(q, kv, k_shared, value_dim, scale, offset, segments, implementation, bias=None):
    documents = segments
    if segments is None or isinstance(segments, Documents):
        check(q, kv, k_shared, value_dim, None)
    else:
        check(q, kv, k_shared, value_dim, segments)
        documents = documents_of(segments, q.shape[1], offset)
    if bias is not None:
        implementation = backend.only_reference(implementation, "an attention bias")
        made = biased(bias, jnp.arange(q.shape[1]) + offset, kv[0].shape[1], q.shape[2])
        how = {"value_dim": value_dim, "scale": scale, "offset": offset, "documents": documents}
        how |= {"bias": made[None], "implementation": implementation}
        return backend.run(PACKAGE, "attention", q, kv, k_shared, **how)
    return backend.run(
        PACKAGE,
        "attention",
        q,
        kv,
        k_shared,
        value_dim=value_dim,
        scale=scale,
        offset=offset,
        documents=documents,
        implementation=implementation,
    )


def check(
    q: Array,
    kv: tuple[Array, ...],
    k_shared: Array | None,
    value_dim: int,
    segments: Array | None,
) -> None:
    """Raises ValueError, naming values and rule, unless the shapes are those of an attention."""
    shared = 0 if k_shared is None else k_shared.shape[-1]
    widths = [q.shape[-1] - shared, value_dim]
    widths = widths if len(kv) == 2 else [sum(widths)]
    batch, _, heads, _ = q.shape
    length = kv[0].shape[1]
    for array, width in zip(kv, widths):
        if array.shape != (batch, length, heads, width):
            raise ValueError(
                f"keys and values {array.shape} must be [B, S, N, {width}] for q {q.shape}"
            )
    if k_shared is not None and k_shared.shape[:2] != (batch, length):
        raise ValueError(
            f"shared keys {k_shared.shape} must be [B, S, R] with {batch=}, S={length}"
        )
    if segments is not None and segments.shape != (batch, length):
        raise ValueError(f"segments {segments.shape} must be [B, S], that is {(batch, length)}")


def documents_of(
    segments: Int[Array, "B S"], queries: int, offset: int | Int[Array, ""] = 0
) -> Documents:
    """The bounds of the runs of equal numbers in `segments`, for queries from `offset` on."""
    rows, length = segments.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = lax.cummax(jnp.where(begins, index, 0), axis=1)
    ends = jnp.roll(begins, -1, axis=1)  # row 0 begins a document, so the last row ends one
    end = lax.cummin(jnp.where(ends, index + 1, length), axis=1, reverse=True)
    first = lax.dynamic_slice_in_dim(first, offset, queries, axis=1)
    return Documents(first, jnp.clip(end - offset, 0, queries))


def documents_between(of_queries: Int[Array, "B T"], of_keys: Int[Array, "B S"]) -> Documents:
    """The bounds for queries and keys of the same row, but of any places, in order.

    Both hold document numbers that ascend along the row (`ascending`).
    """
    search = jax.vmap(functools.partial(jnp.searchsorted, method="sort"), (0, 0))
    after = jax.vmap(functools.partial(jnp.searchsorted, method="sort", side="right"), (0, 0))
    return Documents(
        search(of_keys, of_queries).astype(jnp.int32), after(of_queries, of_keys).astype(jnp.int32)
    )


def ascending(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The number of each run of equal numbers in its row, from 0."""
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


def biased(bias: Bias, positions: Int[Array, " T"], keys: int, heads: int) -> Array:
    """What a bias function gives for these queries, [1 or N, T, S]; ValueError for other shapes."""
    made = jnp.asarray(bias(positions[:, None], jnp.arange(keys)[None]))
    wanted = (len(positions), keys)
    if made.shape not in (wanted, (heads, *wanted)):
        raise ValueError(
            f"the attention bias gave {made.shape}: it must be [T, S] {wanted}, or [N, T, S] with "
            f"N={heads} heads (on a mesh whose tensor axis cuts heads, [T, S])"
        )
    if made.dtype != jnp.bool_:
        made = made.astype(jnp.float32)
    return made.reshape(-1, *wanted)


def apply_bias(
    logits_BNTS: Float[Array, "B N T S"], mask: Bool[Array, "#B #N T S"], bias: Array
) -> tuple[Float[Array, "B N T S"], Bool[Array, "#B #N T S"]]:
    """Logits and mask with what `biased` gave for each sequence, [1 or B, 1 or N, T, S]."""
    if bias.dtype == jnp.bool_:
        return logits_BNTS, mask & bias
    return logits_BNTS + bias, mask


def visible(
    queries: int, keys: int, offset: int | Int[Array, ""], documents: Documents | None
) -> Array:
    """True where a query sees a key: [1 or B, T, S]."""
    key = jnp.arange(keys)
    mask = (jnp.arange(queries)[:, None] + offset >= key)[None]
    if documents is not None:
        mask &= key >= documents.first_key[:, :, None]
    return mask
