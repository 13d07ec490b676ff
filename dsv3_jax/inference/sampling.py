"""Picks tokens from logits: the likeliest, or a draw by temperature and top-p.

A draw is the maximum of log-probabilities with noise (Gumbel-max), and the noise is a function of a
sequence's seed and of the token's number in it. So a sequence's text depends neither on what else
is in the batch nor on how many tokens a step makes; a draft drawn with the noise of its number is
the target's own choice wherever the two distributions are close (`speculative.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsv3_jax.kernels import backend

DIGIT_BITS = 4  # of a float's 32, found in one pass over the vocabulary


class Settings(NamedTuple):
    """How the tokens of each sequence are picked."""

    temperature: Float[Array, " B"]  # f32; 0: always the likeliest
    top_p: Float[Array, " B"]  # f32
    seed: UInt32[Array, " B"]


def draw(
    logits: Float[Array, "B T V"],
    settings: Settings,
    number: Int[Array, " B"],
    sampled: bool = True,
) -> Int[Array, "B T"]:
    """A token for every row of logits, int32; row t is for token number[b] + t of sequence b.

    The likeliest where the temperature is 0, else a draw from softmax(logits / temperature) cut to
    the fewest likeliest tokens whose probabilities reach top_p (nucleus sampling, Holtzman et al.
    2020); the likeliest always stays. With sampled=False all temperatures are taken to be 0, and
    the program is an argmax.
    """
    greedy = likeliest(logits)
    if not sampled:
        return greedy
    warm = settings.temperature > 0
    divisor = jnp.where(warm, settings.temperature, 1.0)[:, None, None]
    scaled = logits.astype(jnp.float32) / divisor
    kept = nucleus(scaled, settings.top_p[:, None])
    kept |= jnp.arange(logits.shape[-1], dtype=jnp.int32) == greedy[..., None]
    noisy = jnp.where(kept, scaled + noise_of(settings.seed, number, scaled.shape[1:]), -jnp.inf)
    drawn = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return jnp.where(warm[:, None], drawn, greedy)


def likeliest(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The first of the largest of each row, int32: argmax."""
    if backend.platform() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA:CPU goes through an argmax number by number: 5 us for 1,024 logits, 2 for these two.
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == largest, ids, ids[-1]).min(axis=-1)


def noise_of(
    seed: UInt32[Array, " B"], number: Int[Array, " B"], shape: tuple[int, ...]
) -> Float[Array, "B T V"]:
    """Gumbel noise for tokens number[b] + t of sequences with these seeds; shape is (T, V)."""
    tokens, vocabulary = shape

    def of_token(seed, number):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), (vocabulary,))

    numbers = number[:, None] + jnp.arange(tokens, dtype=number.dtype)
    return jax.vmap(jax.vmap(of_token, (None, 0)))(seed, numbers)


def nucleus(scaled: Float[Array, "B T V"], top_p: Float[Array, "B #T"]) -> Bool[Array, "B T V"]:
    """True for the fewest likeliest tokens whose probabilities reach top_p; equals all stay.

    A token stays when those likelier than it have less than top_p together. The least of these is
    found without a sort: its bits, as an integer in the order of floats, a digit at a time.
    """
    weight = jnp.exp(scaled - scaled.max(-1, keepdims=True))
    target = top_p * weight.sum(-1)
    bits = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    ordered = jax.lax.bitcast_convert_type(
        jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32
    )
    digits = jnp.arange(2**DIGIT_BITS, dtype=jnp.uint32)
    least = jnp.zeros(target.shape, jnp.uint32)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        # The largest integer with each next digit, and what lies above it.
        last = least[..., None] + (digits << shift) + jnp.uint32((1 << shift) - 1)
        above = jnp.where(ordered[..., None, :] > last[..., None], weight[..., None, :], 0).sum(-1)
        few = above < target[..., None]
        digit = jnp.where(few.any(-1), jnp.argmax(few, axis=-1), len(digits) - 1)
        least += digit.astype(jnp.uint32) << shift
    return (ordered >= least[..., None]) | (top_p >= 1)[..., None]


def log_probability(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The tokens' log-probabilities under the model itself: temperature 1, nothing cut. f32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
