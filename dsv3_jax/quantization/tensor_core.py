"""What Hopper's tensor core returns for FP8 operands: an emulation of its narrow accumulator.

The one idea: the tensor core adds 32 products at a time in fixed point, keeping 13 fraction bits
below the largest, into registers of 1 + 8 + 13 bits ("FP22"), always truncating. Truncation is a
bias towards zero, so errors grow with the contracted dimension. DeepSeek-V3 therefore moves partial
sums to f32 registers every N_C = 128 products, which is also where scales are applied ("Insights
into DeepSeek-V3", section 3.1.1; V3 report, section 3.3.2). This is for looking at numbers: it
forms every product, M x N x 32 of them at a time.

The papers do not say which exponent is the largest when a product carries, nor how the sum meets
the register. Assumed here: the exponent of the product itself, and truncation towards zero of the
sum of register and step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.quantization.block_scaled import BlockScaled

PRODUCTS_PER_STEP = 32  # K of one FP8 WGMMA instruction
FRACTION_BITS = 13
PROMOTION_INTERVAL = 128  # N_C: four instructions


@partial(jax.jit, static_argnames=("promotion_interval", "fraction_bits"))
def tensor_core_matmul(
    a: BlockScaled,
    b: BlockScaled,
    *,
    promotion_interval: int | None = PROMOTION_INTERVAL,
    fraction_bits: int = FRACTION_BITS,
) -> Float[Array, "M N"]:
    """a @ b.T in f32 as Hopper computes it; a is [M, K] and b [N, K], scaled along K alike.

    promotion_interval is how many products are added before partial sums move to f32; None: all K,
    which a scale per tensor or row allows. fraction_bits is the hardware's 13; "Insights" asks for
    f32's 23.

    Raises ValueError when the intervals do not fit: an interval must be a multiple of 32, and
    no scale may change inside one.
    """
    rows, length = a.shape
    interval = -(-length // PRODUCTS_PER_STEP) * PRODUCTS_PER_STEP
    if promotion_interval is not None:
        interval = promotion_interval
    if interval % PRODUCTS_PER_STEP:
        raise ValueError(f"{promotion_interval=} must be a multiple of {PRODUCTS_PER_STEP}")
    if b.ndim != 2 or b.shape[1] != length:
        raise ValueError(f"a {a.shape} and b {b.shape} must be [M, K] and [N, K] with the same K")
    for operand in (a, b):
        if operand.tile[1] < length and operand.tile[1] % interval:
            raise ValueError(
                f"scales of tile {operand.tile} change inside an interval of {interval} products"
            )

    def promote(total, operands):
        (a_values, a_scale), (b_values, b_scale) = operands
        partial_sum = _accumulate(a_values, b_values, fraction_bits)
        return total + partial_sum * (a_scale[:, None] * b_scale[None, :]), None

    start = jnp.zeros((rows, b.shape[0]), jnp.float32)
    total, _ = jax.lax.scan(promote, start, (_intervals(a, interval), _intervals(b, interval)))
    return total


def _accumulate(a: Float[Array, "steps M 32"], b: Float[Array, "steps N 32"], fraction_bits: int):
    """The sum in FP22 over all steps, from an empty register."""

    def step(register, operands):
        products = operands[0][:, None, :] * operands[1][None, :, :]  # exact: 4 by 4 bits
        largest = _exponent(jnp.max(jnp.abs(products), -1, keepdims=True))
        added = jnp.sum(_truncate(products, largest, fraction_bits), -1)
        register = register + added
        return _truncate(register, _exponent(register), fraction_bits), None

    start = jnp.zeros((a.shape[1], b.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, (a, b))[0]


def _intervals(x: BlockScaled, interval: int):
    """Values [intervals, steps, rows, 32], zeros added, and their scales [intervals, rows]."""
    rows, length = x.shape
    count = -(-length // interval)
    values = jnp.pad(x.values.astype(jnp.float32), [(0, 0), (0, count * interval - length)])
    steps = interval // PRODUCTS_PER_STEP
    values = values.reshape(rows, count, steps, PRODUCTS_PER_STEP).transpose(1, 2, 0, 3)
    of_row = jnp.arange(rows) // x.tile[0]
    of_interval = jnp.arange(count) * interval // x.tile[1]
    return values, x.scales[of_row[None, :], of_interval[:, None]]


def _exponent(x: Array) -> Array:
    """floor(log2 |x|), and -126 for zero."""
    biased = jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF
    return jnp.maximum(biased, 1) - 127


def _truncate(x: Array, exponent: Array, fraction_bits: int) -> Array:
    """x without what lies below 2^(exponent - fraction_bits), towards zero; exact in f32."""
    # Powers of two from their bits; neither end leaves f32's range for sums of E4M3 products.
    down = jax.lax.bitcast_convert_type((fraction_bits - exponent + 127) << 23, jnp.float32)
    up = jax.lax.bitcast_convert_type((exponent - fraction_bits + 127) << 23, jnp.float32)
    return jnp.where(exponent > -100, jnp.trunc(x * down) * up, 0)
