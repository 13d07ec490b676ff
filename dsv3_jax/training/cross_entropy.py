"""The output head and its cross-entropy as one operation, a piece of the tokens at a time.

The one idea: a loss's gradient with respect to its logits is known as soon as the logits are, so
the three products of the head follow one another for a few thousand tokens, and the logits of a
whole batch are never an array. All heads of a model, the main one and MTP's, share the weight:
their tokens are rows of the same products, and the weight's gradient is added up in float32.
What the backward pass is left with is one multiplication. (Liger Kernel, Hsu et al. 2024, has the
idea for the tokens of one head.)

Over a mesh the vocabulary may be cut: each device has the logits of its part.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.fused.api import quantize_blocks
from dsv3_jax.model.fp8 import fp8_linear
from dsv3_jax.model.fp8_operands import TILE, filled
from dsv3_jax.model.plain_products import times, times_back
from dsv3_jax.parallel.collectives import total, vary
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import StepWeight
from dsv3_jax.quantization.recipe import LinearRecipe

# Logits that are alive at a time: those of 8,192 tokens for V3's vocabulary, 2 GiB in BF16. What a
# piece adds to the weight's gradient, read and written in f32, is then 4 % of its time.
PIECE = 1 << 30

# In FP8 the gradients of logits are quantised as that many times what they are: as shares of a mean
# over thousands of tokens they lie under the floor of a tile's largest, 1e-4.
RAISED = float(1 << 24)


def head_nats(
    hidden: Float[Array, "B H T D"],
    head: Float[Array, "V D"] | StepWeight,
    targets: Int[Array, "B H T"],
    shares: Float[Array, "B H T"],
    factors: Float[Array, " H"],
    layout: Layout = ONE_DEVICE,
    recipe: LinearRecipe | None = None,
) -> tuple[Float[Array, ""], Float[Array, " H"]]:
    """Each head's sum of shares times nats, the latter -log softmax(head @ hidden)[target]: all of
    them times their factors, added up; and one by one.

    float32; H are the main head and MTP's. The first result can be differentiated, in hidden and
    head; shares, factors and the second result have no gradient. Logits are rounded to hidden's
    dtype, as `linear` rounds them, and so are their gradients. With a recipe all three products are
    in FP8. A StepWeight brings the head as they read it. With a layout, tokens lie as
    ("batch", None, "seq") and the head's rows as "vocab".
    """
    vocab, tokens = layout.axes("vocab"), (*layout.axes("batch"), *layout.axes("seq"))
    by_token: Any = layout.spec("batch", None, "seq")
    by_vocab: Any = layout.spec("vocab", None)
    whole: Any = layout.spec()
    return layout.shard_map(
        partial(_of_device, vocab, tokens, recipe),
        (layout.spec("batch", None, "seq", None), by_vocab, by_token, by_token, whole),
        (whole, whole),
    )(layout.constrain(hidden, "batch", None, "seq"), head, targets, shares, factors)


def _of_device(vocab, tokens, recipe, hidden, head, targets, shares, factors):
    master, copy = head, None
    if isinstance(head, StepWeight):
        master, copy = head.master, (head.numbers, head.transposed)
    # The gradients of what devices share are added up over them here.
    hidden, master, copy = vary(hidden, vocab), vary(master, tokens), vary(copy, tokens)
    weights = shares * factors[:, None]
    rows = hidden.reshape(-1, hidden.shape[-1])
    operands = rows, master, copy, targets.reshape(-1), weights.reshape(-1)
    of_rows: Any = _nats(vocab, recipe, *operands)
    value, nats = of_rows
    of_heads = jnp.sum(jax.lax.stop_gradient(nats).reshape(shares.shape) * shares, axis=(0, 2))
    return total(value, tokens), total(of_heads, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nats(vocab, recipe, rows, master, copy, targets, weights):
    multiply = _products(recipe, master, copy, rows.dtype)

    def one_piece(piece):
        return _log_softmax(vocab, multiply(piece[0])[0], piece[1])[0]

    pieces = _cut((rows, targets), len(master))
    nats = jax.lax.map(one_piece, pieces) if len(pieces[1]) > 1 else one_piece(_first(pieces))
    nats = nats.reshape(-1)[: len(rows)]
    return jnp.sum(nats * weights), nats


def _nats_forward(vocab, recipe, rows, master, copy, targets, weights):
    multiply = _products(recipe, master, copy, rows.dtype)

    def one_piece(d_head, piece):
        rows, targets, weights = piece
        logits, gradients = multiply(rows)
        nats, log_probabilities, is_target = _log_softmax(vocab, logits, targets)
        d_logits = (jnp.exp(log_probabilities) - is_target.astype(jnp.float32)) * weights[:, None]
        d_rows, of_piece = gradients(d_logits.astype(rows.dtype))
        d_head = of_piece if d_head is None else d_head + of_piece
        return d_head, (nats, d_rows)

    pieces = _cut((rows, targets, weights), len(master))
    # The first piece begins the sum that the others add to.
    d_head, results = one_piece(None, _first(pieces))
    results = jax.tree.map(lambda x: x[None], results)
    if len(pieces[1]) > 1:
        rest = jax.tree.map(lambda x: x[1:], pieces)
        d_head, others = jax.lax.scan(one_piece, d_head, rest)
        results = jax.tree.map(lambda *x: jnp.concatenate(x), results, others)
    nats, d_rows = (x.reshape(-1, *x.shape[2:])[: len(rows)] for x in results)
    value = jnp.sum(nats * weights)
    return (value, nats), (d_rows, d_head.astype(master.dtype))


def _nats_backward(vocab, recipe, gradients, cotangents):
    del vocab, recipe
    of_value, _ = cotangents
    d_rows, d_head = (g * of_value.astype(g.dtype) for g in gradients)
    return d_rows, d_head, None, None, None


_nats.defvjp(_nats_forward, _nats_backward)


def _products(recipe: LinearRecipe | None, master: Array, copy: Any, dtype: Any) -> Any:
    """A function of rows [T, D]: their logits [T, V], and one that makes the gradients of the rows
    and, in float32, of the head from the logits'. `copy` is of a StepWeight."""
    if recipe is None:
        head = master.astype(dtype) if copy is None else copy[0]

        def plain(rows):
            def gradients(d_logits):
                d_rows, contract = times_back(d_logits, head), (((0,), (0,)), ((), ()))
                d_head = jax.lax.dot_general(
                    d_logits, rows, contract, preferred_element_type=jnp.float32
                )
                return d_rows, d_head

            return times(rows, head), gradients

        return plain
    if copy is None:
        copy = quantize_blocks(filled(master, TILE, TILE), recipe.weight.scale_format)

    def in_fp8(rows):
        def logits_of(rows, master):
            return fp8_linear(rows, StepWeight(master, *copy), recipe)

        def gradients(d_logits):
            return jax.tree.map(lambda g: g / RAISED, pull(d_logits * RAISED))

        logits, pull = jax.vjp(logits_of, rows, master)
        return logits, gradients

    return in_fp8


def _log_softmax(vocab, logits, targets):
    """Each row's nats, and of the device's part of the vocabulary the log-probabilities and which
    of them is the target's."""
    logits = logits.astype(jnp.float32)
    columns = logits.shape[1]
    largest = logits.max(-1)
    if vocab:
        largest = jax.lax.pmax(largest, vocab)
        targets = targets - jax.lax.axis_index(vocab) * columns
    logits -= largest[:, None]
    log_sum = jnp.log(total(jnp.exp(logits).sum(-1), vocab))
    is_target = targets[:, None] == jnp.arange(columns, dtype=targets.dtype)
    of_target = total(jnp.where(is_target, logits, 0.0).sum(-1), vocab)
    return log_sum - of_target, logits - log_sum[:, None], is_target


def _cut(arrays: Any, vocabulary: int) -> Any:
    """The arrays in pieces of equally many tokens, [pieces, tokens, ...]; zeros fill the last."""
    tokens = len(arrays[0])
    number = -(-tokens * vocabulary // PIECE)
    each = -(-tokens // number)

    def cut(x):
        x = jnp.pad(x, [(0, number * each - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(number, each, *x.shape[1:])

    return jax.tree.map(cut, arrays)


def _first(pieces: Any) -> Any:
    return jax.tree.map(lambda x: x[0], pieces)
