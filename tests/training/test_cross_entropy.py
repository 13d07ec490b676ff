"""The head and its cross-entropy as one operation, against the same written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.model.step_weights import made_for_step
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, make_layout
from dsv3_jax.quantization.block_scaled import StepWeight, dequantize, quantize
from dsv3_jax.quantization.recipe import RECIPES
from dsv3_jax.training import cross_entropy
from dsv3_jax.training.cross_entropy import head_nats
from tests import oracle
from tests.cases import matrix
from tests.helpers import TOLERANCE, relative_error

ROWS, HEADS, TOKENS, DIM, VOCABULARY = 2, 2, 8, 16, 50
FACTORS = jnp.array([1.0, 0.3])


def operands(seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(ROWS, HEADS, TOKENS, DIM)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(VOCABULARY, DIM)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, hidden.shape[:3]), jnp.int32)
    shares = jnp.asarray(rng.random(hidden.shape[:3]), jnp.float32)
    return hidden, head, targets, shares


def of_heads_in_f64(hidden, head, targets, shares):
    nats = [
        [oracle.nats(np.float64(hidden[b, h]) @ np.float64(head).T, targets[b, h]) for h in (0, 1)]
        for b in range(ROWS)
    ]
    return (np.array(nats) * np.float64(shares)).sum((0, 2))


def written_out(hidden, head, targets, shares):
    """The same with all logits, for XLA to differentiate."""
    logits = (hidden @ head.T).astype(jnp.float32)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - of_target
    return 3 * (nats * shares * FACTORS[:, None]).sum()


def differentiate(layout, hidden, head, targets, shares):
    def of(hidden, head):
        value, of_heads = head_nats(hidden, head, targets, shares, FACTORS, layout)
        return 3 * value, of_heads

    return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(hidden, head)


ONE = pytest.param({}, id="one")
MESH = pytest.param(dict(data=2, context=2, tensor=2), id="mesh")
PIECES = {"whole": 1 << 29, "ragged": 700, "token by token": 50}


@pytest.mark.parametrize(
    "piece, mesh", matrix([pytest.param(PIECES[one], id=one) for one in PIECES], [ONE, MESH])
)
def test_value_and_gradients_are_those_of_all_logits(mesh, piece, monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", piece)
    layout = ONE_DEVICE
    if mesh:
        layout = make_layout(
            make_mesh(ParallelConfig(**mesh)), ShardingConfig(), ExpertParallelConfig()
        )
    inputs = operands()
    (value, of_heads), gradients = differentiate(layout, *inputs)
    exact = of_heads_in_f64(*inputs)
    np.testing.assert_allclose(of_heads, exact, rtol=1e-6)
    assert float(value) == pytest.approx(3 * float(exact @ np.float64(FACTORS)), rel=1e-6)
    wanted = jax.grad(written_out, (0, 1))(*inputs)
    for got, want in zip(gradients, wanted, strict=True):
        assert relative_error(got, want) < TOLERANCE["f32_reordered"]
    # Without a gradient the same value, by another way.
    alone = head_nats(*inputs, FACTORS, layout)
    np.testing.assert_allclose(alone[0], value / 3, rtol=1e-6)


def test_in_bf16_the_head_s_gradient_is_summed_in_f32(monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", VOCABULARY)  # token by token
    hidden, head, targets, _ = operands(1)
    copy = head.astype(jnp.bfloat16)
    hidden = jnp.broadcast_to(hidden[:1, :1, :1] / 4, hidden.shape).astype(jnp.bfloat16)
    targets = jnp.broadcast_to(targets[:1, :1, :1], targets.shape)

    @jax.jit
    @jax.grad
    def gradient(master, shares):
        return head_nats(hidden, StepWeight(master, copy), targets, shares, jnp.ones(2))[0]

    everyone = jnp.ones(targets.shape)
    one = jnp.zeros_like(everyone).at[0, 0, 0].set(1)
    got, of_one = gradient(head, everyone), gradient(head, one)
    assert got.dtype == jnp.float32
    # The same token 32 times: sums rounded to BF16 on the way would be 1e-2 off.
    assert relative_error(got, everyone.size * of_one) < TOLERANCE["f32_reordered"]
    exact = (
        jax.grad(written_out, 1)(hidden.astype(jnp.float32), copy.astype(jnp.float32), targets, one)
        / 3
    )
    error = np.linalg.norm(np.asarray(of_one - exact))
    assert error < TOLERANCE["bf16_op"] * np.linalg.norm(np.asarray(exact))


FP8 = RECIPES["fp8_head"].lm_head
# Relative, Frobenius: E4M3 rounds Gaussian numbers by 2.6 %, two or three times a product.
FP8_GRADIENT = 0.06


OF_A_SUM, TINY = pytest.param(1.0, id="of a sum"), pytest.param(2.0**-34, id="tiny")


@pytest.mark.parametrize("share, mesh", matrix([TINY, OF_A_SUM], [ONE, MESH]))
def test_a_head_in_fp8_has_gradients_as_near_as_fp8_is(mesh, share, monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", 700)
    layout = ONE_DEVICE
    if mesh:
        layout = make_layout(
            make_mesh(ParallelConfig(**mesh)), ShardingConfig(), ExpertParallelConfig()
        )
    hidden, head, targets, shares = operands(2)
    hidden, shares = hidden.astype(jnp.bfloat16), share * shares

    @jax.jit
    def differentiate(hidden, head):
        def of(hidden, head):
            return 3 * head_nats(hidden, head, targets, shares, FACTORS, layout, FP8)[0]

        return jax.value_and_grad(of, (0, 1))(hidden, head)

    value, gradients = differentiate(hidden, head)
    # The same logits: both operands rounded, the product to BF16.
    rounded = dequantize(quantize(hidden.reshape(-1, DIM), (1, 128))).reshape(hidden.shape)
    blocks = head if not mesh else head.reshape(2, -1, DIM)
    blocks = dequantize(quantize(blocks, (128, 128))).reshape(head.shape)
    logits = (rounded @ blocks.T).astype(jnp.bfloat16).astype(jnp.float32)
    exact = of_heads_in_f64(logits, jnp.eye(VOCABULARY), targets, shares)
    np.testing.assert_allclose(value, 3 * exact @ np.float64(FACTORS), rtol=1e-3)
    wanted = jax.grad(written_out, (0, 1))(hidden.astype(jnp.float32), head, targets, shares)
    for got, want in zip(gradients, wanted, strict=True):
        got, want = np.float64(got), np.float64(want)
        assert 0.01 < np.linalg.norm(got - want) / np.linalg.norm(want) < FP8_GRADIENT


def test_a_head_that_was_quantised_once_gives_the_same_bits():
    hidden, head, targets, shares = operands(3)
    hidden = hidden.astype(jnp.bfloat16)
    made = made_for_step({"lm_head": head}, RECIPES["fp8_head"], hidden.dtype)["lm_head"]

    @jax.jit
    def gradients(head, made):
        def of(hidden, master):
            weight = master if made is None else StepWeight(master, *made)
            return head_nats(hidden, weight, targets, shares, FACTORS, recipe=FP8)[0]

        return jax.value_and_grad(of, (0, 1))(hidden, head)

    jax.tree.map(np.testing.assert_array_equal, gradients(head, made), gradients(head, None))


def test_tokens_without_a_share_count_for_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4, 7)), jnp.float32)
    targets = jnp.array([[[1, 2, 3, 6]]])
    nats = oracle.nats(np.float64(logits[0, 0]), np.asarray(targets[0, 0]))
    shares = jnp.array([[[1.0, 0.0, 1.0, 0.0]]]) / 4
    got = head_nats(logits, jnp.eye(7), targets, shares, jnp.ones(1))[0]
    assert float(got) == pytest.approx((nats[0] + nats[2]) / 4, rel=1e-6)


@pytest.mark.parametrize("target, nats", [(0, 0.0), (2, 2e5)])
def test_huge_logits_are_finite(target, nats):
    hidden = jnp.array([[[[1e5, 0.0, -1e5]]]], jnp.float32)
    share = jnp.ones((1, 1, 1))
    got = head_nats(hidden, jnp.eye(3), jnp.array([[[target]]]), share, jnp.ones(1))[0]
    assert float(got) == pytest.approx(nats)
