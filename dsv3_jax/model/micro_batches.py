"""Two half-batches through a layer: one computes while the other's tokens are on their way.

V3 report, section 3.4.2, and ISCA paper, section 2.3.1: decoding on many devices spends as long on
the experts' exchange as on attention. Each device's sequences are cut in two. Neither half reads
what the other has computed, so that XLA may lay the exchange of one over what the other computes;
the second begins its attention when the first has ended its own. How much XLA does lay over is its
scheduler's choice: docs/log.md (2026-11-29) has what it made of it. `in_halves` is of decoding;
training's layers take both halves together (`in_opposite_phases`), so that their experts alternate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import UserError
from dsv3_jax.model.cache import PagedCache
from dsv3_jax.model.forward_pass import Tokens
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.parallel.sharding import Layout

# Of (x, tokens, cache, between); returns as a Block does.
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


def in_halves(
    layer: Layer, x: jax.Array, tokens: Tokens, cache: PagedCache, layout: Layout
) -> tuple[jax.Array, PagedCache, MoEStats | None]:
    """What `layer(x, tokens, cache)` returns for the whole batch, computed for one half and the
    other; x is [B, T, D] and B a multiple of twice the layout's devices."""
    assert tokens.decode_schedule is None, "a schedule is of all sequences, on one device"
    table, done, attended = cache.block_table, [], []

    def between(x: jax.Array) -> jax.Array:
        attended.append(x)
        return x

    for half in (0, 1):
        take = partial(_half, half=half, layout=layout)
        of_half = take(x)
        if attended:
            of_half, _ = jax.lax.optimization_barrier((of_half, attended[0]))
        held = cache.with_table(take(table))
        y, cache, stats = layer(of_half, jax.tree.map(take, tokens), held, between)
        done.append((y, stats))
    (y, stats), (other_y, other_stats) = done
    stats = None if stats is None else _of_both(stats, other_stats, layout)
    return joined(y, other_y, layout), cache.with_table(table), stats


def in_opposite_phases(
    layer: Layer, halves: tuple[jax.Array, jax.Array], tokens: Tokens, layout: Layout
) -> tuple[tuple[jax.Array, jax.Array], MoEStats]:
    """A MoE layer of training: (its outputs, statistics of both), of what `cut` made of x."""
    assert tokens.decode_schedule is None
    by_field = (_cut_tokens(of_token, layout) for of_token in tokens)
    of_halves = tuple(Tokens._make(each) for each in zip(*by_field))
    y, _, (stats, other_stats) = layer(halves, of_halves)
    return y, _of_both(stats, other_stats, layout)


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
