"""Dense products of block-scaled FP8 numbers: every implementation against a float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.gemm import tiles, tpu_matmul
from dsv3_jax.kernels.gemm.api import scaled_matmul, scaled_wgrad
from dsv3_jax.kernels.gemm.hopper_matmul import Tile
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN
from tests.cases import matrix
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


def exact(a, b):
    a, b = (np.asarray(dequantize(x, jnp.float32), np.float64) for x in (a, b))
    return a @ b.T


@pytest.mark.parametrize(
    "implementation, m, n, k", matrix(ALL_IMPLEMENTATIONS, [(13, 72, 256), (130, 200, 128)])
)
def test_activations_by_weights(implementation, m, n, k, rng, running):
    a, b = quantize(normal(rng, m, k), PER_TOKEN), quantize(normal(rng, n, k), PER_BLOCK)
    with running(implementation):
        out = scaled_matmul(a, b, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, exact(a, b)) < BF16_LIMIT


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_weight_gradient_adds_to_what_is_there(implementation, rng, running):
    a, b = quantize(normal(rng, 13, 256), PER_TOKEN), quantize(normal(rng, 72, 256), PER_TOKEN)
    before = normal(rng, 13, 72)
    with running(implementation):
        out = scaled_matmul(a, b, accumulate=before, implementation=implementation)
    assert out.dtype == jnp.float32
    assert relative_error(out - before, exact(a, b)) < F32_LIMIT


@pytest.mark.parametrize("implementation, adds", matrix(ALL_IMPLEMENTATIONS, [True, False]))
def test_weight_gradient_is_left_in_a_layer_s_place(implementation, adds, rng, running):
    a, b = (quantize(normal(rng, rows, 256), PER_TOKEN) for rows in (72, 40))
    before = normal(rng, 2, 1, 72, 40)

    @jax.jit
    def left(before, number):
        squares = None if adds else jax.new_ref(jnp.zeros(2))
        total = GradientSum(jax.new_ref(before), number, adds, squares)
        scaled_wgrad(a, b, total, implementation=implementation)
        return jax.freeze(total.total), None if adds else jax.freeze(squares)

    with running(implementation):
        got, squares = left(before, jnp.int32(1))
    if squares is not None:
        np.testing.assert_allclose(squares, [0, np.square(got[1], dtype=float).sum()], rtol=1e-6)
    want = exact(a, b) + (np.asarray(before[1, 0]) if adds else 0)
    assert relative_error(got[1, 0], want) < F32_LIMIT
    np.testing.assert_array_equal(got[0], before[0])


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize(
    "tile",
    [
        Tile(waves=2, stages=2, store_buffers=2),
        Tile(columns=192, stages=2),
        Tile(warpgroups=3, stages=2, cluster=2, shared="b"),
        Tile(warpgroups=1, columns=56, stages=2, slabs=2),
    ],
    ids=["two waves", "scale changes inside", "shares b", "two slabs"],
)
def test_every_kind_of_tile(tile, rng, running):
    from dsv3_jax.kernels.gemm import pallas_gpu

    a, b = quantize(normal(rng, 72, 384), PER_TOKEN), quantize(normal(rng, 200, 384), PER_BLOCK)
    with running("pallas_gpu"):
        out = pallas_gpu.scaled_matmul(a, b, tile=tile)
    assert relative_error(out, exact(a, b)) < BF16_LIMIT


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize(
    "m, n, b_tile",
    matrix(
        [pytest.param(7, 72, id="few rows"), pytest.param(4097, 200, id="many rows")],
        [pytest.param(PER_BLOCK, id="by weights"), pytest.param(PER_TOKEN, id="float32")],
    ),
)
def test_edges_that_cut_a_tile_lower_for_a_gpu(m, n, b_tile, rng):
    from dsv3_jax.kernels.gemm import pallas_gpu

    a, b = quantize(normal(rng, m, 128), PER_TOKEN), quantize(normal(rng, n, 128), b_tile)
    lower_for_an_h200(pallas_gpu.scaled_matmul, a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=136), "K=136 must be a multiple of 128"),
        (dict(n=60), "N=60 of 8"),
        (dict(b_tile=(128, 1)), "tiles"),
        (dict(accumulate=jnp.zeros((8, 64))), "accumulate needs b in tiles of 1x128"),
        (
            dict(b_tile=PER_TOKEN, accumulate=jnp.zeros((8, 64), jnp.bfloat16)),
            r"accumulate is bfloat16 \(8, 64\); it must be float32",
        ),
    ],
)
def test_refuses_what_it_cannot_multiply(change, message):
    n, k = change.get("n", 64), change.get("k", 128)
    # Shapes alone: nothing is computed, or compiled.
    a = jax.eval_shape(lambda: quantize(jnp.zeros((8, k)), PER_TOKEN))
    b = jax.eval_shape(lambda: quantize(jnp.zeros((n, k)), change.get("b_tile", PER_BLOCK)))
    with pytest.raises(ValueError, match=message):
        scaled_matmul(a, b, accumulate=change.get("accumulate"))


def test_the_tile_grows_with_the_product():
    decode, train = tiles.dense(64, 7168, 16384, 132), tiles.dense(4096, 7168, 16384, 132)
    assert decode.m == 64 and train.m == 256
    # 33 column tiles of 64 leave most of 132 blocks idle: narrower ones are worth their overhead.
    assert tiles.dense(64, 2112, 7168, 132).n < decode.n
    # 16 x 17 tiles of 256 x 128 are 3 rounds where 2.06 would do; 192 rows waste less.
    assert tiles.dense(4096, 2112, 7168, 132).m == 192


def test_tpu_blocks_of_wide_sums_ask_for_the_vmem_of_two_buffers():
    """E4M3 sums over V3's heads (32,768) and a dense layer's gate and up (36,864)."""
    assert tpu_matmul._columns(512, 32_768) == tpu_matmul._columns(512, 36_864) == 128
    with pytest.raises(NotImplementedError, match="exceeds VMEM"):
        tpu_matmul._columns(512, 65_537)
    asked = [tpu_matmul._with_vmem(n << 20).vmem_limit_bytes for n in (4, 8, 9)]
    assert asked == [None, 18 << 20, 20 << 20]
