"""The flow simulator: max-min fairness by property, then routing, failures and traffic."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.analysis.fabric import Fabric, Traffic, route
from dsv3_jax.analysis.network import Routes, max_min_rates, plain_routes, simulate
from dsv3_jax.analysis.traffic import (
    all_to_all,
    all_to_all_by_rail,
    draw_choices,
    expert_dispatch,
    kv_transfer,
    rings,
)
from dsv3_jax.config import ModelConfig, UserError

NIC = 50e9
# Loads are sums of up to a few hundred float64 rates.
LOAD = 1e-6


@st.composite
def networks(draw):
    """Random segments over random links, and flows over random segments."""
    num_links = draw(st.integers(1, 7))
    capacity = draw(st.lists(st.floats(0.1, 10), min_size=num_links, max_size=num_links))
    segments = draw(
        st.lists(
            st.lists(st.integers(0, num_links - 1), min_size=1, max_size=3, unique=True),
            min_size=1,
            max_size=8,
        )
    )
    one = st.integers(0, len(segments) - 1)
    flows = draw(st.lists(st.tuples(one, one | st.just(len(segments))), min_size=1, max_size=25))
    # A segment twice on a path would count twice; real paths never repeat one.
    hops = [(a, len(segments) if b == a else b) for a, b in flows]
    sizes = [len(s) for s in segments]
    routes = Routes(
        np.array(hops),
        np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        np.concatenate([np.array(s) for s in segments]),
        np.concatenate([np.full(n, 1 / n) for n in sizes]),
    )
    return routes, np.array(capacity)


def usage(routes, num_links):
    """[flows, links]: how much of each link a unit of rate takes; the slow, plain form."""
    matrix = np.zeros((len(routes.hops), num_links))
    ends = np.append(routes.starts[1:], routes.links.size)
    for f, row in enumerate(routes.hops):
        for s in row[row < routes.starts.size]:
            np.add.at(
                matrix[f],
                routes.links[routes.starts[s] : ends[s]],
                routes.fractions[routes.starts[s] : ends[s]],
            )
    return matrix


@settings(max_examples=200, deadline=None)
@given(networks())
def test_no_link_over_capacity_and_every_flow_has_a_bottleneck(network):
    routes, capacity = network
    rates = max_min_rates(routes, capacity)
    matrix = usage(routes, capacity.size)
    load = rates @ matrix
    assert (load <= capacity * (1 + LOAD)).all()
    full = load >= capacity * (1 - LOAD)
    for f, rate in enumerate(rates):
        # A link is f's bottleneck when it is full and no flow on it is faster than f.
        on = (matrix[f] > 0) & full
        fastest = [(rates[matrix[:, link] > 0]).max() for link in np.flatnonzero(on)]
        assert any(rate >= other * (1 - LOAD) for other in fastest)


@settings(max_examples=50, deadline=None)
@given(networks(), st.integers(0, 2**16))
def test_simulation_moves_every_byte_and_never_ends_early(network, seed):
    routes, capacity = network
    sizes = np.random.default_rng(seed).uniform(0.1, 5, len(routes.hops))
    outcome = simulate(routes, sizes, capacity, resolution=0.0)
    assert outcome.seconds == outcome.finish.max()
    assert (outcome.utilisation <= 1 + LOAD).all()
    carried = sizes @ usage(routes, capacity.size)
    assert outcome.seconds >= (carried / capacity).max() * (1 - LOAD)


def test_a_freed_link_is_shared_anew():
    # Two flows on one link of 1 B/s, of 1 and 3 bytes: 2 s together, then 2 s alone.
    outcome = simulate(plain_routes(np.array([[0], [0]]), 1), np.array([1.0, 3.0]), np.array([1.0]))
    assert outcome.finish.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("planes", [1, 2, 8])
@pytest.mark.parametrize("routing", ["static", "adaptive"])
def test_all_to_all_by_rail_runs_at_line_rate(planes, routing):
    fabric = Fabric(nodes=12, planes=planes, leaf_ports=4)
    traffic = all_to_all_by_rail(fabric, bytes_per_pair=1e6)
    outcome = simulate(route(fabric, traffic, routing), traffic.bytes, fabric.capacity)
    assert outcome.seconds == pytest.approx(11 * 8 * 1e6 / NIC, rel=1e-6)


def test_merging_by_rail_changes_no_time():
    fabric = Fabric(nodes=6, leaf_ports=4)
    merged, single = all_to_all_by_rail(fabric, 1e6), all_to_all(fabric, 1e6)
    times = [simulate(route(fabric, t), t.bytes, fabric.capacity).seconds for t in (merged, single)]
    assert times[0] == pytest.approx(times[1], rel=1e-6)


def test_ecmp_collides_where_static_and_adaptive_do_not():
    fabric = Fabric(nodes=32, planes=1, leaf_ports=8)
    shift = np.arange(fabric.gpus)
    traffic = Traffic(shift, (shift + 8 * 8) % fabric.gpus, np.full(fabric.gpus, 1e9))
    rates = {
        r: max_min_rates(route(fabric, traffic, r), fabric.capacity)
        for r in ("ecmp", "static", "adaptive")
    }
    assert rates["static"].min() == pytest.approx(NIC)
    assert rates["adaptive"].min() == pytest.approx(NIC)
    assert rates["ecmp"].min() <= NIC / 3 and rates["ecmp"].mean() < 0.75 * NIC


def test_forwarding_takes_the_rail_it_names():
    fabric = Fabric(nodes=2)
    traffic = Traffic(np.array([3]), np.array([8 + 5]), np.array([1.0]))
    for forwarding, rail in (("sender", 5), ("receiver", 3)):
        routes = route(fabric, traffic, forwarding=forwarding)
        names = [fabric.link_name(h) for h in routes.hops[0] if h < fabric.capacity.size]
        assert f"NIC send: node 0, GPU {rail}" in names
        assert f"NIC receive: node 1, GPU {rail}" in names
        assert sum("scale-up" in name for name in names) == 2
    with pytest.raises(UserError, match="not connected to each other"):
        route(fabric, traffic, forwarding="none")
    flat = Fabric(nodes=2, planes=1)
    names = [
        flat.link_name(h)
        for h in route(flat, traffic, "static", "none").hops[0]
        if h < flat.capacity.size
    ]
    assert len(names) == 4 and not any("scale-up" in name for name in names)


@pytest.mark.parametrize("dead", [1, 2, 4])
def test_dead_planes_cost_their_share_of_bandwidth(dead):
    # 17 nodes: the 16 others spread evenly over any number of living planes that divides 16.
    fabric = Fabric(nodes=17, dead_planes=tuple(range(dead)))
    traffic = all_to_all_by_rail(Fabric(nodes=17), 1e6)
    whole = 16 * 8 * 1e6 / NIC
    outcome = simulate(route(fabric, traffic), traffic.bytes, fabric.capacity)
    assert outcome.seconds == pytest.approx(whole * 8 / (8 - dead), rel=0.05)
    assert outcome.seconds >= whole * 8 / (8 - dead) * (1 - LOAD)


@pytest.mark.parametrize("routing", ["ecmp", "static", "adaptive"])
def test_dead_cables_are_avoided(routing):
    fabric = Fabric(nodes=8, leaf_ports=4, dead_cables=((0, 0, 1), (0, 1, 2)))
    traffic = all_to_all_by_rail(fabric, 1e6)
    outcome = simulate(route(fabric, traffic, routing), traffic.bytes, fabric.capacity)
    dead = [i for i, c in enumerate(fabric.capacity) if c == 0]
    assert len(dead) == 4 and not outcome.utilisation[dead].any()
    whole = Fabric(nodes=8, leaf_ports=4)
    healthy = simulate(route(whole, traffic, routing), traffic.bytes, whole.capacity)
    assert outcome.seconds > healthy.seconds


def test_unreachable_leaves_are_refused():
    fabric = Fabric(nodes=8, leaf_ports=4, dead_cables=tuple((0, 0, p) for p in range(4)))
    with pytest.raises(UserError, match="without any path"):
        route(fabric, all_to_all_by_rail(fabric, 1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(nic_bandwidth=-5.0), "nic_bandwidth=-5"),
        (dict(nodes=0), "nodes=0 must be positive"),
        (dict(planes=3), "planes=3 must divide"),
        (dict(dead_planes=(8,)), "dead plane 8"),
        (dict(dead_planes=tuple(range(8))), "all 8 planes are dead"),
        (dict(dead_cables=((0, 9, 0),)), "outside 8 planes of 1 leaves"),
    ],
)
def test_impossible_fabrics_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Fabric(**{"nodes": 4} | change)


def test_choices_obey_the_node_limit():
    model = ModelConfig()
    choices = draw_choices(model, tokens=500, seed=1)
    assert all(len(set(row)) == 8 for row in choices)
    groups = [len(set(row // 32)) for row in choices]
    assert max(groups) == 4
    free = draw_choices(ModelConfig(topk_method="greedy"), tokens=500, seed=1)
    assert max(len(set(row // 32)) for row in free) > 4


def brute_force_node_rows(choices, fabric, num_experts):
    """Rows crossing NICs, counted token by token."""
    count = 0
    per_gpu = num_experts // fabric.gpus
    for s, tokens in enumerate(choices):
        for row in tokens:
            nodes = {int(e) // per_gpu // fabric.gpus_per_node for e in row}
            count += len(nodes - {s // fabric.gpus_per_node})
    return count


def test_dispatch_crosses_to_each_node_at_most_once():
    model = ModelConfig(n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=6)
    fabric = Fabric(nodes=4, gpus_per_node=4, planes=4)
    choices = draw_choices(model, tokens=16 * 7, seed=2).reshape(16, 7, 6)
    by_node = expert_dispatch(fabric, choices, 32, 1.0)
    remote = by_node.source // 4 != by_node.target // 4
    assert by_node.bytes[remote].sum() == brute_force_node_rows(choices, fabric, 32)
    assert (by_node.source[remote] % 4 == by_node.target[remote] % 4).all()
    copies = {}
    for dedup in ("node", "rank", "expert"):
        traffic = expert_dispatch(fabric, choices, 32, 1.0, dedup)
        copies[dedup] = traffic.bytes[traffic.source // 4 != traffic.target // 4].sum()
    assert copies["node"] < copies["rank"] < copies["expert"]
    assert copies["node"] <= 2 * 16 * 7  # topk_group nodes at most


def test_dispatch_hands_every_row_to_every_gpu_that_needs_it():
    model = ModelConfig(n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=6)
    fabric = Fabric(nodes=4, gpus_per_node=4, planes=4)
    choices = draw_choices(model, tokens=16 * 7, seed=3).reshape(16, 7, 6)
    by_node = expert_dispatch(fabric, choices, 32, 1.0)
    # What GPU d holds at the end: received over the NIC or scale-up, less what it only handed on.
    for d in range(16):
        wanted = sum(bool((row // 2 == d).any()) for s in range(16) if s != d for row in choices[s])
        remote_in = by_node.bytes[(by_node.target == d) & (by_node.source // 4 != d // 4)].sum()
        for_own = sum(
            bool((row // 2 == d).any())
            for s in range(16)
            if s // 4 != d // 4 and s % 4 == d % 4
            for row in choices[s]
        )
        scale_up_in = by_node.bytes[(by_node.target == d) & (by_node.source // 4 == d // 4)].sum()
        assert remote_in >= for_own
        assert for_own + scale_up_in == wanted


def test_dispatch_refuses_experts_that_do_not_spread():
    with pytest.raises(UserError, match="do not spread evenly"):
        expert_dispatch(Fabric(nodes=3), np.zeros((24, 1, 1), int), 256, 1.0)


def test_rings_and_kv_transfers_name_the_right_gpus():
    ring = rings(np.array([[0, 2, 4]]), 1.0)
    assert list(zip(ring.source, ring.target)) == [(0, 2), (2, 4), (4, 0)]
    moved = kv_transfer(Fabric(nodes=4), prefill_nodes=1, requests=20, bytes_per_request=5.0)
    assert moved.source.max() < 8 <= moved.target.min()
    with pytest.raises(UserError, match="prefill_nodes=4"):
        kv_transfer(Fabric(nodes=4), 4, 1, 1.0)


@pytest.mark.parametrize("routing", ["static", "adaptive", "ecmp"])
def test_2048_endpoints_all_to_all_in_under_a_minute(routing):
    start = time.perf_counter()
    fabric = Fabric(nodes=256)
    traffic = all_to_all_by_rail(fabric, 1e6)
    outcome = simulate(route(fabric, traffic, routing), traffic.bytes, fabric.capacity)
    assert time.perf_counter() - start < 60
    assert outcome.seconds >= 255 * 8 * 1e6 / NIC * (1 - LOAD)


def test_slack_trades_fairness_for_steps_within_its_bound():
    fabric = Fabric(nodes=32, planes=1, leaf_ports=8)
    traffic = all_to_all_by_rail(fabric, 1e6)
    routes = route(fabric, traffic, "ecmp")
    fair, near = (max_min_rates(routes, fabric.capacity, slack) for slack in (1e-9, 0.05))
    assert near.min() >= fair.min() / 1.05
    load = routes.per_link(routes.per_segment(routes.hops, near), fabric.capacity.size)
    assert (load <= fabric.capacity * (1 + LOAD)).all()
