"""Two half-batches through a layer: one computes while the other's tokens are on their way.

V3 report, section 3.4.2, and ISCA paper, section 2.3.1: decoding on many devices spends as long on
the experts' exchange as on attention. Each device's sequences are cut in two, which go through a
MoE layer together, so that their attention and their experts alternate (`Block`, `PairRound` in
expert_ffn.py, which also say what comes first). How much XLA lays over is its scheduler's choice:
docs/parallelism.md. Training and decoding are the same but for the cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import UserError
from dsv3_jax.model.cache import PagedCache
from dsv3_jax.model.forward_pass import Tokens
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.parallel.sharding import Layout

# Of pairs of (x, tokens, cache); returns as a Block does.
Layer = Callable[..., Any]


def divides(batch: int, layout: Layout) -> bool:
    """Whether every device's share of so many sequences can be cut in two."""
    return batch % (2 * layout.size("batch")) == 0


def check_micro_batches(
    count: int, sequences: int, layout: Layout, paged: bool = True, what: str = "sequences"
) -> None:
    """Raises UserError for micro-batches of a decoding step that would not overlap.

    `what` is what the caller's options name the sequences.
    """
    groups = layout.size("batch")
    if count not in (1, 2) or (count == 2 and not divides(sequences, layout)):
        raise UserError(
            f"micro_batches={count} must be 1, or 2 with {sequences} {what} a multiple of "
            f"2 x {groups} groups of devices"
        )
    if count == 2 and (not paged or layout.size("expert") == 1):
        raise UserError(
            "two micro-batches need a cache in pages, and experts on several devices: without an "
            "exchange there is nothing to overlap"
        )
    if count == 2 and layout.expert.transport == "pallas":
        raise UserError(
            "two micro-batches exchange over each other's products, but transport='pallas' moves "
            "rows by kernels that take turns with them: use --expert-parallel.transport padded"
        )


def in_halves(
    layer: Layer, x: jax.Array, tokens: Tokens, cache: PagedCache | None, layout: Layout
) -> tuple[jax.Array, Any, MoEStats]:
    """What `layer(x, tokens, cache)` returns for the whole batch, computed for both halves; x is
    [B, T, D] and B a multiple of twice the layout's devices."""
    halves = cut(x, layout, "residual")
    both, cache, stats = in_opposite_phases(layer, halves, tokens, layout, cache)
    return joined(both[0], both[1], layout, "residual"), cache, stats


def in_opposite_phases(
    layer: Layer,
    halves: tuple[jax.Array, jax.Array],
    tokens: Tokens,
    layout: Layout,
    cache: PagedCache | None = None,
) -> tuple[tuple[jax.Array, jax.Array], PagedCache | None, MoEStats]:
    """A MoE layer of what `cut` made of x: its outputs, the cache, and statistics of both."""
    caches = None
    if cache is not None:
        caches = tuple(cache.with_table(table) for table in cut(cache.block_table, layout))
    both, new_cache, (stats, other) = layer(halves, _of_halves(tokens, layout), caches)
    if cache is not None:
        new_cache = new_cache.with_table(cache.block_table)
    return both, new_cache, _of_both(stats, other, layout)


def _of_halves(tokens: Tokens, layout: Layout) -> tuple[Tokens, Tokens]:
    assert tokens.decode_schedule is None, "a schedule is of all sequences, on one device"
    by_field = (_cut_tokens(of_token, layout) for of_token in tokens)
    first, second = (Tokens._make(each) for each in zip(*by_field))
    return first, second


def _cut_tokens(of_token: Any, layout: Layout) -> tuple[Any, Any]:
    if of_token is None or of_token.shape[0] == 1:  # positions that all rows share
        return of_token, of_token
    return cut(of_token, layout)


def cut(x: jax.Array, layout: Layout, *dims: str) -> tuple[jax.Array, jax.Array]:
    """The first and the second half of each device's sequences; dims of x after "batch"."""
    return _half(x, 0, layout, *dims), _half(x, 1, layout, *dims)


def _of_both(stats: MoEStats, other: MoEStats, layout: Layout) -> MoEStats:
    """A layer's statistics of the whole that `cut` cut."""
    return MoEStats(
        stats.load_E + other.load_E,
        (stats.balance_loss + other.balance_loss) / 2,
        joined(stats.experts, other.experts, layout, "residual"),
        joined(stats.weights, other.weights, layout, "residual"),
        jnp.maximum(stats.rounds, other.rounds),
    )


def _half(x: jax.Array, half: int, layout: Layout, *dims: str) -> jax.Array:
    """The first or second half of each device's sequences."""
    groups = layout.size("batch")
    of_each = x.reshape(groups, 2, -1, *x.shape[1:])[:, half]
    return layout.constrain(of_each.reshape(-1, *x.shape[1:]), "batch", *dims)


def joined(first: jax.Array, second: jax.Array, layout: Layout, *dims: str) -> jax.Array:
    """The whole that `cut` cut."""
    groups = layout.size("batch")
    both = [x.reshape(groups, -1, *x.shape[1:]) for x in (first, second)]
    whole = jnp.concatenate(both, axis=1).reshape(-1, *first.shape[1:])
    return layout.constrain(whole, "batch", *dims)
