"""The training loss and its gradient against the f64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.loss import document_numbers, training_loss
from dsv3_jax.training.step import eval_step
from tests import oracle
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

# Two MTP modules; a balance loss that is no rounding error; documents of a few tokens.
MODEL = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=2)
BASE = tiny_config(MODEL)
CONFIG = dataclasses.replace(
    BASE, schedule=dataclasses.replace(BASE.schedule, balance_loss_weight=0.5)
)
MASKED = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, mask_documents=True))
WEIGHT = 0.3
VARIABLES = random_variables(MODEL)
ROWS = random_tokens(MODEL, 2, 10)
ROWS[0, 4] = ROWS[1, [2, 7]] = MODEL.bos_token_id

loss_and_gradient = jax.jit(
    lambda params, weight: jax.value_and_grad(
        lambda p: training_loss({**VARIABLES, "params": p}, ROWS, weight, CONFIG), has_aux=True
    )(params)
)


def oracle_loss(params, weight=WEIGHT, alpha=0.5, mask=False):
    """(total, ce, mtp, balance) as eqs. 17 and 23-25 have them, averaged over rows."""
    terms = []
    for row in ROWS:
        tokens, targets = row[:-1], row[1:]
        length = len(tokens)
        documents = np.cumsum(tokens == MODEL.bos_token_id) if mask else None
        out = oracle.forward({**VARIABLES, "params": params}, tokens, MODEL, documents)
        mtp = 0.0
        for k, logits in enumerate(out.mtp_logits, start=1):
            nats = oracle.nats(logits, targets[k:])  # T - k terms
            if mask:
                nats = nats[documents[k:] == documents[: length - k]]
            mtp += nats.sum() / length / len(out.mtp_logits)  # divided by T all the same
        routed = out.routed + out.mtp_routed
        balance = sum(oracle.balance_loss(r.scores, MODEL.num_experts_per_tok) for r in routed)
        terms.append((oracle.nats(out.logits, targets).mean(), mtp, balance))
    ce, mtp, balance = np.mean(terms, axis=0)
    return ce + weight * mtp + alpha * balance, ce, mtp, balance


@pytest.fixture(scope="module")
def computed():
    return loss_and_gradient(VARIABLES["params"], jnp.float32(WEIGHT))


def test_loss_equals_the_oracle(computed):
    (loss, terms), _ = computed
    want = oracle_loss(VARIABLES["params"])
    assert (float(loss), *map(float, terms[:3])) == pytest.approx(want, rel=2e-6)
    # Each router's load: all its tokens times K, T - k of them for an MTP module.
    entries = {name: int(load.sum()) for name, load in terms.load.items()}
    rows, length, per_token = 2, 9, MODEL.num_experts_per_tok
    assert entries == {
        "moe_layers": rows * length * per_token,
        "mtp_0": rows * (length - 1) * per_token,
        "mtp_1": rows * (length - 2) * per_token,
    }


def test_masked_documents_equal_the_oracle():
    loss, terms = jax.jit(lambda v: training_loss(v, ROWS, jnp.float32(WEIGHT), MASKED))(VARIABLES)
    want = oracle_loss(VARIABLES["params"], mask=True)
    assert (float(loss), *map(float, terms[:3])) == pytest.approx(want, rel=2e-6)
    assert want[0] != pytest.approx(oracle_loss(VARIABLES["params"])[0], rel=1e-3)


# Everything at once, then what the main model shares with MTP, then MTP's own, and the router.
PLACES = ("", "embed_tokens", "lm_head", "mtp_0", "mtp_1", "moe_layers/mlp/gate", "self_attn")


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.replace("/", "_") or "everything")
def test_gradient_is_the_oracle_s_slope(computed, place):
    """<gradient, d> equals the central difference along a random direction d, in f64."""
    rng = np.random.default_rng(0)

    def direction(path, leaf):
        chosen = place in jax.tree_util.keystr(path, simple=True, separator="/")
        return rng.normal(size=leaf.shape) * chosen

    params = oracle.float64(VARIABLES["params"])
    d = jax.tree_util.tree_map_with_path(direction, params)
    h = 1e-6
    ends = [
        oracle_loss(jax.tree.map(lambda p, d, s=sign: p + s * h * d, params, d))[0]
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * h)
    _, gradients = computed
    inner = jax.tree.map(lambda g, d: np.vdot(np.float64(g), d), gradients, d)
    # Terms cancel in the inner product, so the error is measured by the gradient's own size.
    size = np.sqrt(
        sum(
            np.square(np.float64(g) * (x != 0)).sum()
            for g, x in zip(jax.tree.leaves(gradients), jax.tree.leaves(d), strict=True)
        )
    )
    assert size > 1e-2
    assert abs(sum(jax.tree.leaves(inner)) - slope) < TOLERANCE["f32_gradient"] * size


def test_mtp_moves_the_shared_embedding_and_head(computed):
    """Their gradients contain MTP's: they change with lambda."""
    _, with_mtp = computed
    _, without = loss_and_gradient(VARIABLES["params"], jnp.float32(0.0))
    for name in ("embed_tokens", "lm_head"):
        assert relative_error(with_mtp[name], without[name]) > 0.1


def test_documents_begin_at_bos():
    bos = MODEL.bos_token_id
    tokens = jnp.array([[1, bos, 2, 3, bos, bos]])
    np.testing.assert_array_equal(document_numbers(tokens, CONFIG), [[0, 1, 1, 1, 2, 3]])


def test_validation_measures_the_main_model_alone():
    got = float(
        jax.jit(eval_step, static_argnames="config")(
            VARIABLES["params"], VARIABLES["router"], ROWS, config=CONFIG
        )
    )
    assert got == pytest.approx(oracle_loss(VARIABLES["params"])[1], rel=2e-6)


def test_a_detached_mtp_trains_its_modules_alone():
    """Their gradient is what it was; the rest has the gradient of the loss without MTP."""
    detached = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, mtp_detach=True))

    @jax.jit
    @jax.value_and_grad
    def gradient(params, weight):
        return training_loss({**VARIABLES, "params": params}, ROWS, weight, detached)[0]

    loss, both = gradient(VARIABLES["params"], jnp.float32(WEIGHT))
    _, without = gradient(VARIABLES["params"], jnp.float32(0.0))
    (value, _), joint = loss_and_gradient(VARIABLES["params"], jnp.float32(WEIGHT))
    for name in both:
        of_mtp = name.startswith("mtp_")
        wanted = joint if of_mtp else without
        assert relative_error(both[name], wanted[name]) < TOLERANCE["f32_gradient"], name
    assert relative_error(joint["lm_head"], without["lm_head"]) > 0.01
    assert float(loss) == pytest.approx(float(value), rel=TOLERANCE["f32_model"])
