"""Quantisers fused with what comes before them: each input is read once, each output written once.

Letters: T tokens, D channels, F expert hidden. Values are E4M3 in 1x128 tiles, what a GEMM reads as
its first operand; their scales lie rows last in memory, as the GPU kernels want them.
"""

from jaxtyping import Array, Float

from dsv3_jax.kernels import backend
from dsv3_jax.quantization.block_scaled import BlockScaled, ScaleFormat

PACKAGE = "dsv3_jax.kernels.fused"


def quantize_rows(
    x: Float[Array, "T D"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> BlockScaled:
    """x quantised per token, [T, D] in 1x128 tiles."""
    return _run("quantize_rows", x, scale_format, implementation=implementation)


def quantize_both_ways(
    x: Float[Array, "T D"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> tuple[BlockScaled, BlockScaled]:
    """x quantised per token, and x.T [D, T] quantised along tokens, both from one read.

    The first feeds the input gradient's product, the second the weight gradient's, which contracts
    over tokens and must find them last in memory (V3 report, section 3.3.2).
    """
    return _run("quantize_both_ways", x, scale_format, implementation=implementation)


def swiglu_quantize(
    gate_up: Float[Array, "T 2*F"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> BlockScaled:
    """silu(gate) x up quantised per token, [T, F]; gate is the first half of the channels.

    Computed in float32 and rounded once to the input's dtype before it is quantised.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up {gate_up.shape} must hold gate and up, an even number of channels"
        )
    return _run("swiglu_quantize", gate_up, scale_format, implementation=implementation)


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> BlockScaled:
    """x over its root mean square, times weight, quantised per token.

    Float32 throughout: unlike the unfused form, the normalised numbers are never rounded to x's
    dtype. The GPU kernel applies the root mean square to the scales, so that a tile whose numbers
    are all under 1e-4 of the weighted input keeps the floor of that, not of the normalised one.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {weight.shape} must have one number for each channel of {x.shape}"
        )
    return _run("rms_norm_quantize", x, weight, eps, scale_format, implementation=implementation)


def _run(op: str, *args, implementation: str | None):
    return backend.run(PACKAGE, op, *args, implementation=implementation)
