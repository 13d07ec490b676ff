"""Flow-level simulation: max-min fair rates on any links, followed until the last byte.

Packets, congestion control and latency are left out: a transfer is a fluid that fills its fair
share at once. `fabric` lays the links and finds the paths; here links are only numbers.

The one idea: a path is a list of segments, and a segment spreads its flow over links with fixed
fractions. A plain hop is a segment of one link; adaptive routing is one segment over all spines. So
half a million flows cost two integer arrays, and a step of water-filling a few `bincount`s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

# Two rates closer than this are equal: max-min levels are sums of a few thousand float64 terms.
SAME = 1e-9


@dataclass(frozen=True)
class Routes:
    """Paths: `hops[f]` are segment numbers, padded with `segments`, which is no segment.

    Segment s puts `fractions[i]` of its flow on link `links[i]`, for i in starts[s]..starts[s+1].
    """

    hops: Int[np.ndarray, "flows hops"]
    starts: Int[np.ndarray, " segments"]
    links: Int[np.ndarray, " entries"]
    fractions: Float[np.ndarray, " entries"]

    @cached_property
    def _segment(self) -> np.ndarray:
        """The segment each entry belongs to."""
        return np.repeat(np.arange(self.starts.size), np.diff(self.starts, append=self.links.size))

    def per_segment(self, hops: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Total weight (or count) of the flows on each segment."""
        if weights is not None:
            weights = np.repeat(weights, hops.shape[1])
        return np.bincount(hops.reshape(-1), weights, self.starts.size + 1)[:-1]

    def per_link(self, per_segment: np.ndarray, num_links: int) -> np.ndarray:
        """Load of each link when `per_segment` flows through the segments."""
        weights = per_segment[self._segment] * self.fractions
        return np.bincount(self.links, weights, num_links)

    def least_per_segment(self, per_link: np.ndarray) -> np.ndarray:
        """The least value among each segment's links; infinity for the padding."""
        return np.append(np.minimum.reduceat(per_link[self.links], self.starts), np.inf)

    def least_per_link(self, per_segment: np.ndarray, num_links: int) -> np.ndarray:
        """The least value among the segments that use each link; infinity where none does."""
        least = np.full(num_links, np.inf)
        np.minimum.at(least, self.links, per_segment[self._segment])
        return least


def plain_routes(hops: Int[np.ndarray, "flows hops"], num_links: int) -> Routes:
    """Routes over single links: hop numbers are link numbers, `num_links` is the padding."""
    every = np.arange(num_links)
    return Routes(hops, every, every, np.ones(num_links))


def max_min_rates(
    routes: Routes, capacity: Float[np.ndarray, " links"], slack: float = SAME
) -> Float[np.ndarray, " flows"]:
    """Max-min fair rates, bytes a second: no flow can gain without one at most as fast losing.

    Water-filling (Bertsekas and Gallager, Data Networks, section 6.5), with every link that is the
    tightest of all its flows frozen in the same step: shares only grow while filling goes on, so
    such a link's share is final. With `slack` a link counts as tightest when it is so within that
    fraction: never over capacity, fair to that fraction, and far fewer steps when thousands of
    hashed links differ a little. Flows without a link get infinity.
    """
    rates = np.zeros(routes.hops.shape[0])
    left = capacity.astype(float).copy()
    active = np.arange(rates.size)
    hops = routes.hops
    while active.size:
        load = routes.per_link(routes.per_segment(hops), left.size)
        share = np.full(left.size, np.inf)
        np.divide(left, load, out=share, where=load > 0)
        level = routes.least_per_segment(share)[hops].min(axis=1)
        tightest = np.full(routes.starts.size + 1, np.inf)
        np.minimum.at(tightest, hops.reshape(-1), np.repeat(level, hops.shape[1]))
        least = routes.least_per_link(tightest[:-1], left.size)
        final = (load > 0) & (share <= least * (1 + slack))
        frozen = (routes.least_per_segment(np.where(final, 0.0, 1.0))[hops] == 0).any(axis=1)
        frozen |= np.isinf(level)
        assert frozen.any(), "water-filling made no progress"
        rates[active[frozen]] = level[frozen]
        finite = np.where(np.isinf(level[frozen]), 0.0, level[frozen])
        left -= routes.per_link(routes.per_segment(hops[frozen], finite), left.size)
        np.maximum(left, 0.0, out=left)
        active, hops = active[~frozen], hops[~frozen]
    return rates


@dataclass(frozen=True)
class Outcome:
    """What a simulation found; `utilisation` is each link's carried over possible bytes."""

    seconds: float  # until the last flow ends
    finish: Float[np.ndarray, " flows"]
    first_rates: Float[np.ndarray, " flows"]  # while all flows are active
    utilisation: Float[np.ndarray, " links"]

    def busiest(self) -> int:
        """The link with the highest utilisation."""
        return int(np.argmax(self.utilisation))


def simulate(
    routes: Routes,
    sizes: Float[np.ndarray, " flows"],
    capacity: Float[np.ndarray, " links"],
    resolution: float = 0.01,
) -> Outcome:
    """Runs all flows from time 0 until each has moved its bytes, sharing anew as flows end.

    Flows whose ends lie within `resolution` (a fraction of the time since 0) of each other end
    together, at the later one, and rates are fair to that fraction. A flow so holds its share at
    most that much longer than it needs: times are exact to about twice `resolution`. ValueError
    when a flow with bytes can never end.
    """
    if sizes.shape != routes.hops.shape[:1]:
        raise ValueError(
            f"{sizes.shape=} must have one entry for each of {routes.hops.shape[0]} flows"
        )
    left = sizes.astype(float).copy()
    finish = np.zeros(left.size)
    active = np.flatnonzero(left > 0)
    first_rates = np.zeros(left.size)
    now, started = 0.0, False
    while active.size:
        view = Routes(routes.hops[active], routes.starts, routes.links, routes.fractions)
        rates = max_min_rates(view, capacity, max(resolution, SAME))
        if not started:
            first_rates[active], started = rates, True
        if not rates.min() > 0:
            raise ValueError(f"{int((rates <= 0).sum())} flows have no live path: they never end")
        needs = left[active] / rates
        first = needs.min()
        over = needs <= first + resolution * (now + first)
        step = needs[over].max()
        now += step
        finish[active[over]] = now
        left[active] -= rates * step
        active = active[~over]
    carried = routes.per_link(routes.per_segment(routes.hops, sizes), capacity.size)
    possible = capacity * now
    used = np.divide(carried, possible, out=np.zeros_like(carried), where=possible > 0)
    return Outcome(now, finish, first_rates, used)
