"""RMSNorm with its numbers quantised, on Hopper: all numbers of a token wait in registers.

Until its root mean square is known: a block has one wide token, or eight narrow ones.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_quantize import COMPILER_PARAMS, quantized
from dsv3_jax.kernels.fused.hopper_registers import tokens_layout
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.quantization.block_scaled import ScaleFormat

TOKENS = 8  # of a block, where one token's channels are few
NARROW = 2048  # channels, at most, of which a block has eight tokens in registers
WHOLE_CHANNELS = 1024  # that the threads of a block read of a token at a time


def of_wide_tokens(x: Any, weight: Any, eps: float, scale_format: ScaleFormat) -> Any:
    """E4M3 values [T, D / 128, 128] of tokens of many channels, and scales [D / 128, T]."""
    tokens, dim = x.shape
    if dim % WHOLE_CHANNELS:
        raise NotImplementedError(f"{dim=} must be a multiple of {WHOLE_CHANNELS} above {NARROW}")
    tiles, layout = dim // 128, tokens_layout()

    def kernel(x_ref, weight_ref, values, scales):
        token = lax.axis_index("block")
        numbers = _load_whole(x_ref.at[token], layout)
        total = jnp.sum(jnp.sum(jnp.square(numbers), axis=1), axis=0)
        numbers *= lax.rsqrt(total / dim + eps) * _load_whole(weight_ref, layout)
        values[token], scales[:, token] = quantized(numbers, scale_format)

    return hopper.kernel(
        kernel,
        out_type=_results(x, (tokens, tiles, 128)),
        grid=(tokens,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(x.reshape(tokens, tiles, 128), weight.reshape(tiles, 128))


def of_narrow_tokens(x: Any, weight: Any, eps: float, scale_format: ScaleFormat) -> Any:
    """E4M3 values [T, D] of tokens of few channels, and scales [D / 128, T]."""
    tokens, dim = x.shape
    layout, columns = tokens_layout(), [pl.ds(first, 128) for first in range(0, dim, 128)]

    def kernel(x_ref, weight_ref, values, scales):
        row = lax.min(lax.axis_index("block") * TOKENS, jnp.int32(tokens - TOKENS))
        rows = pl.ds(row, TOKENS)
        blocks = [_load(x_ref, rows, span, layout).astype(jnp.float32) for span in columns]
        total = jnp.sum(sum(jnp.square(block) for block in blocks), axis=1)
        inverse_rms = lax.rsqrt(total / dim + eps)
        for tile, (block, span) in enumerate(zip(blocks, columns)):
            weights = plgpu.load(weight_ref.at[span], layout=layout.reduce(0), optimized=False)
            block *= lax.broadcast_in_dim(inverse_rms, block.shape, [0])
            block *= lax.broadcast_in_dim(weights, block.shape, [1])
            values[rows, span], scales[tile, rows] = quantized(block, scale_format)

    return hopper.kernel(
        kernel,
        out_type=_results(x, (tokens, dim)),
        grid=(pl.cdiv(tokens, TOKENS),),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(x, weight)


def _results(x, shape: tuple[int, ...]) -> list[Any]:
    tokens, dim = x.shape
    return [
        manual.result(shape, jnp.float8_e4m3fn, x),
        manual.result((dim // 128, tokens), jnp.float32, x),
    ]


def _load_whole(ref: Any, layout: Any) -> Any:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _load(ref: Any, rows: Any, columns: Any, layout: Any) -> Any:
    return plgpu.load(ref.at[rows, columns], layout=layout, optimized=False)
