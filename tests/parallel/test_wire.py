"""What rows are on the wire: nothing lost but what a format rounds, in the bytes it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.wire import block_scaled, decode, encode, pack, row_bytes, shapes_of, unpack
from dsv3_jax.quantization.block_scaled import PER_TOKEN, dequantize, quantize
from tests.cases import in_every_run
from tests.helpers import relative_error


def rows(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Largest error over the root mean square of normal numbers, whose largest of 960 is some 3.5.
LIMITS = {"none": 0.0, "bf16": 0.01, "fp8": 0.15, "logfmt10": 0.05}


@pytest.mark.parametrize("form", in_every_run(LIMITS, "none", "fp8"))
def test_a_row_arrives_as_the_format_rounds_it(form):
    x = rows(5, 192)  # a tile and a half
    parts = encode(x, form)
    parts = unpack(pack(parts), shapes_of(parts))
    assert relative_error(decode(parts, form, 192, jnp.float32), x) <= LIMITS[form]
    empty = tuple(jnp.zeros_like(part) for part in parts)
    np.testing.assert_array_equal(decode(empty, form, 192, jnp.float32), 0)


def test_parts_of_any_dtype_share_a_row():
    parts = (
        rows(4, 130).astype(jnp.float8_e4m3fn),
        rows(4, 3),
        rows(4, 7).astype(jnp.bfloat16),
        jnp.asarray(np.arange(20).reshape(4, 5) - 9, jnp.int16),
    )
    packed = pack(parts)
    assert (packed.shape, packed.dtype) == ((4, 130 + 12 + 14 + 10), jnp.uint8)
    for got, want in zip(unpack(packed, shapes_of(parts)), parts, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_fp8_numbers_stay_what_they_are_when_quantised_once_more():
    """Power-of-two scales: also with BF16 numbers in between."""
    x = 30 * rows(6, 256)
    sent = quantize(x, PER_TOKEN, "ue8m0")
    arrived = block_scaled(encode(x, "fp8"))
    np.testing.assert_array_equal(arrived.scales, sent.scales)
    want = dequantize(sent, jnp.float32)
    again = quantize(dequantize(arrived, jnp.bfloat16), PER_TOKEN, "ue8m0")
    for numbers in (arrived, again):
        np.testing.assert_array_equal(dequantize(numbers, jnp.float32), want)


def test_a_dispatched_row_of_v3_takes_7272_bytes():
    x = jax.ShapeDtypeStruct((2, 7168), jnp.bfloat16)
    encoded = jax.eval_shape(lambda x: encode(x, "fp8"), x)
    of_choices = (jnp.zeros((2, 8), jnp.float32), jnp.zeros((2, 8), jnp.int16))
    assert row_bytes((*encoded, *of_choices)) == 7168 + 7168 // 128 + 8 * (4 + 2) == 7272
    assert row_bytes(jax.eval_shape(lambda x: encode(x, "bf16"), x)) == 14336
    assert row_bytes(jax.eval_shape(lambda x: encode(x, "logfmt10"), x)) == 9184
