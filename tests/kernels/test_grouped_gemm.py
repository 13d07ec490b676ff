"""Products grouped by expert: every implementation against float64, with empty groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.gemm import tiles
from dsv3_jax.kernels.gemm.hopper_wgrad import wgrad
from dsv3_jax.kernels.grouped_gemm import api
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN
from tests.cases import in_every_run, matrix
from tests.kernels.conftest import (
    ALL_IMPLEMENTATIONS,
    BF16_LIMIT,
    F32_LIMIT,
    INTERPRETER_IS_NEWER,
    dequantize,
    lower_for_an_h200,
    normal,
    quantize,
    relative_error,
)

SIZES = jnp.array([128, 0, 256], jnp.int32)
ROWS = 448  # 64 rows belong to nobody


def plain(x):
    x = x if isinstance(x, jax.Array) else dequantize(x, jnp.float32)
    return np.asarray(x, np.float64)


def in_groups(rows, weights, sizes):
    out, start = np.zeros((rows.shape[0], weights.shape[1])), 0
    for expert, size in enumerate(np.asarray(sizes)):
        group = slice(start, start + size)
        out[group] = plain(rows)[group] @ plain(weights)[expert].T
        start += size
    return out


def operands(rng, scaled, n=64, k=128):
    rows, weights = normal(rng, ROWS, k), normal(rng, len(SIZES), n, k)
    if scaled:
        return quantize(rows, PER_TOKEN), quantize(weights, PER_BLOCK)
    return rows.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)


BF16, FP8 = pytest.param(False, id="bf16"), pytest.param(True, id="fp8")


@pytest.mark.parametrize("implementation, scaled", matrix(ALL_IMPLEMENTATIONS, [BF16, FP8]))
def test_each_group_meets_its_own_weights(implementation, scaled, rng, running):
    rows, weights = operands(rng, scaled)
    with running(implementation):
        out = api.grouped_matmul(rows, weights, SIZES, implementation=implementation)
    assert relative_error(out, in_groups(rows, weights, SIZES)) < BF16_LIMIT
    assert not np.asarray(out[int(SIZES.sum()) :]).any(), "rows of nobody are zero"


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_gradients_are_those_of_the_groups(implementation, rng, running):
    rows, weights = operands(rng, scaled=False)
    d_out = normal(rng, ROWS, 64).astype(jnp.bfloat16)

    def product(rows, weights):
        return api.grouped_matmul(rows, weights, SIZES, implementation=implementation)

    with running(implementation):
        d_rows, d_weights = jax.vjp(product, rows, weights)[1](d_out)
    assert relative_error(d_rows, in_groups(d_out, weights.mT, SIZES)) < BF16_LIMIT
    ends = np.cumsum(np.asarray(SIZES))
    for expert, (start, end) in enumerate(zip(ends - np.asarray(SIZES), ends)):
        exact = plain(d_out)[start:end].T @ plain(rows)[start:end]
        if start == end:
            assert not np.asarray(d_weights[expert]).any()
        else:
            assert relative_error(d_weights[expert], exact) < BF16_LIMIT


@pytest.mark.parametrize("implementation", [*ALL_IMPLEMENTATIONS, "blocks"])
def test_the_rows_gradient_alone(implementation, rng, running):
    _, weights = operands(rng, scaled=False)
    d_out = normal(rng, ROWS, 64).astype(jnp.bfloat16)
    with running(implementation):
        d_rows = api.grouped_dgrad(
            d_out,
            weights,
            SIZES,
            alignment=64 if implementation == "blocks" else 128,
            implementation=implementation,
        )
    assert relative_error(d_rows, in_groups(d_out, weights.mT, SIZES)) < BF16_LIMIT
    assert not np.asarray(d_rows[int(SIZES.sum()) :]).any(), "rows of nobody are zero"


@INTERPRETER_IS_NEWER
def test_columns_that_cut_a_tile_lower_for_a_gpu(rng):
    rows, weights = operands(rng, scaled=True, n=200)
    product = functools.partial(api.grouped_matmul, implementation="pallas_gpu")
    lower_for_an_h200(product, rows, weights, SIZES)


@pytest.mark.parametrize("implementation, buffer", matrix(ALL_IMPLEMENTATIONS, [64, 72]))
def test_masked_rows_of_each_expert(buffer, implementation, rng, running):
    sizes = jnp.array([3, 0, buffer], jnp.int32)
    rows = quantize(normal(rng, 3, buffer, 128), PER_TOKEN)
    weights = quantize(normal(rng, 3, 64, 128), PER_BLOCK)
    with running(implementation):
        out = api.masked_grouped_matmul(rows, weights, sizes, implementation=implementation)
    for expert, size in enumerate(np.asarray(sizes)):
        exact = plain(rows)[expert, :size] @ plain(weights)[expert].T
        if size:
            assert relative_error(out[expert, :size], exact) < BF16_LIMIT


ADDS, FRESH = pytest.param(True, id="adds"), pytest.param(False, id="fresh")


@pytest.mark.parametrize("implementation, accumulated", matrix(ALL_IMPLEMENTATIONS, [FRESH, ADDS]))
def test_weight_gradients_sum_over_their_group(implementation, accumulated, rng, running):
    sizes = jnp.array([256, 0, 128], jnp.int32)
    a, b = (quantize(normal(rng, rows, 384), PER_TOKEN) for rows in (72, 40))
    before = normal(rng, 3, 72, 40) if accumulated else jnp.zeros((3, 72, 40))
    with running(implementation):
        out = api.grouped_wgrad(
            a, b, sizes, accumulate=before if accumulated else None, implementation=implementation
        )
    start = 0
    for expert, size in enumerate(np.asarray(sizes)):
        group = slice(start, start + size)
        exact = plain(before)[expert] + plain(a)[:, group] @ plain(b)[:, group].T
        start += size
        if size or accumulated:
            assert relative_error(out[expert], exact) < F32_LIMIT
        else:
            assert not np.asarray(out[expert]).any()


@pytest.mark.parametrize(
    "implementation, adds", matrix([*ALL_IMPLEMENTATIONS, "blocks"], [ADDS, FRESH])
)
def test_weight_gradients_are_left_in_a_layer_s_place(implementation, adds, rng, running):
    sizes, before = jnp.array([256, 0, 128], jnp.int32), normal(rng, 3, 3, 72, 40)
    a, b = (quantize(normal(rng, rows, 384), PER_TOKEN) for rows in (72, 40))

    @jax.jit
    def left(before, number):
        total = GradientSum(jax.new_ref(before), number, adds)
        api.grouped_wgrad_into(a, b, sizes, total, implementation=implementation)
        return jax.freeze(total.total)

    with running(implementation):
        got = left(before, jnp.int32(1))
        product = api.grouped_wgrad(a, b, sizes, implementation=implementation)
    want = before.at[1].set(before[1] + product if adds else product)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize("scaled", in_every_run([True, False], True), ids=["fp8", "bf16"])
def test_the_kernel_of_weight_gradients_adds_up_their_squares(scaled, rng, running):
    sizes, tokens = jnp.array([256, 0, 128], jnp.int32), 384
    n, k = (200, 264) if scaled else (192, 320)
    a, b = (normal(rng, rows, tokens) for rows in (n, k))
    if scaled:
        (a, b), tile = (quantize(x, PER_TOKEN) for x in (a, b)), tiles.WGRAD
        scales = a.scales.mT, b.scales.mT
        operands = a.values, b.values
    else:
        tile, scales = tiles.BF16_WGRAD, (None, None)
        operands = a.T.astype(jnp.bfloat16), b.T.astype(jnp.bfloat16)
    starts = jnp.cumsum(sizes) - sizes

    def product(a, b, starts, sizes, a_scales, b_scales, **where):
        operands = a, b, starts, sizes, tile
        return wgrad(*operands, a_scales=a_scales, b_scales=b_scales, **where)

    with running("pallas_gpu"):
        gradient, squares = product(*operands, starts, sizes, *scales, squares=True)
    want = np.square(np.asarray(gradient, np.float64))
    for column in range(squares.shape[1]):
        of_tile = want[..., column * tile.n : (column + 1) * tile.n].sum(-1)
        np.testing.assert_allclose(squares[:, column, :n], of_tile, rtol=1e-5)
        assert not np.asarray(squares[:, column, n:]).any()

    def left(*operands):
        places = jax.new_ref(jnp.zeros((2, 3, n, k))), jax.new_ref(jnp.zeros(2))
        into = GradientSum(places[0], jnp.int32(1), False, places[1])
        product(*operands, into=into)
        return jax.freeze(places[0]), jax.freeze(places[1])

    lower_for_an_h200(left, *operands, starts, sizes, *scales)


def test_refuses_operands_that_do_not_belong_together(rng):
    rows, weights = operands(rng, scaled=True)
    with pytest.raises(ValueError, match="both be block-scaled"):
        api.grouped_matmul(rows, dequantize(weights), SIZES)
    with pytest.raises(ValueError, match="one size for each of the 3 experts"):
        api.grouped_matmul(rows, weights, SIZES[:2])
    with pytest.raises(ValueError, match="scales may not span groups"):
        api.grouped_wgrad(rows, rows, SIZES, alignment=64)
