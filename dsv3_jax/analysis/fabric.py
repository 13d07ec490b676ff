"""The training cluster's network: planes, rails, leaves and spines, failures, and routing.

A `Fabric` is the cluster of the ISCA paper (section 5.1): nodes of GPUs with a NIC each, NIC i on
rail i, rails spread over planes, every plane a two-layer fat tree whose leaves hold one rail.
`route` turns demands between GPUs into `network.Routes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.analysis.network import Routes, plain_routes
from dsv3_jax.config import UserError

Routing = Literal["ecmp", "static", "adaptive"]
Forwarding = Literal["sender", "receiver", "none"]


@dataclass(frozen=True)
class Fabric:
    """A cluster and its network; bandwidths one-way, bytes a second, one NIC a GPU.

    `planes=gpus_per_node` is the multi-plane fat tree (MPFT), `planes=1` the multi-rail fat tree
    (MRFT). A leaf has `leaf_ports` ports down and as many cables up, one path to the spines each.
    Dead cables are (plane, leaf, path).
    """

    nodes: int
    planes: int = 8
    gpus_per_node: int = 8
    leaf_ports: int = 32
    nic_bandwidth: float = 50e9
    scale_up_bandwidth: float = 200e9
    dead_planes: tuple[int, ...] = ()
    dead_cables: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "planes", "gpus_per_node", "leaf_ports"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        for name in ("nic_bandwidth", "scale_up_bandwidth"):
            value = getattr(self, name)
            if not 0 < value < np.inf:
                raise UserError(f"{name}={value} must be a positive number of bytes a second")
        if self.gpus_per_node % self.planes:
            raise UserError(
                f"planes={self.planes} must divide gpus_per_node={self.gpus_per_node}: "
                "each plane takes a whole number of rails"
            )
        for plane in self.dead_planes:
            if not 0 <= plane < self.planes:
                raise UserError(f"dead plane {plane} is not one of the {self.planes} planes")
        if len(set(self.dead_planes)) == self.planes:
            raise UserError(f"all {self.planes} planes are dead: nothing connects the nodes")
        for plane, leaf, path in self.dead_cables:
            inside = plane < self.planes and leaf < self.leaves and path < self.leaf_ports
            if min(plane, leaf, path) < 0 or not inside:
                raise UserError(
                    f"dead cable {plane, leaf, path} is outside {self.planes} planes of "
                    f"{self.leaves} leaves of {self.leaf_ports} cables"
                )

    @property
    def gpus(self) -> int:
        """Endpoints: GPU g of node n is number n * gpus_per_node + g."""
        return self.nodes * self.gpus_per_node

    @property
    def leaves(self) -> int:
        """Leaves of one plane."""
        return self.gpus_per_node // self.planes * self.leaves_per_rail

    @property
    def leaves_per_rail(self) -> int:
        """Leaves that one rail of all nodes takes."""
        return -(-self.nodes // self.leaf_ports)

    @cached_property
    def _first(self) -> dict[str, int]:
        """Where each kind of link starts in the numbering of links."""
        cables = self.planes * self.leaves * self.leaf_ports
        sizes = {
            "scale-up send": self.gpus,
            "scale-up receive": self.gpus,
            "NIC send": self.gpus,
            "NIC receive": self.gpus,
            "leaf to spine": cables,
            "spine to leaf": cables,
        }
        first, total = {}, 0
        for name, size in sizes.items():
            first[name] = total
            total += size
        return first | {"end": total}

    @cached_property
    def capacity(self) -> Float[np.ndarray, " links"]:
        """Bytes a second of every link; links of dead planes and dead cables carry nothing."""
        first = self._first
        capacity = np.full(first["end"], self.nic_bandwidth)
        capacity[: first["NIC send"]] = self.scale_up_bandwidth
        dead = ~self._alive.reshape(-1)
        capacity[first["leaf to spine"] : first["spine to leaf"]][dead] = 0.0
        capacity[first["spine to leaf"] :][dead] = 0.0
        return capacity

    @cached_property
    def _alive(self) -> np.ndarray:
        alive = np.ones((self.planes, self.leaves, self.leaf_ports), bool)
        alive[list(self.dead_planes)] = False
        for cable in self.dead_cables:
            alive[cable] = False
        return alive

    def link_name(self, link: int) -> str:
        """What a link is, in words, for reports."""
        kinds = [(start, name) for name, start in self._first.items() if start <= link]
        start, name = max(kinds)
        index = link - start
        if "spine" in name:
            plane, leaf, path = np.unravel_index(index, self._alive.shape)
            return f"{name}: plane {plane}, leaf {leaf}, cable {path}"
        return f"{name}: node {index // self.gpus_per_node}, GPU {index % self.gpus_per_node}"


@dataclass(frozen=True)
class Traffic:
    """Demands: `bytes[f]` from GPU `source[f]` to GPU `target[f]`."""

    source: Int[np.ndarray, " flows"]
    target: Int[np.ndarray, " flows"]
    bytes: Float[np.ndarray, " flows"]

    def __add__(self, other: Traffic) -> Traffic:
        """Both demands at the same time."""
        pairs = zip(vars(self).values(), vars(other).values())
        return Traffic(*(np.concatenate(pair) for pair in pairs))

    def reversed(self) -> Traffic:
        """The same bytes the other way: a combine is the reverse of its dispatch."""
        return Traffic(self.target, self.source, self.bytes)

    def scaled(self, factor: float) -> Traffic:
        """The same pairs with `factor` times the bytes."""
        return Traffic(self.source, self.target, self.bytes * factor)


def route(
    fabric: Fabric,
    traffic: Traffic,
    routing: Routing = "adaptive",
    forwarding: Forwarding = "sender",
    seed: int = 0,
) -> Routes:
    """The path of every demand through `fabric`.

    Between nodes, a message leaves and arrives on one rail. `forwarding` says who brings it there
    over scale-up: the "sender" takes the target's rail (NCCL's PXN), the "receiver" takes the
    source's (DeepEP), "none" crosses rails in the network, which only one plane allows. Rails of
    dead planes are spread over the living ones, at the cost of a hop. Across leaves, `routing`
    picks a cable by hash ("ecmp", drawn with `seed`), by the target's port ("static"), or spreads
    evenly over all live ones ("adaptive").
    """
    per_node, first = fabric.gpus_per_node, fabric._first
    source, target = np.asarray(traffic.source), np.asarray(traffic.target)
    if source.size and not (
        0 <= min(source.min(), target.min()) <= max(source.max(), target.max()) < fabric.gpus
    ):
        raise UserError(f"traffic names GPUs outside the fabric's {fabric.gpus}")
    from_node, to_node = source // per_node, target // per_node
    remote = from_node != to_node

    out_rail, in_rail = _rails(fabric, source, target, forwarding)
    out_gpu = np.where(remote, from_node * per_node + out_rail, source)
    in_gpu = np.where(remote, to_node * per_node + in_rail, target)

    none = first["end"]
    hops = np.full((source.size, 7), none)
    columns = {  # a hop a column; a transfer within the node uses the first two
        0: ("scale-up send", source, (source != out_gpu) | (~remote & (source != target))),
        1: (
            "scale-up receive",
            np.where(remote, out_gpu, target),
            (source != out_gpu) | (~remote & (source != target)),
        ),
        2: ("NIC send", out_gpu, remote),
        4: ("NIC receive", in_gpu, remote),
        5: ("scale-up send", in_gpu, remote & (in_gpu != target)),
        6: ("scale-up receive", target, remote & (in_gpu != target)),
    }
    for column, (kind, gpu, used) in columns.items():
        hops[:, column] = np.where(used, first[kind] + gpu, none)
    return _across_spines(fabric, hops, remote, out_gpu, in_gpu, routing, seed)


def _rails(
    fabric: Fabric, source: np.ndarray, target: np.ndarray, forwarding: Forwarding
) -> tuple[np.ndarray, np.ndarray]:
    """The rails each message leaves and arrives on, none of them of a dead plane."""
    per_node = fabric.gpus_per_node
    if forwarding == "sender":
        out_rail = in_rail = target % per_node
    elif forwarding == "receiver":
        out_rail = in_rail = source % per_node
    elif forwarding == "none":
        if fabric.planes > 1:
            raise UserError(
                f"planes={fabric.planes} are not connected to each other: "
                "forwarding must be sender or receiver"
            )
        out_rail, in_rail = source % per_node, target % per_node
    else:
        raise UserError(f"{forwarding=} must be sender, receiver or none")
    rails = np.arange(per_node)
    living = rails[~np.isin(rails % fabric.planes, list(fabric.dead_planes))]

    def onto_living(rail: np.ndarray) -> np.ndarray:
        spread = living[(target // per_node + source // per_node + rail) % living.size]
        return np.where(np.isin(rail, living), rail, spread)

    return onto_living(out_rail), onto_living(in_rail)


def _across_spines(
    fabric: Fabric,
    hops: np.ndarray,
    remote: np.ndarray,
    out_gpu: np.ndarray,
    in_gpu: np.ndarray,
    routing: Routing,
    seed: int,
) -> Routes:
    """Fills in the hop between leaves: column 3, and with a second link for single-cable paths."""
    first, ports = fabric._first, fabric.leaf_ports
    rails_a_plane = fabric.gpus_per_node // fabric.planes

    def place(gpu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        node, rail = gpu // fabric.gpus_per_node, gpu % fabric.gpus_per_node
        within = rail // fabric.planes if rails_a_plane > 1 else 0
        return rail % fabric.planes, within * fabric.leaves_per_rail + node // ports

    plane, up_leaf = place(out_gpu)
    _, down_leaf = place(in_gpu)
    crossing = remote & (up_leaf != down_leaf)
    alive = fabric._alive
    num_links = first["end"]
    if routing == "adaptive":
        pair = (plane * fabric.leaves + up_leaf) * fabric.leaves + down_leaf
        pairs, index = np.unique(pair[crossing], return_inverse=True)
        down, rest = pairs % fabric.leaves, pairs // fabric.leaves
        up, on = rest % fabric.leaves, rest // fabric.leaves
        usable = alive[on, up] & alive[on, down]
        _refuse_unreachable(usable)
        row, path = np.nonzero(usable)
        up_link = first["leaf to spine"] + (on[row] * fabric.leaves + up[row]) * ports + path
        down_link = first["spine to leaf"] + (on[row] * fabric.leaves + down[row]) * ports + path
        share = 1.0 / usable.sum(axis=1)[row]
        counts = 2 * usable.sum(axis=1)
        order = np.argsort(np.concatenate([row, row]), kind="stable")
        links = np.concatenate([up_link, down_link])[order]
        fractions = np.concatenate([share, share])[order]
        starts = num_links + np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
        hops = np.where(hops == num_links, num_links + pairs.size, hops)
        hops[crossing, 3] = num_links + index
        every = np.arange(num_links)
        return Routes(
            hops,
            np.concatenate([every, starts[: pairs.size]]),
            np.concatenate([every, links]),
            np.concatenate([np.ones(num_links), fractions]),
        )
    if routing == "ecmp":
        wanted = np.random.default_rng(seed).integers(0, 2**31, size=plane.size)
    elif routing == "static":
        wanted = in_gpu // fabric.gpus_per_node % ports
    else:
        raise UserError(f"{routing=} must be ecmp, static or adaptive")
    if alive.all():
        path = wanted % ports
    else:
        usable = alive[plane, up_leaf] & alive[plane, down_leaf]
        _refuse_unreachable(usable[crossing])
        count = np.maximum(usable.sum(axis=1), 1)
        nth = np.cumsum(usable, axis=1) == (wanted % count + 1)[:, None]
        path = np.argmax(nth & usable, axis=1)
    up_link = first["leaf to spine"] + (plane * fabric.leaves + up_leaf) * ports + path
    down_link = first["spine to leaf"] + (plane * fabric.leaves + down_leaf) * ports + path
    hops[:, 3] = np.where(crossing, up_link, num_links)
    last = np.where(crossing, down_link, num_links)[:, None]
    return plain_routes(np.concatenate([hops, last], axis=1), num_links)


def _refuse_unreachable(usable: np.ndarray) -> None:
    cut = int((~usable.any(axis=1)).sum())
    if cut:
        raise UserError(f"dead cables leave {cut} pairs of leaves or flows without any path")
