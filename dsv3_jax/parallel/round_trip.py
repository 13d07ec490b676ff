"""Rows on their way to the devices of their experts and back, by all hops that send buffers.

`send` and `give_back` are each other's adjoint: the backward pass of one is the other, over the
same plan, and number formats belong to the direction (see `wire`). Their halves stand for
themselves, so that whoever lays products over them can say what waits for what (`phases.after`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from dsv3_jax.parallel import wire
from dsv3_jax.parallel.collectives import no_gradients
from dsv3_jax.parallel.exchange import Exchange
from dsv3_jax.parallel.hops import Hop, HopPlan, copies, plan_hop, send_back
from dsv3_jax.parallel.hops import send as send_by_hop
from dsv3_jax.parallel.phases import after
from dsv3_jax.quantization.block_scaled import StraightThrough


class Sent(NamedTuple):
    """Rows on this device after all hops that send buffers, and how they came.

    Fields:
        rows: bytes, as `wire.pack` puts a row's parts together; unused places are zeros.
        x, weights: zeros that nobody reads; their gradients are those of the rows' parts.
        plans: of each hop.
        left: whether there are rows for later windows, by hop.
    """

    rows: UInt8[Array, "R bytes"]
    x: Float[Array, "R D"]
    weights: Float[Array, "R K"]
    plans: tuple[HopPlan, ...]
    left: Bool[Array, " hops"]


class Arrived(NamedTuple):
    """What there is of the rows that arrived."""

    x: Float[Array, "R D"] | StraightThrough
    weights: Float[Array, "R K"]
    experts: Int[Array, "R K"]


def send_rows(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int[Array, "T K"],
    window: Int[Array, " levels"],
    exchange: Exchange,
    over: Sequence[Any] = (),
) -> Sent:
    """`send`, for whoever has a backward pass of their own.

    over: arrays; nothing is made of what arrives by the i-th hop before over[i] is there. Or
    functions of what is sent by it to such an array, of work that begins when that is there.
    """
    parts = _parts(x, weights, experts, exchange)
    like = wire.shapes_of(parts)
    rows = wire.pack(parts)
    plans, left = [], []
    for level, hop in enumerate(exchange.buffered):
        choices = wire.unpack(rows, like)[-1].astype(jnp.int32) - 1
        hop_plan, more = plan_hop(choices, hop, window[level])
        rows = _travelled(rows, hop_plan, hop, send_by_hop, over[level : level + 1])
        plans.append(hop_plan)
        left.append(more)
    of_x, of_weights = (
        jnp.zeros_like(part, shape=(len(rows), part.shape[1])) for part in (x, weights)
    )
    return Sent(rows, of_x, of_weights, tuple(plans), jnp.stack(left))


def rows_back(
    arrays: Sequence[Float[Array, "R _"]],
    plans: Sequence[HopPlan],
    exchange: Exchange,
    over: Sequence[Any] = (),
) -> tuple[Array, ...]:
    """The results on the way that their tokens came, summed at every device they pass.

    The first array is in the combined format, any other as it is. over: as `send_rows` has it.
    """
    form, dtype = exchange.combine_format, arrays[0].dtype
    back_by = zip(reversed(exchange.buffered), reversed(plans))
    for level, (hop, hop_plan) in enumerate(back_by):
        channels = arrays[0].shape[1]
        parts = (*wire.encode(arrays[0], form), *arrays[1:])
        like, split = wire.shapes_of(parts), len(parts) - len(arrays) + 1
        rows = wire.pack(parts)
        returned = _travelled(rows, hop_plan, hop, send_back, over[level : level + 1])
        sums: list[Any] = [0.0] * len(arrays)
        for f in range(hop.fanout):
            back = wire.unpack(copies(returned, hop_plan, f), like)
            x = wire.decode(back[:split], form, channels, jnp.float32)
            sums = [a + b for a, b in zip(sums, (x, *back[split:]))]
        # On to the next hop in the rows' own dtype, or as the format rounds.
        arrays = (sums[0].astype(dtype), *sums[1:])
    return tuple(arrays)


def gradients_there(
    d_y: Float[Array, "T D"],
    plans: Sequence[HopPlan],
    exchange: Exchange,
    over: Sequence[Any] = (),
) -> Any:
    """The gradients of what came back, on the way of the tokens; `gradients_of` reads them.

    over: as `send_rows` has it.
    """
    rows = wire.pack(wire.encode(d_y, exchange.dispatch_format))
    for level, (hop, hop_plan) in enumerate(zip(exchange.buffered, plans)):
        rows = _travelled(rows, hop_plan, hop, send_by_hop, over[level : level + 1])
    return rows


def gradients_of(
    rows: Array, like: jax.ShapeDtypeStruct | Array, exchange: Exchange
) -> Float[Array, "R D"]:
    """What `gradients_there` sent; `like` has the channels and the dtype."""
    form, channels = exchange.dispatch_format, like.shape[1]
    shapes = jax.eval_shape(lambda x: wire.encode(x, form), like)
    return wire.decode(wire.unpack(rows, shapes), form, channels, like.dtype)


def _travelled(rows: Array, hop_plan: HopPlan, hop: Hop, by: Any, over: Sequence[Any]) -> Array:
    arrived = by(rows, hop_plan, hop)
    for work in over:
        arrived = after(arrived, work(rows) if callable(work) else work)
    return arrived


def unpacked(sent: Sent, exchange: Exchange) -> Arrived:
    """The parts of rows that arrived; their gradients are those of the carriers."""
    choices = jax.ShapeDtypeStruct(sent.weights.shape, jnp.int32)
    of_parts = functools.partial(_parts, exchange=exchange)
    like = jax.eval_shape(of_parts, sent.x, sent.weights, choices)
    *encoded, weights, numbers = wire.unpack(sent.rows, like)
    encoded = tuple(encoded)
    if exchange.quantized_rows:
        x: Any = StraightThrough(wire.block_scaled(encoded), sent.x)
    else:
        x = wire.decode(encoded, exchange.dispatch_format, sent.x.shape[1], sent.x.dtype)
        x = _carried(lax.stop_gradient(x), sent.x)
    weights = _carried(lax.stop_gradient(weights), sent.weights)
    return Arrived(x, weights, numbers.astype(jnp.int32) - 1)


def _parts(x, weights, experts, exchange: Exchange) -> wire.Parts:
    """What is sent of each token. 0 is what unused places of a buffer hold: nobody."""
    return (*wire.encode(x, exchange.dispatch_format), weights, (experts + 1).astype(jnp.int16))


@jax.custom_vjp
def _carried(value: Array, carrier: Array) -> Array:
    """The value; its gradient is the carrier's."""
    del carrier
    return value


_carried.defvjp(
    lambda value, carrier: (_carried(value, carrier), None), lambda _, d: (jnp.zeros_like(d), d)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def send(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int[Array, "T K"],
    window: Int[Array, " levels"],
    exchange: Exchange,
) -> Sent:
    """Tokens with their choices and gate weights, by all hops, in one collective each."""
    return send_rows(x, weights, experts, window, exchange)


def _send_forward(x, weights, experts, window, exchange):
    sent: Any = send(x, weights, experts, window, exchange)
    return sent, (sent.plans, experts, window)


def _send_backward(exchange: Exchange, residuals, d_sent: Sent):
    plans, experts, window = residuals
    d_x, d_weights = rows_back((d_sent.x, d_sent.weights), plans, exchange)
    return d_x, d_weights, *no_gradients((experts, window))


send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def give_back(
    y: Float[Array, "R D"], plans: tuple[HopPlan, ...], exchange: Exchange
) -> Float[Array, "T D"]:
    """Each token's sum of the results for it, `rows_back` of one array."""
    return rows_back((y,), plans, exchange)[0]


def _give_back_backward(exchange: Exchange, plans, d_y):
    rows = gradients_there(d_y, plans, exchange)
    return gradients_of(rows, d_y, exchange), no_gradients(plans)


give_back.defvjp(
    lambda y, plans, exchange: (give_back(y, plans, exchange), plans), _give_back_backward
)
