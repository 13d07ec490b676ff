"""One hop: each row goes, once, to every peer along a mesh axis that has an expert of its token.

The one idea: a row that several experts of one peer wait for is sent to it once, and what comes
back is summed before it travels on. With the hops node, then local, a token crosses to a node at
most once, and its results are added up there on the way back, as DeepEP does inside its kernels
(github.com/deepseek-ai/DeepEP). Sending and returning are each other's adjoint. Both are gathers
around a collective: no scatter-add, and sums in a fixed order, hence bitwise reproducible.

Buffers have a fixed size. Rows beyond it wait for the next window (see `rounds`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from dsv3_jax.parallel.collectives import Axes, exchange, ragged_all_to_all

NOBODY = -1  # in place of an expert: a choice that is not to be sent


@dataclass(frozen=True)
class Hop:
    """An exchange of rows along an axis of the mesh, or along several taken as one; static.

    Fields:
        axes, size: the axes and the number of devices along them.
        before: the axes of the hops before this one. The devices along them hold other experts.
        span: experts behind each peer.
        rows: rows that may set out from a device.
        capacity: rows of the buffer for each peer; `rows` if it cannot overflow.
        fanout: the most peers that one row can need.
        transport: how rows travel. allgather: every row to every peer; padded: whole buffers;
            ragged: of each buffer the rows in use; pallas: no buffers, peers read each other's rows
            (`reading`; the last hop only).
    """

    axes: Axes
    size: int
    before: Axes
    span: int
    rows: int
    capacity: int
    fanout: int
    transport: Literal["allgather", "padded", "ragged", "pallas"]

    @property
    def may_overflow(self) -> bool:
        """Whether there can be more rows for a peer than its buffer holds."""
        return self.capacity < self.rows


class HopPlan(NamedTuple):
    """Who sends what where; arrays."""

    source_NC: Int[Array, "N C"]  # the row at each place of each peer's buffer; R: none
    place_RF: Int[Array, "R F"]  # where a row's copies lie in the buffers, N*C for none
    sent_N: Int[Array, " N"]  # rows in use of the buffer for each peer
    received_N: Int[Array, " N"]  # and of the buffer from each peer


def needs(experts_RK: Int[Array, "R K"], hop: Hop) -> Bool[Array, "R N"]:
    """True where a row has an expert behind a peer.

    Only experts behind this device's own peers count: a row that was handed on by another node's
    request is not sent to all of its nodes again.
    """
    first = 0 if not hop.before else lax.axis_index(hop.before) * hop.size
    peer_RK = experts_RK // hop.span - first
    return (peer_RK[:, :, None] == jnp.arange(hop.size, dtype=peer_RK.dtype)).any(axis=1)


def plan_hop(
    experts_RK: Int[Array, "R K"], hop: Hop, window: Int[Array, ""]
) -> tuple[HopPlan, Bool[Array, ""]]:
    """The plan of one window, and whether rows are left for the windows after it.

    The rows that a peer waits for are numbered in order; window w takes those from w * capacity on.
    """
    need_RN = needs(experts_RK, hop)
    rows, size, capacity = hop.rows, hop.size, hop.capacity
    peer_N = jnp.arange(size, dtype=jnp.int32)
    row_RN = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], need_RN.shape)
    if hop.transport == "allgather":
        number_RN, left = row_RN, jnp.zeros((), bool)
    else:
        number_RN = jnp.cumsum(need_RN, axis=0, dtype=jnp.int32) - 1 - window * capacity
        left = (need_RN & (number_RN >= capacity)).any()
        need_RN &= (number_RN >= 0) & (number_RN < capacity)
    number_RN = jnp.where(need_RN, number_RN, capacity)
    source = jnp.full((size, capacity), rows, jnp.int32)
    source = source.at[jnp.broadcast_to(peer_N, need_RN.shape), number_RN].set(row_RN, mode="drop")
    place_RF = jnp.where(need_RN, peer_N * capacity + number_RN, size * capacity)
    if hop.fanout < size:
        place_RF = jnp.sort(place_RF, axis=1)[:, : hop.fanout]
    sent = need_RN.sum(axis=0, dtype=jnp.int32)
    received = exchange(sent, hop.axes) if hop.transport == "ragged" else sent
    return HopPlan(source, place_RF, sent, received), left


def send(rows: Array, plan: HopPlan, hop: Hop) -> Array:
    """[R, ...] to [N*C, ...]: the rows of each peer's buffer for this device, zeros where unused.

    allgather fills in rows that this device has no use for.
    """
    if hop.transport == "allgather":
        return lax.all_gather(rows, hop.axes, tiled=True)
    buffers = jnp.take(rows, plan.source_NC, axis=0, mode="fill", fill_value=0)
    return _move(buffers, plan.sent_N, plan.received_N, hop)


def send_back(rows: Array, plan: HopPlan, hop: Hop) -> Array:
    """[N*C, ...] to [N*C, ...]: what lay at a place of a peer's buffer, at that place of ours."""
    buffers = rows.reshape(hop.size, hop.capacity, *rows.shape[1:])
    return _move(buffers, plan.received_N, plan.sent_N, hop)


def copies(returned: Array, plan: HopPlan, f: int) -> Array:
    """[N*C, ...] to [R, ...]: what came back for each row from the f-th of its peers, or zeros."""
    return jnp.take(returned, plan.place_RF[:, f], axis=0, mode="fill", fill_value=0)


def _move(buffers: Array, sent, received, hop: Hop) -> Array:
    """Buffer d to peer d."""
    flat = (hop.size * hop.capacity, *buffers.shape[2:])
    if hop.transport != "ragged":
        return exchange(buffers, hop.axes).reshape(flat)
    first = jnp.arange(hop.size, dtype=jnp.int32) * hop.capacity
    mine = jnp.full_like(sent, hop.capacity) * lax.axis_index(hop.axes)
    # Zeros, not whatever the memory held: unused rows meet the weights' gradient, and 0 * NaN is
    # NaN.
    flat_rows = buffers.reshape(flat)
    return ragged_all_to_all(
        flat_rows, jnp.zeros_like(flat_rows), first, sent, mine, received, axes=hop.axes
    )
