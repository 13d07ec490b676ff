"""The model run layer by layer with everything worth comparing kept, for number-by-number checks.

`forward` runs all layers at once and returns what training needs; here they run one after another,
so that another runtime's first wrong layer can be found.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.model.ends import embed_tokens, final_norm, head
from dsv3_jax.model.forward_pass import Pass, Tokens, of_part
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.mtp import run_mtp
from dsv3_jax.model.stack import DENSE, MOE, run_layers
from dsv3_jax.model.transformer import Variables


def trace(
    variables: Variables, tokens: Int[Array | np.ndarray, "B T"], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Logits and the inside of every layer for whole rows of tokens, as NumPy arrays by name.

    logits [B, T, V] f32; mtp_logits_0 ... [B, T, V] f32, whose last depth + 1 rows mean nothing;
    hidden [L + 1, B, T, D] f32: the embedding and the output of each layer; final_hidden [B, T, D]
    after the final norm; experts [Lm, B, T, K] int32 with weights f32 of the MoE layers, and
    mtp_hidden_0, mtp_experts_0, mtp_weights_0 ... of the MTP modules.

    A float32 model is multiplied in float32 on GPUs and TPUs, too.
    """
    exactly = jax.default_matmul_precision("highest")
    with exactly if config.dtype == "float32" else contextlib.nullcontext():
        return _trace(variables, tokens, config)


def _trace(
    variables: Variables, tokens: Int[Array | np.ndarray, "B T"], config: ModelConfig
) -> dict[str, np.ndarray]:
    how, params = Pass(config), variables["params"]
    of_tokens = Tokens(jnp.arange(tokens.shape[1])[None])
    embedded = _embed(params, tokens, how)
    hidden, choices = [embedded], []
    for name, count in ((DENSE, config.num_dense_layers), (MOE, config.num_moe_layers)):
        layers = of_part(variables, name)
        for number in range(count):
            x, stats = _run_layer(layers, number, hidden[-1], of_tokens, name, how)
            hidden.append(x)
            if stats is not None:
                choices.append((stats.experts[0], stats.weights[0]))
    logits, previous = _end(params, hidden[-1], how)
    found: dict[str, Any] = {"logits": logits, "hidden": hidden, "final_hidden": previous}
    if choices:
        found["experts"], found["weights"] = zip(*choices)
    for depth in range(config.num_nextn_predict_layers):
        ahead = jnp.roll(embedded, -(depth + 1), axis=1)
        previous, stats = _run_mtp(variables, depth, previous, ahead, of_tokens, how)
        found |= {
            f"mtp_logits_{depth}": head(params, previous, how),
            f"mtp_hidden_{depth}": previous,
            f"mtp_experts_{depth}": stats.experts,
            f"mtp_weights_{depth}": stats.weights,
        }
    return {name: _array(value) for name, value in found.items()}


def read_tokens(path: str | Path, config: ModelConfig) -> np.ndarray:
    """Token ids [B, T] int32 of a .npy file of one row or several; UserError for anything else."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
        raise UserError(f"{path}: token ids must be an array of integers")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or not tokens.size:
        raise UserError(f"{path}: token ids must be [T] or [B, T], not {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise UserError(
            f"{path}: token ids reach from {tokens.min()} to {tokens.max()}, but vocab_size is "
            f"{config.vocab_size}"
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise UserError(
            f"{path}: {tokens.shape[1]} tokens exceed max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    return tokens.astype(np.int32)


@functools.partial(jax.jit, static_argnames="how")
def _embed(params: Variables, tokens: Array, how: Pass) -> Array:
    return embed_tokens(params, tokens, how)


@functools.partial(jax.jit, static_argnames=("name", "how"))
def _run_layer(
    layers: Variables, number: int, x: Array, of_tokens: Tokens, name: str, how: Pass
) -> tuple[Array, MoEStats | None]:
    """The output and statistics of one layer of a kind; compiled once for all its layers."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number, 1), layers)
    variables = {kind: {name: tree} for kind, tree in one.items()}
    x, _, stats = run_layers(variables, x, of_tokens, how)
    return x, stats


@functools.partial(jax.jit, static_argnames="how")
def _end(params: Variables, x: Array, how: Pass) -> tuple[Array, Array]:
    final = final_norm(params, x, how)
    return head(params, final, how), final


@functools.partial(jax.jit, static_argnames=("depth", "how"))
def _run_mtp(
    variables: Variables, depth: int, x: Array, ahead: Array, of_tokens: Tokens, how: Pass
) -> tuple[Array, MoEStats]:
    x, _, stats = run_mtp(variables, depth, x, ahead, of_tokens, how)
    return x, stats


def _array(value: Any) -> np.ndarray:
    """As NumPy; a sequence of arrays is stacked, and bf16, which .npz cannot hold, becomes f32."""
    array = np.stack(list(map(np.asarray, value))) if isinstance(value, (list, tuple)) else value
    array = np.asarray(array)
    return array if array.dtype.kind in "iu" else array.astype(np.float32)
