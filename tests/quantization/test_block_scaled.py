"""Block-scaled FP8 against a NumPy and ml_dtypes oracle, bit for bit."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.quantization.block_scaled import (
    AMAX_FLOOR,
    E4M3_MAX,
    PER_BLOCK,
    PER_CHANNEL,
    PER_TOKEN,
    BlockScaled,
    dequantize,
    quantize,
    requantize,
    scales_shape,
    split_tiles,
)
from tests.cases import matrix

# Half a unit in the last place of E4M3's 3 stored bits, relative to a number of its top binades;
# an f32 scale adds 2^-24.
E4M3_HALF_ULP = 2.0**-4 * (1 + 1e-6)

jit_quantize = jax.jit(quantize, static_argnums=(1, 2))
jit_dequantize = jax.jit(dequantize, static_argnums=1)


def oracle_quantize(x, tile, scale_format):
    """Loops over tiles, one NumPy operation a step."""
    x = np.asarray(x, np.float32)
    m, k = x.shape[-2:]
    values = np.empty(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(scales_shape(x.shape, tile), np.float32)
    for batch in np.ndindex(x.shape[:-2]):
        for i, row in enumerate(range(0, m, tile[0])):
            for j, column in enumerate(range(0, k, tile[1])):
                at = (*batch, slice(row, row + tile[0]), slice(column, column + tile[1]))
                part = x[at]
                finite = np.isfinite(part)
                amax = np.abs(part[finite]).max(initial=np.float32(AMAX_FLOOR))
                if scale_format == "f32":
                    scale = amax * (np.float32(1) / np.float32(E4M3_MAX))
                else:
                    mantissa, exponent = np.frexp(np.float64(amax) / E4M3_MAX)
                    scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
                with np.errstate(invalid="ignore", under="ignore"):
                    clipped = np.clip(part * (np.float32(1) / scale), -E4M3_MAX, E4M3_MAX)
                values[at] = np.where(finite, clipped, np.nan).astype(ml_dtypes.float8_e4m3fn)
                scales[*batch, i, j] = scale
    return values, scales


def assert_same_bits(got: BlockScaled, values, scales):
    got_values = np.asarray(got.values)
    nan = np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got_values.astype(np.float32)), nan)
    # A NaN's sign is nobody's promise; every other bit is.
    np.testing.assert_array_equal(got_values.view(np.uint8)[~nan], values.view(np.uint8)[~nan])
    np.testing.assert_array_equal(np.asarray(got.scales).view(np.uint32), scales.view(np.uint32))


# Few shapes, because each compiles anew; partial tiles both ways, and a stack of two.
SHAPES = {
    (1, 4): [(3, 10), (2, 2, 8)],
    (4, 1): [(10, 3), (2, 9, 2)],
    (4, 4): [(5, 7), (2, 4, 9)],
}
CASES = [(tile, shape) for tile, shapes in SHAPES.items() for shape in shapes]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    case=st.sampled_from(CASES),
    scale_format=st.sampled_from(["f32", "ue8m0"]),
    data=st.data(),
)
def test_quantize_equals_the_oracle_bit_for_bit(case, scale_format, data):
    tile, shape = case
    x = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
    got = jit_quantize(jnp.asarray(x), tile, scale_format)
    assert_same_bits(got, *oracle_quantize(x, tile, scale_format))


TILES = [
    pytest.param(tile, id="x".join(map(str, tile))) for tile in (PER_TOKEN, PER_CHANNEL, PER_BLOCK)
]


@pytest.mark.parametrize(
    "tile, scale_format, dtype", matrix(TILES, ["ue8m0", "f32"], ["float32", "bfloat16"])
)
def test_real_tiles_over_many_binades_equal_the_oracle(tile, scale_format, dtype):
    rng = np.random.default_rng(0)
    shape = (2, 130, 257)
    x = rng.standard_normal(shape) * np.exp(4 * rng.standard_normal((2, 130, 1)))
    x = jnp.asarray(x, dtype)
    got = jit_quantize(x, tile, scale_format)
    assert got.dtype == jnp.float8_e4m3fn and got.shape == shape and got.tile == tile
    assert_same_bits(got, *oracle_quantize(x, tile, scale_format))


def test_eager_equals_jit():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 130, 257)), jnp.float32)
    got = jit_quantize(x, PER_TOKEN, "f32")
    assert_same_bits(quantize(x, PER_TOKEN), np.asarray(got.values), np.asarray(got.scales))


def test_every_value_of_e4m3_and_every_tie_rounds_to_even():
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = x.astype(np.float32)[None]
    got = jit_quantize(x, (1, x.size), "ue8m0")  # amax is 448: the scale is 1
    assert float(got.scales[0, 0]) == 1.0
    np.testing.assert_array_equal(
        np.asarray(got.values).view(np.uint8), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def test_zeros_keep_their_sign_and_a_positive_scale():
    x = jnp.array([[0.0, -0.0, 0.0, -0.0]])
    got = quantize(x, (1, 4))
    assert_same_bits(got, *oracle_quantize(x, (1, 4), "f32"))
    assert float(got.scales[0, 0]) == pytest.approx(AMAX_FLOOR / E4M3_MAX)
    np.testing.assert_array_equal(np.signbit(dequantize(got, jnp.float32)), np.signbit(x))


def test_nan_and_infinity_become_nan_and_spare_their_tile():
    x = jnp.array([[jnp.nan, 1.0, -2.0, 0.5], [jnp.inf, 1.0, -2.0, 0.5], [-jnp.inf] * 4])
    got = dequantize(quantize(x, (1, 4)), jnp.float32)
    np.testing.assert_array_equal(jnp.isnan(got), ~jnp.isfinite(x))
    np.testing.assert_allclose(got[:2, 1:], x[:2, 1:], rtol=E4M3_HALF_ULP)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_the_largest_finite_numbers_stay_finite(scale_format):
    x = jnp.array([[jnp.finfo(jnp.float32).max, 2.0**127, -(2.0**127)]])
    got = quantize(x, (1, 3), scale_format)
    assert np.isfinite(np.asarray(got.values).astype(np.float32)).all()
    # The largest f32 itself may round up to 2^128, which only its stored form can hold.
    np.testing.assert_allclose(dequantize(got, jnp.float32)[:, 1:], x[:, 1:], rtol=E4M3_HALF_ULP)


def test_subnormals_of_e4m3_are_kept():
    # 448 sets the scale to 1; 2^-9 is the smallest subnormal and half of it ties to even zero.
    x = jnp.array([[448.0, 2.0**-9, 3 * 2.0**-9, 2.0**-10, 1.5 * 2.0**-10]])
    got = dequantize(quantize(x, (1, 5), "ue8m0"), jnp.float32)
    np.testing.assert_array_equal(got, [[448.0, 2.0**-9, 3 * 2.0**-9, 0.0, 2.0**-9]])


def test_ue8m0_rounds_up_and_only_then():
    amax = np.float32(E4M3_MAX) * np.exp2(np.arange(-20, 20, dtype=np.float32))
    exact = quantize(jnp.asarray(amax[:, None]), (1, 1), "ue8m0").scales[:, 0]
    np.testing.assert_array_equal(exact, amax / E4M3_MAX)
    next_up = np.nextafter(amax, np.float32(np.inf))
    above = quantize(jnp.asarray(next_up[:, None]), (1, 1), "ue8m0").scales[:, 0]
    np.testing.assert_array_equal(above, 2 * amax / E4M3_MAX)


@pytest.mark.parametrize("tile", [PER_TOKEN, PER_CHANNEL, PER_BLOCK])
def test_dequantize_is_within_half_an_ulp_of_the_tile(tile):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((200, 300)), jnp.float32)
    q = jit_quantize(x, tile)
    ulp = np.repeat(np.repeat(np.asarray(q.scales), tile[0], 0), tile[1], 1)[:200, :300] * 2.0**-9
    error = np.abs(jit_dequantize(q, jnp.float32) - x)
    # Relative in the normal range, absolute among the tile's subnormals.
    assert (error <= np.maximum(E4M3_HALF_ULP * np.abs(x), ulp / 2 * (1 + 1e-6))).all()


def test_quantize_of_dequantized_ue8m0_is_the_identity():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 5, 130)), jnp.float32)
    once = jit_quantize(x, PER_TOKEN, "ue8m0")
    twice = jax.jit(requantize, static_argnums=(1, 2))(once, PER_TOKEN, "ue8m0")
    np.testing.assert_array_equal(
        jit_dequantize(twice, jnp.float32), jit_dequantize(once, jnp.float32)
    )


def test_no_compiler_may_drop_the_rounding():
    """XLA:GPU replaces a cast that a cast back follows by neither: excess precision, it says."""
    equations = jax.make_jaxpr(lambda x: dequantize(quantize(x, PER_TOKEN)))(
        jnp.ones((1, 128))
    ).eqns
    (rounded,) = [e.outvars[0] for e in equations if e.params.get("new_dtype") == jnp.float8_e4m3fn]
    assert [e.primitive.name for e in equations if rounded in e.invars] == ["optimization_barrier"]


def test_transpose_is_the_quantisation_of_the_transpose():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 6, 200)), jnp.float32)
    got, expected = jit_quantize(x, PER_TOKEN).mT, jit_quantize(x.mT, PER_CHANNEL)
    assert got.tile == expected.tile == PER_CHANNEL
    np.testing.assert_array_equal(got.scales, expected.scales)
    np.testing.assert_array_equal(
        jit_dequantize(got, jnp.float32), jit_dequantize(expected, jnp.float32)
    )


@pytest.mark.parametrize("tile", [PER_TOKEN, PER_CHANNEL, (32, 64)])
def test_split_tiles_changes_no_number(tile):
    x = jnp.asarray(np.random.default_rng(6).standard_normal((2, 130, 257)), jnp.float32)
    block = jit_quantize(x, PER_BLOCK)
    split = split_tiles(block, tile)
    assert split.tile == tile and split.scales.shape == scales_shape(x.shape, tile)
    np.testing.assert_array_equal(
        jit_dequantize(split, jnp.float32), jit_dequantize(block, jnp.float32)
    )
    with pytest.raises(ValueError, match="divide"):
        split_tiles(block, (3, 128))


def test_a_stack_is_sliced_by_scan_and_counts_its_bytes():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((3, 4, 200)), jnp.float32)
    stack = jit_quantize(x, PER_TOKEN)
    assert stack.nbytes == 3 * 4 * 200 + 3 * 4 * 2 * 4 and stack.ndim == 3
    _, rows = jax.lax.scan(lambda carry, b: (carry, dequantize(b, jnp.float32)), 0, stack)
    np.testing.assert_array_equal(rows, jit_dequantize(stack, jnp.float32))


@pytest.mark.misuse
@pytest.mark.parametrize(
    ("shape", "tile", "scale_format", "words"),
    [
        ((8,), (1, 8), "f32", "two dims"),
        ((8, 8), (0, 8), "f32", "positive"),
        ((8, 8), (1, 8), "e5m2", "scale_format"),
    ],
)
def test_misuse_is_refused_by_name(shape, tile, scale_format, words):
    with pytest.raises(ValueError, match=words):
        quantize(jnp.zeros(shape), tile, scale_format)
