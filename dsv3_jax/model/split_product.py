"""Products with float32 operands on tensor cores that multiply BF16: the router's.

The one idea: a float32 number is the sum of three BF16 numbers, each of which has what the ones
before left over. A product of BF16 numbers is exact in float32, which sums are in; so the product
with the pieces side by side, and its parts added up, is that with float32 numbers. Of one operand
that is BF16 already this is three times the arithmetic, on units 15 times as fast.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.kernels import backend

PIECES = 3  # 3 x 8 bits are the 24 of float32
# Rows from which it pays: of fewer, as decoding has them, reading the weight takes the time.
MANY_ROWS = 512


def f32_product(x: Float[Array, "T D"], weight: Float[Array, "E D"]) -> Float[Array, "T E"]:
    """x times the transposed weight with all bits of float32, in float32.

    On a GPU, for many rows in BF16, by tensor cores; the gradient of x then has two pieces of
    either operand, 16 bits, before it is rounded to BF16.
    """
    narrow = x.dtype == jnp.bfloat16 and weight.dtype == jnp.float32
    if narrow and len(x) >= MANY_ROWS and backend.platform() == "gpu":
        return by_pieces(x, weight)
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    return lax.dot_general(*wide, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def by_pieces(x: Float[Array, "T D"], weight: Float[Array, "E D"]) -> Float[Array, "T E"]:
    """`f32_product` of x in BF16 and a float32 weight, by products of BF16 numbers."""
    of_pieces = _multiply(x, jnp.concatenate(pieces(weight)), 1, 1)
    return _small_first(jnp.split(of_pieces, PIECES, axis=1))


def _backward(operands, d_y):
    x, weight = operands
    high, low, _ = pieces(d_y)
    weight_high, weight_low, _ = pieces(weight)
    d_x = _multiply(
        jnp.concatenate([low, high, high], axis=1),
        jnp.concatenate([weight_high, weight_low, weight_high]),
        1,
        0,
    )
    of_pieces = _multiply(jnp.concatenate(pieces(d_y), axis=1), x, 0, 0)
    return d_x.astype(x.dtype), _small_first(jnp.split(of_pieces, PIECES))


by_pieces.defvjp(lambda x, weight: (by_pieces(x, weight), (x, weight)), _backward)


def pieces(x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Three BF16 arrays whose sum is x, the largest first.

    What is smaller than 2^-133, BF16's smallest number, is lost of a piece.
    """
    found = []
    for _ in range(PIECES):
        # Said so, and not by casts: XLA takes a cast and the cast back for excess precision.
        piece = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return found


def _small_first(sums: list[Array]) -> Array:
    """The sum, the last of them first."""
    return functools.reduce(jnp.add, reversed(sums))


def _multiply(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    dims = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
