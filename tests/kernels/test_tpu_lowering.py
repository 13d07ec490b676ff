"""TPU kernels are lowered by Mosaic ahead of time: shapes and operations that a TPU has."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.kernels import tpu
from dsv3_jax.kernels.fused import pallas_tpu as fused
from dsv3_jax.kernels.gemm import pallas_tpu as dense
from dsv3_jax.kernels.grouped_gemm import pallas_tpu as grouped
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled, scales_shape

FP8 = jnp.float8_e4m3fn


def scaled(shape, tile):
    scales = jax.ShapeDtypeStruct(scales_shape(shape, tile), jnp.float32)
    return BlockScaled(jax.ShapeDtypeStruct(shape, FP8), scales, tile)


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


SIZES = jax.ShapeDtypeStruct((4,), jnp.int32)
OPERATIONS = {
    "o": (dense.scaled_matmul, scaled((4096, 16384), PER_TOKEN), scaled((7168, 16384), PER_BLOCK)),
    "kv_a, odd rows": (
        dense.scaled_matmul,
        scaled((77, 7168), PER_TOKEN),
        scaled((576, 7168), PER_BLOCK),
    ),
    "weight gradient": (
        dense.scaled_matmul,
        scaled((576, 4096), PER_TOKEN),
        scaled((7168, 4096), PER_TOKEN),
    ),
    "experts": (
        grouped.grouped_matmul,
        scaled((2048, 7168), PER_TOKEN),
        scaled((4, 4096, 7168), PER_BLOCK),
        SIZES,
    ),
    "experts in bfloat16": (grouped.grouped_matmul, bf16(2048, 7168), bf16(4, 4096, 7168), SIZES),
    "decoding": (
        grouped.masked_grouped_matmul,
        scaled((4, 64, 7168), PER_TOKEN),
        scaled((4, 4096, 7168), PER_BLOCK),
        SIZES,
    ),
    "experts' weight gradient": (
        grouped.grouped_wgrad,
        scaled((4096, 2048), PER_TOKEN),
        scaled((7168, 2048), PER_TOKEN),
        SIZES,
    ),
    "inputs, odd rows": (fused.quantize_rows, bf16(77, 576)),
    "gradients, both ways": (fused.quantize_both_ways, bf16(4096, 7168)),
    "kept inputs, turned": (fused.quantize_transposed, scaled((4096, 1536), PER_TOKEN)),
    "experts' weights": (fused.quantize_blocks, bf16(4, 4096, 7168)),
    "SwiGLU of experts": (fused.swiglu_quantize, bf16(2048, 4096)),
    "its gradient": (
        fused.swiglu_backward_quantize,
        scaled((2048, 4096), PER_TOKEN),
        bf16(2048, 2048),
    ),
    "a norm": (partial(fused.rms_norm_quantize, eps=1e-6), bf16(4096, 7168), bf16(7168)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_mosaic_lowers_the_real_shapes(operation, monkeypatch):
    monkeypatch.setattr(tpu, "require", lambda: None)  # no TPU is here
    function, *operands = OPERATIONS[operation]
    lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
