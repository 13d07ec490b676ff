"""FP8 linear operations: against f32, and against the exact recipe written out in NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.model.activation import swiglu
from dsv3_jax.model.fp8 import fp8_grouped_linear, fp8_linear
from dsv3_jax.model.step_weights import made_for_step, with_made
from dsv3_jax.quantization.block_scaled import StepWeight
from dsv3_jax.quantization.recipe import BF16, RECIPES, LinearRecipe, TileFormat
from tests.cases import in_every_run

# E4M3's relative error on Gaussian numbers is 2.6 %; a product of two such tensors has sqrt(2)
# times that, 3.6 %. In Wgrad the input was quantised twice: sqrt(3) times, 4.5 %.
ONCE, TWICE = 0.04, 0.05
# Sums of exactly scaled E4M3 products, in f32 against float64.
F32_SUM = 1e-6
BF16_HALF_ULP = 2.0**-8

PAPER = LinearRecipe()
ODD = (130, 200, 70)


def relative(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def assert_is_bf16_of(got, exact):
    """`got` is `exact` rounded to BF16, give or take what f32 sums may tip."""
    got = np.asarray(got, np.float64)
    np.testing.assert_array_equal(got, got.astype(ml_dtypes.bfloat16))
    # F32_SUM bounds the errors' rms; the largest of n normal ones is sqrt(2 log n) times that.
    largest = np.sqrt(2 * np.log(exact.size))
    slack = largest * F32_SUM * np.linalg.norm(exact) / np.sqrt(exact.size)
    assert (np.abs(got - exact) <= BF16_HALF_ULP * np.abs(exact) * (1 + 1e-6) + slack).all()


def quantized(x, tile, scale_format="f32"):
    """The numbers that remain of x [T, K], in float64: amax to 448, E4M3, and back."""
    x = np.asarray(x, np.float32)
    rows, columns = x.shape
    padded = np.pad(x, [(0, -rows % tile[0]), (0, -columns % tile[1])])
    tiles = padded.reshape(-1 if rows else 0, tile[0], padded.shape[1] // tile[1], tile[1])
    amax = np.maximum(np.abs(tiles).max((1, 3), keepdims=True), np.float32(1e-4))
    scale = amax * (np.float32(1) / np.float32(448))
    if scale_format == "ue8m0":
        scale = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 448))).astype(np.float32)
    values = np.clip(tiles * (1 / scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    back = values.astype(np.float32) * scale
    return back.reshape(padded.shape)[:rows, :columns].astype(np.float64)


def in_e5m6(x):
    """x [T, K] with seven significant bits; no group spans float16's 2^30, so that is all."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(fraction * 128) / 128, exponent)


def emulated(x, weight, dy, recipe=PAPER):
    """y, dx and dW of a linear operation in float64, with every rounding but the results'."""

    def q(x, form):
        return quantized(x, form.tile, form.scale_format)

    x, weight, dy = (np.asarray(v, np.float32) for v in (x, weight, dy))
    saved = {"quantized": q(x, recipe.input), "e5m6": in_e5m6(x), "unquantized": x}[
        recipe.saved_input
    ]
    weight_q = q(weight, recipe.weight)
    y = q(x, recipe.input) @ weight_q.T
    dx = q(dy, recipe.dgrad) @ weight_q
    d_weight = q(dy, recipe.wgrad).T @ q(saved, recipe.wgrad)
    return y, dx, d_weight


def gaussians(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def products(recipe, x, weight, dy):
    y, pull_back = jax.vjp(lambda x, weight: fp8_linear(x, weight, recipe), x, weight)
    return y, *pull_back(dy)


jit_products = jax.jit(products, static_argnums=0)


# Tokens, then the input's and the output's width: odd in every way below, and V3's own here.
SMALL, V3_WIDTH = (256, 384, 256), (512, 7168, 2048)


@pytest.mark.parametrize("tokens, k, n", in_every_run([SMALL, V3_WIDTH], SMALL))
def test_errors_against_f32_are_those_of_the_format(tokens, k, n):
    x, weight, dy = gaussians((tokens, k), (n, k), (tokens, n))
    y, dx, d_weight = jit_products(PAPER, x, weight, dy)
    assert relative(y, x @ weight.T) <= ONCE
    assert relative(dx, dy @ weight) <= ONCE
    assert relative(d_weight, dy.T @ x) <= TWICE
    # And no less than one rounding's: otherwise something was not quantised.
    assert min(relative(y, x @ weight.T), relative(dx, dy @ weight)) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("tokens, k, n", [SMALL, ODD])
def test_a_weight_quantised_before_gives_the_same_bits(tokens, k, n):
    x, weight, dy = gaussians((tokens, k), (n, k), (tokens, n))
    made = made_for_step({"mlp": {"down_proj": weight}}, RECIPES["fp8_paper"], weight.dtype)

    def product(x, weight):
        held = with_made({"mlp": {"down_proj": weight}}, made)["mlp"]["down_proj"]
        assert isinstance(held, StepWeight)
        return fp8_linear(x, held, PAPER)

    y, pull_back = jax.vjp(product, x, weight)
    for got, expected in zip((y, *pull_back(dy)), products(PAPER, x, weight, dy), strict=True):
        np.testing.assert_array_equal(got, expected)


RECIPE_CASES = {
    "paper": PAPER,
    "ue8m0": replace(PAPER, input=TileFormat((1, 128), "ue8m0")),
    "unquantized": replace(PAPER, saved_input="unquantized"),
    "o_proj": RECIPES["fp8_paper"].o_proj,  # E5M6
    "blockwise": RECIPES["fp8_blockwise_dgrad"].down_proj,
}


@pytest.mark.parametrize("name", RECIPE_CASES)
def test_it_is_the_recipe_written_out_in_numpy(name):
    """Odd sizes: partial tiles in every dim, tokens included."""
    assert_is_the_recipe(RECIPE_CASES[name], *gaussians((130, 200), (70, 200), (130, 70), seed=1))


@pytest.mark.slow
def test_it_is_the_recipe_written_out_in_numpy_at_v3s_width():
    tokens, k, n = V3_WIDTH
    assert_is_the_recipe(PAPER, *gaussians((tokens, k), (n, k), (tokens, n), seed=6))


def assert_is_the_recipe(recipe, x, weight, dy):
    y, dx, d_weight = emulated(x, weight, dy, recipe)
    got_y, got_dx, got_d_weight = jit_products(recipe, x, weight, dy)
    assert_is_bf16_of(got_y, y)
    assert_is_bf16_of(got_dx, dx)
    assert relative(got_d_weight, d_weight) <= F32_SUM


def test_leading_dims_and_heads_are_only_shape():
    x, weight, dy = gaussians((2, 5, 64), (3, 16, 64), (2, 5, 3, 16), seed=2)
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    y, dx, d_weight = jit_products(PAPER, x, weight, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and d_weight.dtype == jnp.float32
    flat = jit_products(PAPER, x.reshape(10, 64), weight.reshape(48, 64), dy.reshape(10, 48))
    for got, expected in zip((y, dx, d_weight), flat):
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def test_one_loud_token_spoils_its_neighbours_only_blockwise():
    """Why 128x128 blocks of output gradients diverge: the paper's appendix B.2 in one number."""
    x, weight, dy = gaussians((128, 128), (128, 128), (128, 128), seed=3)
    dy = dy.at[7].mul(3e5)  # E4M3 reaches from 448 down to 2^-9, a factor of 2e5
    quiet = np.arange(128) != 7
    exact = (dy @ weight)[quiet]
    tokenwise = jit_products(PAPER, x, weight, dy)[1][quiet]
    blockwise = jit_products(RECIPE_CASES["blockwise"], x, weight, dy)[1][quiet]
    assert relative(tokenwise, exact) <= ONCE
    assert relative(blockwise, exact) > 0.5


def test_swiglu_is_recomputed_from_its_quantised_input():
    gate_up, weight, dy = gaussians((130, 2, 96), (70, 96), (130, 70), seed=4)

    @jax.jit
    def run(gate_up, weight, dy):
        y, pull_back = jax.vjp(lambda h, w: fp8_linear(h, w, PAPER, swiglu), gate_up, weight)
        return y, *pull_back(dy)

    y, d_gate_up, d_weight = run(gate_up, weight, dy)
    # swiglu compiles to other last bits alone than inside `run`: now and then an E4M3 tie tips.
    assert relative(y, emulated(swiglu(gate_up), weight, dy)[0]) <= 2e-3
    # Backward sees the input through E4M3: the activation of what was saved, quantised once more.
    seen = quantized(gate_up.reshape(-1, 96), (1, 128)).reshape(gate_up.shape)
    activated, pull_swiglu = jax.vjp(swiglu, jnp.asarray(seen, jnp.float32))
    recipe_once = replace(PAPER, saved_input="unquantized")
    _, d_activated, expected_d_weight = emulated(activated, weight, dy, recipe_once)
    d_activated = jnp.asarray(d_activated, jnp.bfloat16).astype(jnp.float32)
    assert relative(d_weight, expected_d_weight) <= 2e-3
    assert relative(d_gate_up, pull_swiglu(d_activated)[0]) <= 2e-3
    # From the unquantised input it would have been 2.6 % off.
    assert relative(d_gate_up, jax.vjp(swiglu, gate_up)[1](d_activated)[0]) > 0.01


# Three experts, one without rows, and a tail that belongs to nobody.
GROUPS = np.array([128, 0, 256], np.int32)


def test_grouped_equals_dense_expert_by_expert():
    rows, weights, dy = gaussians((512, 64), (3, 2, 20, 64), (512, 2, 20), seed=5)

    @jax.jit
    def grouped(rows, weights, dy):
        y, pull_back = jax.vjp(
            lambda rows, weights: fp8_grouped_linear(rows, weights, jnp.asarray(GROUPS), PAPER),
            rows,
            weights,
        )
        return y, *pull_back(dy)

    y, d_rows, d_weights = grouped(rows, weights, dy)
    start = 0
    for expert, size in enumerate(GROUPS):
        group = slice(start, start + size)
        start += size
        if not size:
            np.testing.assert_array_equal(d_weights[expert], 0)
            continue
        expected = jit_products(PAPER, rows[group], weights[expert], dy[group])
        assert relative(y[group], expected[0]) <= 1e-4  # a BF16 rounding may tip
        assert relative(d_rows[group], expected[1]) <= 1e-4
        assert relative(d_weights[expert], expected[2]) <= F32_SUM
    np.testing.assert_array_equal(y[start:], 0)
    np.testing.assert_array_equal(d_rows[start:], 0)


def test_bf16_is_a_recipe_of_nothing():
    assert RECIPES["bf16"] == BF16 and not any(vars(BF16).values())
    assert RECIPES["fp8_paper"].eh_proj is None
    blockwise = RECIPES["fp8_blockwise_dgrad"].down_proj
    assert blockwise and blockwise.dgrad.tile == (128, 128)
