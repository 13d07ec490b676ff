"""The embedding on a mesh whose devices each hold a part of the vocabulary."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import StepWeight


def embed(
    table_VD: Float[Array, "V D"] | StepWeight,
    tokens: Int[Array | np.ndarray, "B T"],
    dtype: str,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """The table's rows of all tokens, laid out ("batch", "residual"), from a table cut by "vocab".

    Each device looks up the tokens that it has the rows of, and what they found is added up: one
    term a token is not zero, so the sum is exact (Megatron-LM, Shoeybi et al. 2019).
    """
    vocab, scattered = layout.axes("vocab"), layout.residual_axes()

    def look_up(table_VD, tokens):
        if isinstance(table_VD, StepWeight):
            return _read(look_up, table_VD.master, table_VD.numbers, tokens)
        if not vocab:
            few = layout.one_device and backend.platform() == "gpu" and tokens.size < len(table_VD)
            take = _take_few if few else partial(jnp.take, axis=0)
            return take(table_VD, jnp.asarray(tokens)).astype(dtype)
        local = tokens - jax.lax.axis_index(vocab) * len(table_VD)
        rows = jnp.take(table_VD, local, axis=0, mode="fill", fill_value=0)
        rows = jnp.where((local >= 0)[..., None], rows, 0).astype(dtype)
        if scattered == vocab:
            return jax.lax.psum_scatter(rows, vocab, scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows, vocab)

    inputs = layout.spec("vocab", None), layout.spec("batch", "seq")
    return layout.shard_map(look_up, inputs, layout.spec("batch", "residual", None))(
        table_VD, tokens
    )


@jax.custom_vjp
def _take_few(table_VD: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of fewer tokens than the table has rows, their gradient never written whole.

    The table's gradient is zero but for as many rows as there are tokens. It is looked up among
    these, and one of zeros, wherever XLA reads it; no array of V rows is filled and added to.
    """
    return jnp.take(table_VD, tokens, axis=0)


def _take_few_backward(residuals, d_rows):
    like, tokens = residuals  # the table's V and dtype, without a column
    order = jnp.argsort(tokens.reshape(-1))
    ids = tokens.reshape(-1)[order]
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    place = jnp.cumsum(first) - 1  # of each token among those that differ
    rows = d_rows.reshape(-1, d_rows.shape[-1])[order]
    sums = jnp.zeros((len(ids) + 1, rows.shape[1]), like.dtype)
    sums = sums.at[place].add(rows, indices_are_sorted=True)
    places = jnp.full(len(like), len(ids)).at[ids].set(place, indices_are_sorted=True)
    return jnp.take(sums, places, axis=0, mode="clip"), None


_take_few.defvjp(
    lambda table, tokens: (_take_few(table, tokens), (table[:, :0], tokens)), _take_few_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(look_up: Any, master: Array, numbers: Array, tokens: Array) -> Array:
    """`look_up` of numbers, with the gradient for the master, whose values nobody reads.

    Were its zeros looked up too, they would be an array of the table's size, f32, for all of a
    micro-batch.
    """
    del master
    return look_up(numbers, tokens)


def _read_forward(look_up, master, numbers, tokens):
    return _read(look_up, master, numbers, tokens), (master[:, :0], tokens)


def _read_backward(look_up, residuals, d_rows):
    like, tokens = residuals  # of no columns, but with the dtype and type of the master
    zeros = jnp.zeros((len(like), d_rows.shape[-1]), like.dtype)
    zeros = vary(zeros, tuple(jax.typeof(like).manual_axis_type.varying))
    _, pull = jax.vjp(lambda table: look_up(table, tokens), zeros)
    return (*pull(d_rows), None, None)


_read.defvjp(_read_forward, _read_backward)
