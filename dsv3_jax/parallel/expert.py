"""Moves tokens to the rows of their experts, on this device or others, and the results back.

`dispatch` and `combine` are a pair with a handle between them. An `Exchange` says, statically, by
which hops tokens travel: none (all experts are here), one, or two. The functions run per device,
inside `jax.shard_map`. `_send` and `_give_back` are each other's adjoint: the backward pass of one
is the other, over the same plan, and number formats belong to the direction (see `wire`). Where the
last hop is between devices that read each other's memory, `reading` does it, without buffers.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ExpertParallelConfig
from dsv3_jax.parallel import wire
from dsv3_jax.parallel.collectives import Axes
from dsv3_jax.parallel.grouping import Groups, gather_rows, plan, rank_in_group, sum_rows
from dsv3_jax.parallel.hops import Hop, HopPlan, copies, plan_hop, send, send_back
from dsv3_jax.parallel.reading import Places, Reading, places_of, read, return_sums
from dsv3_jax.parallel.rounds import Before
from dsv3_jax.quantization.block_scaled import BlockScaled, StraightThrough


@dataclass(frozen=True)
class Exchange:
    """How tokens reach their experts; static.

    Fields:
        hops: one after the other; none when every device holds all experts.
        experts: how many each device holds.
        entries: (token, choice) pairs that a device takes in one window; None: all.
        token_axes: the mesh axes that tokens are spread over.
        dispatch_format, combine_format: on the wire, by direction.
        quantized_rows: whether the experts are given the FP8 numbers that arrived.
        overflow: "rounds", "loop" or "error", see ExpertParallelConfig.
        multiprocessors: of a GPU that the hop of peers who read each other's memory may use.
    """

    hops: tuple[Hop, ...]
    experts: int
    entries: int | None
    token_axes: Axes
    dispatch_format: wire.Format = "none"
    combine_format: wire.Format = "none"
    quantized_rows: bool = False
    overflow: str = "rounds"
    multiprocessors: int = 20

    @property
    def buffered(self) -> tuple[Hop, ...]:
        """The hops that send buffers."""
        return self.hops if self.reading is None else self.hops[:-1]

    @property
    def reading(self) -> Reading | None:
        """The last hop, if its peers read each other's rows."""
        if not self.hops or self.hops[-1].transport != "pallas":
            return None
        quantize = self.dispatch_format == "fp8"
        returned = jnp.bfloat16 if self.combine_format == "bf16" else None
        return Reading(self.hops[-1], quantize, self.quantized_rows, returned, self.multiprocessors)

    @property
    def levels(self) -> int:
        """Where windows are counted: at every hop, and at the experts."""
        return len(self.hops) + 1

    @property
    def rows(self) -> int:
        """Rows that arrive at a device after all hops, unused ones included."""
        return self.hops[-1].size * self.hops[-1].capacity


class Handle(NamedTuple):
    """What `combine` must know of a `dispatch`."""

    groups: Groups
    weights: Float[Array, "R K"]  # of the choices of each row that arrived
    plans: tuple[HopPlan, ...]
    left: Bool[Array, " levels"]  # whether this device has rows left for later windows, by level
    places: Places | None = None  # of the hop by reading


def make_exchange(
    config: ExpertParallelConfig,
    expert_axes: Mapping[str, int],
    token_axes: Axes,
    *,
    tokens: int,
    per_token: int,
    num_experts: int,
    max_nodes: int | None = None,
    limit_is_certain: bool = True,
    quantized_rows: bool = False,
) -> Exchange:
    """The exchange of `tokens` tokens a device among experts spread over `expert_axes`.

    expert_axes holds the sizes of the axes, slowest first; experts lie on them in that order. At
    even load a token's per_token choices lie on as many devices, and at most max_nodes of the first
    axis; capacity_factor times the rows that this makes is what a buffer holds. Unless
    limit_is_certain a token may go to more nodes than max_nodes, and no result is lost.

    Raises ValueError when experts do not divide over the axes, and for the transport "local" when
    they are spread at all.
    """
    axes = {axis: size for axis, size in expert_axes.items() if size > 1}
    devices = math.prod(axes.values())
    if num_experts % devices:
        raise ValueError(f"{num_experts=} must be a multiple of the {devices} devices of {axes}")
    if num_experts >= 2**15:
        raise ValueError(f"{num_experts=} must be below {2**15}: experts are sent as int16")
    here = num_experts // devices
    if devices == 1:
        return Exchange((), here, None, token_axes)
    if config.transport == "local":
        raise ValueError(f"transport 'local' moves nothing, but experts are spread over {axes}")
    if config.transport == "auto":
        raise ValueError(
            "transport 'auto' is still to be chosen: call `transports.resolve` with the mesh"
        )
    if config.transport == "pallas" and config.combine_format == "logfmt10":
        raise ValueError(
            "transport 'pallas' sends results as they are or in BF16, not in 'logfmt10': use "
            "'padded', or another combine_format"
        )
    steps = [(axis,) for axis in axes] if config.hierarchical else [tuple(axes)]
    limited = config.hierarchical and next(iter(expert_axes)) in axes  # the first hop is to nodes
    hops: list[Hop] = []
    rows, reached = tokens, 1
    for step in steps:
        transport = config.transport
        if transport == "pallas" and step != steps[-1]:
            transport = "padded"
        size = math.prod(axes[axis] for axis in step)
        reached *= size
        spread = most = min(per_token, reached)
        if max_nodes is not None and limited and not hops:
            spread = min(spread, max_nodes)
            most = spread if limit_is_certain else most
        even = math.ceil(config.capacity_factor * tokens * spread / size)
        hop = Hop(
            axes=step,
            size=size,
            before=tuple(axis for hop in hops for axis in hop.axes),
            span=num_experts // reached,
            rows=rows,
            capacity=rows if transport in ("allgather", "pallas") else min(rows, even),
            fanout=min(per_token if hops else most, size),
            transport=transport,
        )
        hops.append(hop)
        rows = hop.size * hop.capacity
    entries = math.ceil(config.capacity_factor * tokens * per_token)
    return Exchange(
        tuple(hops),
        here,
        min(rows * min(per_token, here), entries),
        token_axes,
        config.dispatch_format,
        config.combine_format,
        quantized_rows and config.dispatch_format == "fp8",
        config.overflow,
        config.multiprocessors,
    )


def may_overflow(exchange: Exchange, per_token: int) -> bool:
    """Whether some routing does not fit into one window."""
    if not exchange.hops:
        return False
    all_entries = exchange.rows * min(per_token, exchange.experts)
    assert exchange.entries is not None
    return any(hop.may_overflow for hop in exchange.hops) or exchange.entries < all_entries


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
    sent: Any = _Sent(x, None, weights, experts, (), None)
    if exchange.buffered:
        sent = _send(x, weights, experts, window, exchange)
    if exchange.reading is not None:
        return _dispatch_by_reading(sent, exchange, alignment, window, before)
    local, left = _own_entries(sent.experts, exchange, window[-1])
    groups, sizes, _ = plan(local, exchange.experts, alignment, exchange.entries)
    arrived = sent.x if sent.numbers is None else StraightThrough(sent.numbers, sent.x)
    handle = Handle(groups, sent.weights, sent.plans, jnp.append(sent.left, left))
    return gather(arrived, groups), sizes, handle


def _dispatch_by_reading(
    sent: Any, exchange: Exchange, alignment: int, window, before: Before | None
):
    """The last hop of `dispatch`: every device learns all choices, and reads the rows it needs."""
    hop = exchange.reading
    assert hop is not None
    experts, weights = hop.of_all(sent.experts, known_alike=True), hop.of_all(sent.weights)
    local = _own_entries(experts, exchange, window[-1])[0]
    groups, sizes, load = plan(local, exchange.experts, alignment, exchange.entries)
    places = places_of(groups, sizes, load, sent.experts, hop)
    arrived = sent.x if sent.numbers is None else StraightThrough(sent.numbers, sent.x)
    # No array of no elements: as a residual in a scan it breaks XLA's partitioner (jax 0.11.2).
    earlier = [] if sent.left is None else [sent.left]
    more = _any_left(experts, exchange, window[-1])
    left = jnp.concatenate([*earlier, jnp.zeros(1, bool), more[None]])
    if before is not None and not earlier:
        places = before(left, places)
    handle = Handle(groups, weights, sent.plans, left, places)
    return read(arrived, places, hop), sizes, handle


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
    return y if not exchange.buffered else _give_back(y, handle.plans, exchange)


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


class _Sent(NamedTuple):
    """What arrived after all hops, and how it came."""

    x: Float[Array, "R D"]  # zeros that carry the gradient where `numbers` are given
    numbers: BlockScaled | None
    weights: Float[Array, "R K"]
    experts: Int[Array, "R K"]
    plans: tuple[HopPlan, ...]
    left: Bool[Array, " hops"] | None  # None of no hops


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _send(x, weights, experts, window, exchange: Exchange) -> _Sent:
    """Tokens with their choices and gate weights, by all hops, in one collective each."""
    # 0 is what unused places of a buffer hold: nobody.
    parts = (*wire.encode(x, exchange.dispatch_format), weights, (experts + 1).astype(jnp.int16))
    like = wire.shapes_of(parts)
    rows = wire.pack(parts)
    plans, left = [], []
    for level, hop in enumerate(exchange.buffered):
        choices = wire.unpack(rows, like)[-1].astype(jnp.int32) - 1
        hop_plan, more = plan_hop(choices, hop, window[level])
        rows = send(rows, hop_plan, hop)
        plans.append(hop_plan)
        left.append(more)
    *encoded, weights, choices = wire.unpack(rows, like)
    encoded = tuple(encoded)
    if exchange.quantized_rows:
        numbers = wire.block_scaled(encoded)
        x = jnp.zeros_like(x, shape=(rows.shape[0], x.shape[1]))
    else:
        numbers = None
        x = wire.decode(encoded, exchange.dispatch_format, x.shape[1], x.dtype)
    choices = choices.astype(jnp.int32) - 1
    return _Sent(x, numbers, weights, choices, tuple(plans), jnp.stack(left))


def _send_fwd(x, weights, experts, window, exchange):
    sent: Any = _send(x, weights, experts, window, exchange)
    return sent, (sent.plans, experts, window)


def _send_bwd(exchange: Exchange, residuals, d_sent: _Sent):
    plans, experts, window = residuals
    d_x, d_weights = _hops_back((d_sent.x, d_sent.weights), plans, exchange)
    none = (np.zeros(experts.shape, jax.dtypes.float0), np.zeros(window.shape, jax.dtypes.float0))
    return d_x, d_weights, *none


_send.defvjp(_send_fwd, _send_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _give_back(y, plans: tuple[HopPlan, ...], exchange: Exchange):
    """The results on the way that their tokens came, summed at every device they pass."""
    return _hops_back((y,), plans, exchange)[0]


def _give_back_bwd(exchange: Exchange, plans, d_y):
    form = exchange.dispatch_format
    parts = wire.encode(d_y, form)
    like = wire.shapes_of(parts)
    rows = wire.pack(parts)
    for hop, hop_plan in zip(exchange.buffered, plans):
        rows = send(rows, hop_plan, hop)
    d_rows = wire.decode(wire.unpack(rows, like), form, d_y.shape[1], d_y.dtype)
    return d_rows, jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), plans)


_give_back.defvjp(
    lambda y, plans, exchange: (_give_back(y, plans, exchange), plans), _give_back_bwd
)


def _hops_back(arrays: Any, plans, exchange: Exchange) -> Any:
    """The hops in reverse. The first array is in the combined format, any other as it is."""
    form, dtype = exchange.combine_format, arrays[0].dtype
    for hop, hop_plan in zip(reversed(exchange.buffered), reversed(plans)):
        channels = arrays[0].shape[1]
        parts = (*wire.encode(arrays[0], form), *arrays[1:])
        like, split = wire.shapes_of(parts), len(parts) - len(arrays) + 1
        returned = send_back(wire.pack(parts), hop_plan, hop)
        sums: list[Any] = [0.0] * len(arrays)
        for f in range(hop.fanout):
            back = wire.unpack(copies(returned, hop_plan, f), like)
            x = wire.decode(back[:split], form, channels, jnp.float32)
            sums = [a + b for a, b in zip(sums, (x, *back[split:]))]
        # On to the next hop in the rows' own dtype, or as the format rounds.
        arrays = (sums[0].astype(dtype), *sums[1:])
    return arrays
