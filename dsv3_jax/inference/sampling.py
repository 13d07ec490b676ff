"""Picks the next token from logits: greedy, temperature, top-p."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """One token a row, int32: the likeliest when temperature is 0, else a draw.

    The draw is from softmax(logits / temperature) cut to the fewest likeliest tokens whose
    probabilities reach top_p (nucleus sampling, Holtzman et al. 2020); the likeliest always stays.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-5)
    order = jnp.argsort(-scaled, axis=-1)
    sorted_probs = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    rank = jnp.argsort(order, axis=-1)
    kept = jnp.take_along_axis(before, rank, axis=-1) < top_p
    kept = kept.at[jnp.arange(logits.shape[0]), greedy].set(True)
    drawn = jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf), axis=-1)
    return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)
