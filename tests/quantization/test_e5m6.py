"""E5M6: every one of its 4,096 codes, and rounding and packing against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quantization.e5m6 import MAX, decode, encode, from_codes, to_codes

CODES = np.arange(4096, dtype=np.uint16)
# Sign, exponent and fraction taken apart in Python: what the format says, without float16.
FRACTION, EXPONENT = CODES & 63, CODES >> 6 & 31
VALUES = np.where(
    EXPONENT == 0, FRACTION * 2.0**-20, (1 + FRACTION / 64) * 2.0 ** (EXPONENT.astype(int) - 15)
) * np.where(CODES >> 11, -1.0, 1.0)
FINITE = EXPONENT < 31
UPWARD = VALUES[:2048][FINITE[:2048]]  # from zero to the largest

coded, decoded = jax.jit(encode), jax.jit(decode, static_argnums=1)


def oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows [M, K], by a search through the table in float64."""
    groups = x.astype(np.float64).reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(groups).max(-1), 1e-4)
    scales = 2.0 ** np.ceil(np.log2(np.float32(amax) / np.float32(MAX)).astype(np.float64))
    scaled = groups / scales[..., None]
    above = np.searchsorted(UPWARD, np.abs(scaled)).clip(1, len(UPWARD) - 1)
    low, high = UPWARD[above - 1], UPWARD[above]
    to_low, to_high = np.abs(scaled) - low, high - np.abs(scaled)
    take_high = (to_high < to_low) | ((to_high == to_low) & (above % 2 == 0))
    codes = np.where(take_high, above, above - 1) | np.where(np.signbit(scaled), 2048, 0)
    return codes.reshape(x.shape).astype(np.uint16), scales


def test_every_code_stands_for_what_the_format_says():
    got = np.asarray(from_codes(jnp.asarray(CODES)))
    np.testing.assert_array_equal(got[FINITE], VALUES[FINITE])
    assert VALUES[FINITE].max() == MAX
    infinite = ~FINITE & (FRACTION == 0)
    np.testing.assert_array_equal(got[infinite], [np.inf, -np.inf])
    assert np.isnan(got[~FINITE & (FRACTION > 0)]).all()


def test_every_code_is_its_own_nearest():
    got = np.asarray(to_codes(jnp.asarray(VALUES[FINITE], jnp.float32)))
    np.testing.assert_array_equal(got, CODES[FINITE])
    special = to_codes(jnp.asarray([np.inf, -np.inf, np.nan], jnp.float32))
    assert np.isposinf(from_codes(special)[0]) and np.isneginf(from_codes(special)[1])
    assert np.isnan(from_codes(special)[2])


def test_halfway_goes_to_the_even_code_and_beside_it_to_the_nearer():
    middle = ((UPWARD[1:] + UPWARD[:-1]) / 2).astype(np.float32)
    index = np.arange(len(middle))
    exact = np.asarray(to_codes(jnp.asarray(middle)))
    np.testing.assert_array_equal(exact, index + index % 2)
    for towards, want in ((0.0, index), (np.inf, index + 1)):
        beside = np.nextafter(middle, np.float32(towards))
        np.testing.assert_array_equal(np.asarray(to_codes(jnp.asarray(beside))), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_those_of_the_oracle(dtype):
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.integers(-30, 30, (16, 384)))
    x = jnp.asarray(rng.normal(size=(16, 384)) * sizes, dtype)
    x = (
        x.at[0]
        .set(0)
        .at[1, :128]
        .set(65024)
        .at[2, :128]
        .set(65025.0)
        .at[3, :128]
        .set(127 * 2.0**-9)
    )
    codes, scales = oracle(np.asarray(x, np.float32))
    out = coded(x)
    np.testing.assert_array_equal(np.asarray(out.scales), scales)
    want = (from_codes(jnp.asarray(codes)).reshape(16, 3, 128) * scales[..., None]).reshape(16, -1)
    np.testing.assert_array_equal(np.asarray(decoded(out, "float32")), want)
    again = decoded(coded(decoded(out, "float32")), "float32")
    np.testing.assert_array_equal(np.asarray(again), want)


def test_words_hold_eight_codes_from_the_upper_bits_down():
    codes = [0xABC, 0x123, 0x456, 0x789, 0x0DE, 0x2F0, 0x345, 0x678]
    x = from_codes(jnp.asarray(codes, jnp.uint16))
    x = jnp.concatenate([x, jnp.full(8, MAX)])  # so that the scale is 1
    out = coded(x)
    stream = "".join(f"{code:03X}" for code in codes)
    assert [f"{int(word):08X}" for word in out.words[:, 0]] == [
        stream[8 * i : 8 * i + 8] for i in range(3)
    ]
    assert out.words.dtype == jnp.uint32 and out.words.shape == (3, 2)
    assert 32 * out.words.size == 12 * x.size


def test_bfloat16_holds_the_numbers_exactly_and_errs_by_half_a_step():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 256)), jnp.bfloat16)
    out = coded(x)
    exact, rounded = (np.asarray(decoded(out, t), np.float32) for t in ("float32", "bfloat16"))
    np.testing.assert_array_equal(exact, rounded)
    error = np.abs(exact - np.asarray(x, np.float32))
    assert 0 < (error / np.abs(np.asarray(x, np.float32))).max() <= 2.0**-7


def test_what_is_not_finite_stays_in_its_place():
    x = jnp.ones((2, 128)).at[0, 3].set(jnp.nan).at[1, 5].set(-jnp.inf)
    back = np.asarray(decoded(coded(x), "float32"))
    assert np.isnan(back[0, 3]) and np.isneginf(back[1, 5])
    assert (np.delete(back[0], 3) == 1).all() and (np.delete(back[1], 5) == 1).all()


def test_a_width_that_fills_no_words_is_refused():
    with pytest.raises(ValueError, match="K=12 must be a multiple of 8"):
        encode(jnp.ones((2, 12)))
