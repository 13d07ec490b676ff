"""How tokens reach their experts: by which hops, in which formats, with buffers of which size.

An `Exchange` is static, made from the run's options, the mesh and the number of tokens. `hops` has
a hop, `round_trip` sends rows by all of them and back, `expert` makes rows of experts of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from dsv3_jax.config import ExpertParallelConfig
from dsv3_jax.parallel import wire
from dsv3_jax.parallel.collectives import Axes
from dsv3_jax.parallel.hops import Hop
from dsv3_jax.parallel.reading import Reading


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
