"""Plans for redundant experts: what holds for every plan, and how good plans are."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.parallel.load_balancer import (
    balance,
    device_load,
    imbalance,
    logged_load,
    pack,
    placement_of,
    replicate,
)


@st.composite
def problems(draw):
    """Loads and a machine that they fit on, with integer loads so that sums are exact."""
    nodes = draw(st.sampled_from([1, 2, 3, 4]))
    devices = nodes * draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    experts = groups * draw(st.integers(1, 4))
    least = -(-experts // devices)
    places = devices * (least + draw(st.integers(0, 2)))
    layers = draw(st.integers(1, 2))
    values = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    load = np.array([draw(values) for _ in range(layers)])
    return load, places, dict(num_groups=groups, num_nodes=nodes, num_devices=devices)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_expert_has_its_places_and_the_maps_agree(problem):
    load, places, machine = problem
    plan = balance(load, places, **machine)
    assert plan.expert_LP.shape == (len(load), places)
    assert plan.count_LE.min() >= 1
    assert (plan.count_LE.sum(1) == places).all()
    for layer, expert in np.ndindex(load.shape):
        found = plan.place_LEC[layer, expert]
        count = plan.count_LE[layer, expert]
        assert (found[count:] == -1).all()
        assert found[:count].tolist() == np.flatnonzero(plan.expert_LP[layer] == expert).tolist()


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_group_stays_on_one_node_where_nodes_divide_the_groups(problem):
    load, places, machine = problem
    groups, nodes = machine["num_groups"], machine["num_nodes"]
    if groups % nodes:
        return
    plan = balance(load, places, **machine)
    group_of_place = plan.expert_LP // (load.shape[1] // groups)
    node_of_place = np.arange(places) // (places // nodes)
    for layer in group_of_place:
        nodes_of_group = [set(node_of_place[layer == group]) for group in range(groups)]
        assert all(len(found) == 1 for found in nodes_of_group)
        per_node = np.bincount([found.pop() for found in nodes_of_group], minlength=nodes)
        assert (per_node == groups // nodes).all()


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_plan_is_worse_than_the_plain_order(problem):
    load, places, machine = problem
    devices = machine["num_devices"]
    plan = balance(load, places, **machine)
    total = device_load(load, plan, devices).sum(1)
    np.testing.assert_allclose(total, load.sum(1), rtol=1e-12)
    if load.shape[1] % devices:
        return
    plain = load.reshape(len(load), devices, -1).sum(-1)
    assert (device_load(load, plan, devices).max(1) <= plain.max(1) * (1 + 1e-12)).all()


def test_the_plain_order_is_kept_where_packing_would_be_worse():
    # Heaviest first gives 3 + 2 + 2 against 3 + 2 + 0.
    load = np.array([[3, 3, 0, 2, 2, 2]])
    assert [load[0, items].sum() for items in pack(load[0], 2)] == [7, 5]
    plan = balance(load, 6, num_devices=2)
    assert plan.expert_LP.tolist() == [[0, 1, 2, 3, 4, 5]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_counts_make_the_heaviest_replica_lighter(load, extra):
    load = np.array(load)
    places = len(load) + extra
    count = np.bincount(replicate(load, places), minlength=len(load))
    counts = itertools.product(range(1, extra + 2), repeat=len(load))
    best = min((load / np.array(c)).max() for c in counts if sum(c) == places)
    assert (load / count).max() == best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_packing_is_near_the_best_there_is(weights, packs):
    """Within Graham's bound of the lightest heaviest pack, found by trying every order."""
    weights = np.array(weights)
    got = max(weights[items].sum() for items in pack(weights, packs))
    every = (np.array(order).reshape(packs, -1) for order in itertools.permutations(range(6)))
    best = min(weights[order].sum(1).max() for order in every)
    assert best <= got <= (4 / 3 - 1 / (3 * packs)) * best + 1e-9


def test_the_plan_of_the_example_in_the_eplb_readme():
    load = np.array([
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ])  # fmt: skip
    plan = balance(load, 16, num_groups=4, num_nodes=2, num_devices=8)
    assert plan.expert_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


# V3's deployments: places, groups, nodes, devices; the imbalance that a plan may leave.
@pytest.mark.parametrize(
    "places, groups, nodes, devices, most",
    [(288, 8, 4, 32, 1.08), (288, 8, 18, 144, 1.40), (320, 8, 40, 320, 1.75)],
    ids=["prefill EP32", "decode EP144", "decode EP320"],
)
def test_redundant_experts_balance_skewed_loads(places, groups, nodes, devices, most):
    skewed = 1 / np.arange(1, 257) ** 0.6
    load = np.random.default_rng(0).permuted(np.tile(skewed, (8, 1)), axis=1)
    plan = balance(load, places, num_groups=groups, num_nodes=nodes, num_devices=devices)
    assert imbalance(load, plan, devices).mean() < most


def test_layers_without_load_count_as_balanced():
    plan = balance(np.zeros((1, 4)), 6, num_devices=2)
    assert imbalance(np.zeros((1, 4)), plan, 2).tolist() == [1.0]


@pytest.mark.parametrize(
    "places, machine, says",
    [
        (3, {}, "3 places are too few for 4 experts"),
        (5, {"num_devices": 2}, "use 0 redundant experts, or 2 more"),
        (4, {"num_groups": 3}, "4 experts do not divide into 3 groups"),
        (4, {"num_nodes": 2, "num_devices": 3}, "3 devices do not divide over 2 nodes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(places, machine, says):
    with pytest.raises(UserError, match=says):
        balance(np.ones((1, 4)), places, **machine)


@pytest.mark.misuse
def test_loads_that_are_no_loads_are_refused():
    for load in ([1.0, 2.0], [[1.0, np.nan]], [[1.0, -1.0]]):
        with pytest.raises(UserError, match="loads of shape"):
            balance(np.array(load), 2)
    with pytest.raises(UserError, match="expert 1 of layer 0 has no place"):
        placement_of(np.array([[0, 0, 2]]), 3)


def test_the_loads_that_a_run_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "expert_load": [[1.0, 0.0], [0.5, 0.5]]},
        {"step": 2, "expert_load": [[0.2, 0.8], [None, None]]},
        {"step": 3, "expert_load": [[0.4, 0.6], [0.3, 0.7]]},
        {"step": 3, "seconds": {}},
    ]
    torn = '{"step": 4, "expert_load": [[0.'
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    np.testing.assert_allclose(logged_load(path, last=2), [[0.3, 0.7], [0.4, 0.6]])
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match="no line has an expert_load"):
        logged_load(path)
    with pytest.raises(UserError, match="no such file"):
        logged_load(tmp_path / "none.jsonl")
