"""The whole model against the f64 oracle, and its forms against each other."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import init_model_cache
from dsv3_jax.model.decode import decode_step, prefill
from dsv3_jax.model.ends import logits_of
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.remat import POLICIES
from dsv3_jax.model.transformer import forward, init_variables
from tests import oracle
from tests.cases import in_every_run
from tests.helpers import TOLERANCE, random_tokens, random_variables, relative_error, tiny_model

V3 = tiny_model(num_nextn_predict_layers=2)
# DeepSeek-V2-Lite's form: no query compression, no groups, no bias, softmax, two shared experts.
V2_LITE = tiny_model(
    q_lora_rank=None,
    scoring_func="softmax",
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    n_shared_experts=2,
    rope_scaling=None,
    num_nextn_predict_layers=0,
)
# DeepSeek-V2's: groups ranked by their best expert. Also no dense layer and no shared expert.
V2 = tiny_model(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    first_k_dense_replace=0,
    num_hidden_layers=2,
    n_shared_experts=0,
)
FAMILY = {"v3": V3, "v2_lite": V2_LITE, "v2": V2}
# Rows of one shape for all: a model's forward pass is one program.
ROWS, LENGTH = 3, 12

run = jax.jit(forward, static_argnames="config")
run_prefill = jax.jit(prefill, static_argnames="config")
run_decode = jax.jit(decode_step, static_argnames="config")


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_forward_equals_the_oracle(config):
    variables, tokens = random_variables(config), random_tokens(config, ROWS, LENGTH)
    out = run(variables, tokens, config=config)
    assert out.logits.dtype == jnp.float32
    for b in range(ROWS):
        want = oracle.forward(variables, tokens[b], config)
        assert relative_error(out.logits[b], want.logits) < TOLERANCE["f32_model"]
        for layer, routed in enumerate(want.routed):
            np.testing.assert_array_equal(out.stats.experts[layer, b], routed.experts)
        for k, logits in enumerate(want.mtp_logits, start=1):
            got = out.mtp_logits[k - 1][b, : LENGTH - k]
            assert relative_error(got, logits) < TOLERANCE["f32_model"], f"depth {k}"


def test_statistics_equal_the_oracle():
    variables, tokens = random_variables(V3), random_tokens(V3, ROWS, LENGTH)
    out = run(variables, tokens, config=V3)
    rows = [oracle.forward(variables, row, V3) for row in tokens]

    def check(stats, routed):  # routed: one Routed a row
        load = sum(np.bincount(r.experts.ravel(), minlength=V3.n_routed_experts) for r in routed)
        np.testing.assert_array_equal(stats.load_E, load)
        balance = np.mean([oracle.balance_loss(r.scores, V3.num_experts_per_tok) for r in routed])
        assert relative_error(stats.balance_loss, balance) < TOLERANCE["f32_model"]

    for layer in range(V3.num_moe_layers):
        check(
            jax.tree.map(lambda s, layer=layer: s[layer], out.stats),
            [r.routed[layer] for r in rows],
        )
    # A module of depth k has T - k rows: the others count for nothing.
    for k in range(2):
        check(out.mtp_stats[k], [r.mtp_routed[k] for r in rows])


def test_masked_documents_equal_the_oracle():
    tokens = random_tokens(V3, ROWS, LENGTH)
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    variables = random_variables(V3)
    out = run(variables, tokens, config=V3, segments=np.repeat(documents, ROWS, axis=0))
    want = oracle.forward(variables, tokens[0], V3, documents[0])
    assert relative_error(out.logits[0], want.logits) < TOLERANCE["f32_model"]
    # MTP row i attends to rows of its own document: with module k that row holds token i + k.
    for k, logits in enumerate(want.mtp_logits, start=1):
        got = out.mtp_logits[k - 1][0, : LENGTH - k]
        assert relative_error(got, logits) < TOLERANCE["f32_model"], f"depth {k}"
    # One document after the other, each at its own positions, is the same: RoPE is relative.
    alone = run(variables, np.roll(tokens, -3, axis=1), config=V3).logits[0, :4]
    assert relative_error(out.logits[0, 3:7], alone) < TOLERANCE["f32_model"]
    crossing = run(variables, tokens, config=V3).logits
    assert relative_error(crossing[0, :3], want.logits[:3]) < TOLERANCE["f32_model"]
    assert relative_error(crossing[0, 3:], want.logits[3:]) > 0.05


# Chunks are the same code with and without query compression.
CHUNKS = [("v3", 1), ("v3", 2), ("v3", 3), ("v3", 4), ("v2_lite", 1)]


@pytest.mark.parametrize("name, chunk", in_every_run(CHUNKS, ("v3", 1), ("v3", 4)))
def test_prefill_and_decode_equal_forward(name, chunk):
    """Prompts of different lengths, then chunks of 1 to 4 tokens, from one ragged cache."""
    config = FAMILY[name]
    lengths, total = np.array([7, 1, 4]), LENGTH
    variables, tokens = random_variables(config), random_tokens(config, ROWS, total)
    want = run(variables, tokens, config=config).logits

    # Padding holds other tokens than the sequence: they must leave no trace.
    padded = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], 5).astype(np.int32)
    cache = init_model_cache(config, ROWS, total + 4)
    hidden, cache, *_ = run_prefill(variables, padded, cache, config=config)
    got = logits_of(variables["params"], hidden)
    for b, length in enumerate(lengths):
        assert relative_error(got[b, :length], want[b, :length]) < TOLERANCE["f32_model"]

    start = lengths.copy()
    while (start + chunk <= total).any():
        # A sequence that is done goes on writing in the cache's last rows, as in a real batch.
        at = np.minimum(start, total)
        rows = np.minimum(at[:, None] + np.arange(chunk), total - 1)
        new = np.take_along_axis(tokens, rows, axis=1)
        hidden, cache, *_ = run_decode(variables, new, at.astype(np.int32), cache, config=config)
        got = logits_of(variables["params"], hidden)
        for b in range(ROWS):
            if start[b] + chunk <= total:
                expected = want[b, start[b] : start[b] + chunk]
                assert relative_error(got[b], expected) < TOLERANCE["f32_model"]
        start += chunk


def test_no_logit_sees_a_later_token():
    """Changing token j moves main logits from row j on, and depth k's from row j - k on."""
    variables, tokens = random_variables(V3), random_tokens(V3, ROWS, LENGTH)
    before = run(variables, tokens, config=V3)
    for j in (0, 4, LENGTH - 1):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % 30
        after = run(variables, changed, config=V3)
        for k, (a, b) in enumerate(
            zip((before.logits, *before.mtp_logits), (after.logits, *after.mtp_logits), strict=True)
        ):
            valid = LENGTH - k
            moved = np.flatnonzero((np.asarray(a)[0, :valid] != np.asarray(b)[0, :valid]).any(-1))
            first = max(j - k, 0)
            assert moved.size and moved[0] == first, f"depth {k}, token {j}: first moved {moved}"
            np.testing.assert_array_equal(moved, np.arange(first, valid))


@pytest.mark.parametrize("remat", in_every_run([name for name in POLICIES if name != "none"], "v3"))
def test_remat_changes_neither_loss_nor_gradients(remat, plain_gradient):
    loss, gradients = plain_gradient
    got_loss, got_gradients = gradient_of(remat)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(got_gradients, gradients) < TOLERANCE["f32_gradient"]


@pytest.fixture(scope="module")
def plain_gradient():
    return gradient_of("none")


def gradient_of(remat: str):
    config = tiny_model()
    variables, tokens = random_variables(config), random_tokens(config, 2, LENGTH)

    def loss(params):
        out = forward({**variables, "params": params}, tokens, Pass(config, remat=remat))
        return sum(jnp.square(x).mean() for x in (out.logits, *out.mtp_logits))

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return float(value), gradients


def test_v3_makes_only_wide_projections_again():
    """Of MLA's up-projections, 16 and 12 times as wide as what they read, of whole rows alone."""
    config = tiny_model(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, q_lora_rank=8, kv_lora_rank=8, num_attention_heads=8)
    variables, tokens = random_variables(config), random_tokens(config, 2, LENGTH)

    def projections(remat):
        def loss(params):
            return forward({"params": params}, tokens, Pass(config, remat=remat)).hidden.sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
        return sum("dimension_numbers" in line and "([], [])" in line for line in text.split("\n"))

    none, v3, full = map(projections, ("none", "v3", "full"))
    assert v3 - none == 2 and full - v3 >= 4


def test_bf16_activations_stay_near_f32():
    """With the router's choice pinned by one group of all experts, nothing jumps."""
    config = tiny_model(num_experts_per_tok=8, topk_group=4, num_nextn_predict_layers=0)
    half = tiny_model(
        num_experts_per_tok=8, topk_group=4, num_nextn_predict_layers=0, dtype="bfloat16"
    )
    variables, tokens = random_variables(config), random_tokens(config, 2, LENGTH)
    got = run(variables, tokens, config=half)
    assert got.hidden.dtype == jnp.bfloat16 and got.logits.dtype == jnp.float32
    want = run(variables, tokens, config=config)
    assert relative_error(got.logits, want.logits) < TOLERANCE["bf16_model"]


def test_deepseek_v3_has_exactly_its_parameters():
    """The released checkpoint's counts, without allocating one of them."""
    shapes = jax.eval_shape(partial(init_variables, config=ModelConfig()), jax.random.key(0))
    sizes = {"main": 0, "mtp": 0}
    for tree in shapes.values():
        for name, sub in tree.items():
            count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(sub))
            sizes["mtp" if name.startswith("mtp_") else "main"] += count
    # Both with their router biases: 58 layers of 256, and one of 256.
    assert sizes == {"main": 671_026_419_200, "mtp": 11_610_068_224}


@pytest.mark.slow
def test_parameters_start_as_documented():
    config = tiny_model(initializer_range=0.05, vocab_size=997)
    variables = jax.jit(partial(init_variables, config=config))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        assert leaf.dtype == jnp.float32
        if path[-1].key.endswith("norm"):
            assert (leaf == 1).all()
        elif leaf.size > 1000:
            assert np.std(leaf) == pytest.approx(0.05, rel=0.1), path
    for leaf in jax.tree.leaves(variables["router"]):
        assert leaf.dtype == jnp.float32 and (leaf == 0).all()
    # No two layers or experts are copies of each other.
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    flat = np.asarray(experts).reshape(-1, *experts.shape[2:])
    assert len(np.unique(flat, axis=0)) == len(flat)
