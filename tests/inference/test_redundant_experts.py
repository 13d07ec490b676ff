"""Replicated experts: the same outputs, tokens shared out evenly, loads counted per expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, UserError
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.redundant_experts import measure_load, replicate_experts
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import choose_places
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.load_balancer import balance, logged_load, placement_of
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout
from tests.cases import in_every_run
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_model,
)

CONFIG = tiny_model()
VARIABLES = random_variables(CONFIG)
TOKENS = random_tokens(CONFIG, 2, 9)
LAYERS = CONFIG.num_moe_layers + CONFIG.num_nextn_predict_layers


@pytest.fixture(scope="module")
def run():
    return jax.jit(forward, static_argnames="config")


def skewed_plan(layers: int):
    load = np.random.default_rng(0).exponential(size=(layers, CONFIG.n_routed_experts))
    return balance(load, 12, num_groups=CONFIG.n_group, num_nodes=2, num_devices=4)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(LAYERS, id="with MTP"),
        pytest.param(CONFIG.num_moe_layers, id="main model", marks=pytest.mark.slow),
    ],
)
def test_logits_and_loads_are_those_without_replicas(run, layers):
    served = replicate_experts(VARIABLES, skewed_plan(layers), CONFIG)
    experts = served["params"]["moe_layers"]["mlp"]["experts"]
    assert {leaf.shape[1] for leaf in jax.tree.leaves(experts)} == {12}
    got, want = run(served, TOKENS, config=CONFIG), run(VARIABLES, TOKENS, config=CONFIG)
    # On CPU, rows are cut into blocks by the number of places: sums in another order.
    assert relative_error(got.logits, want.logits) < TOLERANCE["f32_reordered"]
    assert relative_error(got.mtp_logits[0], want.mtp_logits[0]) < TOLERANCE["f32_reordered"]
    np.testing.assert_array_equal(got.stats.load_E, want.stats.load_E)


def test_any_order_of_places_gives_the_same_logits(run):
    rng = np.random.default_rng(1)
    experts = np.arange(12) % CONFIG.n_routed_experts
    plan = placement_of(np.array([rng.permutation(experts) for _ in range(LAYERS)]), 8)
    served = replicate_experts(VARIABLES, plan, CONFIG)
    want = run(VARIABLES, TOKENS, config=CONFIG).logits
    got = run(served, TOKENS, config=CONFIG).logits
    assert relative_error(got, want) < TOLERANCE["f32_reordered"]


@pytest.mark.slow
def test_prefill_and_decode_use_the_replicas():
    prompts = [row.tolist() for row in TOKENS]
    served = replicate_experts(VARIABLES, skewed_plan(LAYERS), CONFIG)
    want = list(generate(VARIABLES, prompts, CONFIG, max_new_tokens=4))
    np.testing.assert_array_equal(list(generate(served, prompts, CONFIG, max_new_tokens=4)), want)


@pytest.mark.parametrize("transport", in_every_run(["allgather", "padded"]))
def test_replicas_on_a_mesh_give_the_logits_of_one_device(run, transport):
    """Two nodes of two devices, three places on each; the plan keeps groups on their nodes."""
    mesh = make_mesh(ParallelConfig(node=2, local=2))
    layout = Layout(mesh, expert=ExpertParallelConfig(transport=transport, capacity_factor=1.0))
    served = replicate_experts(VARIABLES, skewed_plan(LAYERS), CONFIG, layout)
    down = served["params"]["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert (down.shape[1], down.sharding.shard_shape(down.shape)[1]) == (12, 3)
    tokens = random_tokens(CONFIG, 4, 9)
    got = run(served, tokens, config=Pass(CONFIG, layout=layout))
    want = run(VARIABLES, tokens, config=CONFIG)
    assert relative_error(got.logits, want.logits) < TOLERANCE["f32_model"]
    np.testing.assert_array_equal(got.stats.load_E, want.stats.load_E)


def test_tokens_of_an_expert_are_shared_out_evenly():
    """Every token picks expert 0, which has three places, and one of the others, with one each."""
    plan = placement_of(np.array([[0, 1, 0, 2, 3, 0]]), 4)
    experts = jnp.stack([jnp.zeros(30, jnp.int32), 1 + jnp.arange(30) % 3], axis=1)
    places = np.asarray(choose_places(experts, plan.place_LEC[0], plan.count_LE[0]))
    assert (plan.expert_LP[0][places] == experts).all()
    assert np.bincount(places[:, 0], minlength=6).tolist() == [10, 0, 10, 0, 0, 10]
    # Three devices with one token each.
    firsts = [choose_places(experts[:1], plan.place_LEC[0], plan.count_LE[0], d) for d in range(3)]
    assert [int(first[0, 0]) for first in firsts] == [0, 2, 5]


def test_replicas_on_nodes_that_a_token_goes_to_come_first():
    """Two places a node: expert 0 on all of three nodes, 1, 2 and 3 on nodes 0, 1 and 2."""
    plan = placement_of(np.array([[0, 1, 0, 2, 3, 0]]), 4)
    known = {"num_nodes": 3, "places_per_node": 2}

    def node_of_0(others, own_node, turn=0):
        experts = jnp.array([[0, *others]])
        places = choose_places(
            experts, plan.place_LEC[0], plan.count_LE[0], turn, own_node=own_node, **known
        )
        assert (plan.expert_LP[0][places] == experts).all()
        return int(places[0, 0]) // 2

    for turn in range(3):
        assert node_of_0([2], own_node=1, turn=turn) == 1
        assert node_of_0([3], own_node=1, turn=turn) in (1, 2)
    # In turn among equals: the token's own node and that of expert 3.
    assert {node_of_0([3], own_node=0, turn=turn) for turn in range(2)} == {0, 2}


def counts_of(rows, run):
    """What a pass over these rows counts, layer by layer, of (sequence, tokens) that count."""
    chosen = np.asarray(
        run(VARIABLES, np.stack([row for row, _ in rows]), config=CONFIG).stats.experts
    )
    taken = [
        np.concatenate([layer[i, :n].ravel() for i, (_, n) in enumerate(rows)]) for layer in chosen
    ]
    return [np.bincount(choices, minlength=CONFIG.n_routed_experts).tolist() for choices in taken]


def test_measured_load_counts_what_the_router_chose(run):
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist()]
    want = counts_of([(TOKENS[0], 9), (TOKENS[1], 4)], run)
    assert measure_load(VARIABLES, prompts, CONFIG).tolist() == want


MESH = {"node": 2, "local": 2}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, MESH], ids=["one device", "mesh"])
def test_generation_counts_what_a_pass_over_its_tokens_counts(run, sizes, tmp_path):
    """Not the copies that fill a mesh, not padding, and not the last tokens, which are not fed."""
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :3].tolist()]
    layout = Layout(make_mesh(ParallelConfig(**sizes)), expert=ExpertParallelConfig())
    load = ExpertLoad(CONFIG)
    written = np.stack(
        list(
            generate(VARIABLES, prompts, CONFIG, max_new_tokens=4, layout=layout, expert_load=load)
        ),
        1,
    )
    assert (written != CONFIG.eos_token_id).all()
    fed = [[*prompt, *row[:-1]] for prompt, row in zip(prompts, written.tolist())]
    rows = [(np.resize(np.array(row, np.int32), 9), len(row)) for row in fed]
    assert load.count_LE.tolist() == counts_of(rows, run)
    load.write(tmp_path / "load.jsonl")
    fractions = load.count_LE / load.count_LE.sum(-1, keepdims=True)
    np.testing.assert_allclose(logged_load(tmp_path / "load.jsonl"), fractions)


@pytest.mark.slow
def test_sequences_that_have_ended_count_no_more():
    prompts = [TOKENS[0, :5].tolist()]
    first = int(next(generate(VARIABLES, prompts, CONFIG, max_new_tokens=1))[0])
    ending = dataclasses.replace(CONFIG, eos_token_id=first)
    both, load = [*prompts, TOKENS[1, :3].tolist()], ExpertLoad(ending)
    written = list(generate(VARIABLES, both, ending, max_new_tokens=3, expert_load=load))
    lives = 1 + next((i for i, ids in enumerate(written) if ids[1] == first), 2)
    fed = 5 + 3 + lives - 1  # the second goes on alone
    assert (
        load.count_LE.sum(-1).tolist() == [fed * CONFIG.num_experts_per_tok] * CONFIG.num_moe_layers
    )


def test_a_plan_of_another_model_is_refused():
    for layers, experts in ((LAYERS + 1, 8), (CONFIG.num_moe_layers - 1, 8), (LAYERS, 4)):
        plan = balance(np.ones((layers, experts)), experts)
        with pytest.raises(UserError, match="not one for a model with 2 MoE layers"):
            replicate_experts(VARIABLES, plan, CONFIG)
