"""Fused quantisers: every implementation against the unfused computation."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.fused import api, reference
from dsv3_jax.quantization.block_scaled import PER_TOKEN, dequantize, quantize
from tests.kernels.conftest import IMPLEMENTATIONS, normal, relative_error


def assert_same(out, expected):
    """The same bits in values, and scales to the last place."""
    bits = [np.asarray(x.values).view(np.uint8) for x in (out, expected)]
    np.testing.assert_array_equal(*bits)
    np.testing.assert_allclose(out.scales, expected.scales, rtol=2e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_rows_are_quantised_bit_for_bit(implementation, scale_format, rng, running):
    x = normal(rng, 72, 256).astype(jnp.bfloat16)
    x = x.at[3, 5].set(jnp.nan).at[4, 7].set(jnp.inf).at[5].set(0)
    with running(implementation):
        out = api.quantize_rows(x, scale_format, implementation=implementation)
    assert_same(out, quantize(x, PER_TOKEN, scale_format))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_read_gives_both_directions(implementation, rng, running):
    x = normal(rng, 128, 256).astype(jnp.bfloat16)
    with running(implementation):
        by_token, by_channel = api.quantize_both_ways(x, implementation=implementation)
    assert_same(by_token, quantize(x, PER_TOKEN))
    assert_same(by_channel, quantize(x.mT, PER_TOKEN))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu_is_rounded_once_and_quantised(implementation, rng, running):
    gate_up = normal(rng, 64, 256).astype(jnp.bfloat16)
    with running(implementation):
        out = api.swiglu_quantize(gate_up, implementation=implementation)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    # An E4M3 number has 3 bits: half a unit of its last place is 1/16, 1/37 on average.
    assert relative_error(dequantize(out), gate / (1 + np.exp(-gate)) * up) < 1 / 30
    # Two exponentials may differ in the last bit and tip a rounding of bfloat16.
    expected = dequantize(reference.swiglu_quantize(gate_up), jnp.float32)
    assert relative_error(dequantize(out, jnp.float32), expected) < 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_root_mean_square_cancels_from_the_values(implementation, rng, running):
    x, weight = normal(rng, 64, 256).astype(jnp.bfloat16) * 3, 1 + normal(rng, 256) / 10
    with running(implementation):
        out = api.rms_norm_quantize(x, weight, 1e-6, implementation=implementation)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * np.asarray(weight)
    assert relative_error(dequantize(out, jnp.float32), exact) < 1 / 30
    largest = np.abs(exact.reshape(64, 2, 128)).max(-1) / 448
    np.testing.assert_allclose(out.scales, largest, rtol=1e-6)
