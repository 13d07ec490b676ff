"""The fused quantisers in plain JAX: compute in float32, round once, quantise.

All rows are made here, also those beyond the ones that are `used`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    PER_TOKEN,
    BlockScaled,
    ScaleFormat,
    dequantize,
    quantize,
)
from dsv3_jax.quantization.e5m6 import E5M6


def quantize_rows(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> BlockScaled:
    """x quantised per token."""
    return quantize(x, PER_TOKEN, scale_format)


def quantize_rows_in_two_formats(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, E5M6]:
    """x quantised per token, and as E5M6."""
    return quantize(x, PER_TOKEN, scale_format), e5m6.encode(x)


def quantize_both_ways(
    x: Float[Array, "T D"], scale_format: ScaleFormat = "f32", *, used: Any = None
) -> tuple[BlockScaled, BlockScaled]:
    """x quantised per token, and x.T quantised along tokens."""
    return quantize(x, PER_TOKEN, scale_format), quantize(x.mT, PER_TOKEN, scale_format)


def gather_quantize_both_ways(
    x: Float[Array, "T D"],
    tokens: Int[Array, " M"],
    weights: Float[Array, " M"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, BlockScaled]:
    """Rows of x times weights, quantised both ways; zeros for tokens that there are not."""
    return quantize_both_ways(weighted_rows(x, tokens, weights), scale_format)


def weighted_rows(
    x: Float[Array, "T D"], tokens: Int[Array, " M"], weights: Float[Array, " M"]
) -> Float[Array, "M D"]:
    """x[tokens[m]] times weights[m] in float32, rounded to x's dtype; zeros beyond T."""
    rows = jnp.take(x, tokens, axis=0, mode="fill", fill_value=0)
    return (rows.astype(jnp.float32) * weights[:, None]).astype(x.dtype)


def quantize_blocks(
    x: Float[Array, "*E N K"], scale_format: ScaleFormat = "f32"
) -> tuple[BlockScaled, BlockScaled]:
    """x in tiles of 128 x 128, and the same numbers transposed."""
    numbers = quantize(x, PER_BLOCK, scale_format)
    return numbers, numbers.mT


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled | E5M6,
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> BlockScaled:
    """x transposed and quantised along tokens."""
    if isinstance(x, E5M6):
        x = e5m6.decode(x, jnp.float32)
    plain = dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x
    return quantize(plain.mT, PER_TOKEN, scale_format)


def swiglu_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    scale_format: ScaleFormat = "f32",
    *,
    transposed: bool = False,
    used: Any = None,
) -> BlockScaled:
    """silu(gate) x up, quantised per token; or transposed, along tokens."""
    gate, up = _gate_and_up(gate_up)
    dtype = rounded_to(gate_up)
    out = (jax.nn.silu(gate) * up).astype(dtype)
    return quantize(out.mT if transposed else out, PER_TOKEN, scale_format)


def swiglu_backward_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Any = None,
) -> tuple[BlockScaled, BlockScaled]:
    """The gradient of SwiGLU's input, quantised per token, and transposed, along tokens."""
    gate, up = _gate_and_up(gate_up)
    gradients = swiglu_gradients(gate, up, d_out.astype(jnp.float32))
    d_gate_up = jnp.concatenate(gradients, axis=-1).astype(rounded_to(gate_up))
    return quantize_both_ways(d_gate_up, scale_format)


def swiglu_gradients(gate: Any, up: Any, d_out: Any) -> tuple[Any, Any]:
    """The gradients of gate and of up for that of silu(gate) x up, all of one float32 shape."""
    sigmoid = jax.nn.sigmoid(gate)
    return d_out * up * sigmoid * (1 + gate * (1 - sigmoid)), d_out * gate * sigmoid


def rounded_to(gate_up: Any) -> Any:
    """The dtype that what SwiGLU makes of this input is rounded to before it is quantised."""
    return jnp.bfloat16 if isinstance(gate_up, BlockScaled) else gate_up.dtype


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x over its root mean square, times weight, quantised per token."""
    x = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return quantize(x * inverse_rms * weight.astype(jnp.float32), PER_TOKEN, scale_format)


def permute_quantize(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    tokens: Int[Array, " M"],
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """x quantised per token, each token's numbers in its K rows; zeros in the others."""
    del slots  # the same as tokens, seen from the other side
    return quantize(jnp.take(x, tokens, axis=0, mode="fill", fill_value=0), PER_TOKEN, scale_format)


def route_top_k(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    best_of_group: int,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Each token's K best experts out of its best groups, their scores, and all scores."""
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if topk_group < n_group:
        grouped = choice.reshape(logits.shape[0], n_group, -1)
        if grouped.shape[-1] > best_of_group:
            grouped = jax.lax.top_k(grouped, best_of_group)[0]
        group_scores = grouped.sum(-1)
        winners = jax.lax.top_k(group_scores, topk_group)[1]
        kept = jax.nn.one_hot(winners, n_group, dtype=jnp.bool_).any(axis=1)
        kept = jnp.repeat(kept, logits.shape[1] // n_group, axis=1)
        choice = jnp.where(kept, choice, -jnp.inf)
    experts = jax.lax.top_k(choice, top_k)[1]
    return experts, jnp.take_along_axis(scores, experts, axis=-1), scores


def _gate_and_up(x: Array | BlockScaled) -> list[Array]:
    """Gate and up in float32."""
    plain = dequantize(x, jnp.float32) if isinstance(x, BlockScaled) else x
    return jnp.split(plain.astype(jnp.float32), 2, axis=-1)
