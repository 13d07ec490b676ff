"""Moves tokens to the rows of their experts, on this device or others, and the results back.

`dispatch` and `combine` are a pair with a handle between them. The functions run per device, inside
`jax.shard_map`. An `Exchange` says by which hops tokens travel: none (all experts are here), one,
or two. Where the last hop is between devices that read each other's memory, `reading` does it,
without buffers; others are `round_trip`'s.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.parallel.exchange import Exchange
from dsv3_jax.parallel.grouping import Groups, gather_rows, plan, rank_in_group, sum_rows
from dsv3_jax.parallel.hops import HopPlan
from dsv3_jax.parallel.reading import Places, places_of, read, return_sums
from dsv3_jax.parallel.round_trip import Arrived, Sent, give_back, send, unpacked
from dsv3_jax.parallel.rounds import Before
from dsv3_jax.quantization.block_scaled import StraightThrough


class Handle(NamedTuple):
    """What `combine` must know of a `dispatch`."""

    groups: Groups
    weights: Float[Array, "R K"]  # of the choices of each row that arrived
    plans: tuple[HopPlan, ...]
    left: Bool[Array, " levels"]  # whether this device has rows left for later windows, by level
    places: Places | None = None  # of the hop by reading


def dispatch(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int[Array, "T K"],
    exchange: Exchange,
    alignment: int,
    window: Int[Array, " levels"] | None = None,
    gather: Callable[[Any, Groups], Any] = gather_rows,
    before: Before | None = None,
) -> tuple[Float[Array, "M D"] | StraightThrough, Int[Array, " E"], Handle]:
    """The rows of this device's experts, the size of each one's group, and the handle.

    Groups follow each other, padded with zero rows to multiples of `alignment`. An expert
    `hops.NOBODY` gets no row (only where there are hops). With `quantized_rows` the rows are the
    FP8 numbers that were sent. Of rows that do not fit into the buffers, `window` says which ones
    are meant, and the handle whether there are more. `gather` may quantise what it gathers.
    `before` (see `rounds`) is called where what is left is known before any row has moved.
    """
    if not exchange.hops:
        groups, sizes, _ = plan(experts, exchange.experts, alignment)
        left = jnp.zeros(1, bool)
        return gather(x, groups), sizes, Handle(groups, weights, (), left)
    if window is None:
        window = jnp.zeros(exchange.levels, jnp.int32)
    if exchange.reading is not None:
        arrived, plans, left = Arrived(x, weights, experts), (), None
        if exchange.buffered:
            sent: Any = send(x, weights, experts, window, exchange)
            arrived, plans, left = unpacked(sent, exchange), sent.plans, sent.left
        return _dispatch_by_reading(arrived, plans, left, exchange, alignment, window, before)
    sent = send(x, weights, experts, window, exchange)
    return arrange(sent, exchange, alignment, window, gather)


def arrange(
    sent: Sent,
    exchange: Exchange,
    alignment: int,
    window: Int[Array, " levels"],
    gather: Callable[[Any, Groups], Any] = gather_rows,
) -> tuple[Float[Array, "M D"] | StraightThrough, Int[Array, " E"], Handle]:
    """What `dispatch` makes of rows that arrived by hops that send buffers."""
    arrived = unpacked(sent, exchange)
    local, left = _own_entries(arrived.experts, exchange, window[-1])
    groups, sizes, _ = plan(local, exchange.experts, alignment, exchange.entries)
    handle = Handle(groups, arrived.weights, sent.plans, jnp.append(sent.left, left))
    return gather(arrived.x, groups), sizes, handle


def rows_left(
    sent: Sent, exchange: Exchange, window: Int[Array, " levels"]
) -> Bool[Array, " levels"]:
    """What the handle of `arrange` says of rows for later windows."""
    left = _own_entries(unpacked(sent, exchange).experts, exchange, window[-1])[1]
    return jnp.append(sent.left, left)


def _dispatch_by_reading(
    sent: Arrived, plans, sent_left, exchange: Exchange, alignment, window, before: Before | None
):
    """The last hop of `dispatch`: every device learns all choices, and reads the rows it needs."""
    hop = exchange.reading
    assert hop is not None
    experts, weights = hop.of_all(sent.experts, known_alike=True), hop.of_all(sent.weights)
    local = _own_entries(experts, exchange, window[-1])[0]
    groups, sizes, load = plan(local, exchange.experts, alignment, exchange.entries)
    places = places_of(groups, sizes, load, sent.experts, hop)
    # No array of no elements: as a residual in a scan it breaks XLA's partitioner (jax 0.11.2).
    earlier = [] if sent_left is None else [sent_left]
    more = _any_left(experts, exchange, window[-1])
    left = jnp.concatenate([*earlier, jnp.zeros(1, bool), more[None]])
    if before is not None and not earlier:
        places = before(left, places)
    handle = Handle(groups, weights, plans, left, places)
    return read(sent.x, places, hop), sizes, handle


def combine(rows: Float[Array, "M D"], handle: Handle, exchange: Exchange) -> Float[Array, "T D"]:
    """Each token's weighted sum of its experts' rows, in the rows' dtype.

    Summed in f32 at the experts' device, and once more at each device it passes on its way back.
    """
    y: Any
    if exchange.reading is not None:
        assert handle.places is not None
        y = return_sums(rows, handle.weights, handle.places, exchange.reading)
    else:
        y = sum_rows(rows, handle.weights, handle.groups)
    return send_back(y, handle, exchange)


def send_back(y: Float[Array, "R D"], handle: Handle, exchange: Exchange) -> Float[Array, "T D"]:
    """`combine` of what arrived tokens' experts here add up to."""
    return y if not exchange.buffered else give_back(y, handle.plans, exchange)


def _own_entries(experts_RK, exchange: Exchange, window):
    """Each choice's expert as numbered here, `exchange.experts` for those of others."""
    axes = tuple(axis for hop in exchange.hops for axis in hop.axes)
    local = experts_RK - lax.axis_index(axes) * exchange.experts
    own = (local >= 0) & (local < exchange.experts)
    assert exchange.entries is not None
    number = rank_in_group(jnp.where(own, 0, 1).reshape(-1), 1)[0].reshape(own.shape)
    number -= window * exchange.entries
    left = (own & (number >= exchange.entries)).any()
    own &= (number >= 0) & (number < exchange.entries)
    return jnp.where(own, local, exchange.experts), left


def _any_left(experts_RK, exchange: Exchange, window):
    """Whether any of the last hop's devices has entries for later windows; all know the choices."""
    hop = exchange.hops[-1]
    assert exchange.entries is not None
    first = 0 if not hop.before else lax.axis_index(hop.before) * hop.size
    device = experts_RK // exchange.experts - first
    peers = jnp.arange(hop.size, dtype=device.dtype)
    entries = (device.reshape(-1, 1) == peers).sum(0, dtype=jnp.int32)
    return (entries > (window + 1) * exchange.entries).any()
