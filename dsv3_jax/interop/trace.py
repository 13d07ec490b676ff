"""The model run layer by layer with everything worth comparing kept, for number-by-number checks.

`forward` scans its layers and returns what training needs; this loop applies the same blocks one
after another, so that another runtime's first wrong layer can be found.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.model.block import Block
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.transformer import Variables, logits_of


def trace(
    variables: Variables, tokens: Int[Array, "B T"], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Logits and the inside of every layer for whole rows of tokens, as NumPy arrays by name.

    logits [B, T, V] f32; mtp_logits_0 ... [B, T, V] f32, whose last depth + 1 rows mean nothing;
    hidden [L + 1, B, T, D] f32: the embedding and the output of each layer; final_hidden [B, T, D]
    after the final norm; experts [Lm, B, T, K] int32 with weights f32 of the MoE layers, and
    mtp_hidden_0, mtp_experts_0, mtp_weights_0 ... of the MTP modules.
    """
    positions = jnp.arange(tokens.shape[1])[None]
    embedded = _embed(variables["params"], tokens, config)
    hidden, choices = [embedded], []
    for name, dense, count in (
        ("dense_layers", True, config.num_dense_layers),
        ("moe_layers", False, config.num_moe_layers),
    ):
        stack = _with_key(variables, name)
        for layer in range(count):
            x, stats = _apply_block(stack, layer, hidden[-1], positions, config, dense)
            hidden.append(x)
            if stats is not None:
                choices.append((stats.experts, stats.weights))
    logits, previous = _head(variables["params"], hidden[-1], config)
    found: dict[str, Any] = {"logits": logits, "hidden": hidden, "final_hidden": previous}
    if choices:
        found["experts"], found["weights"] = zip(*choices)
    for depth in range(config.num_nextn_predict_layers):
        module = _with_key(variables, f"mtp_{depth}")
        previous, stats = _apply_mtp(module, previous, embedded, depth, positions, config)
        found |= {
            f"mtp_logits_{depth}": logits_of(variables["params"], previous),
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


def _with_key(variables: Variables, name: str) -> Variables:
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


@functools.partial(jax.jit, static_argnames="config")
def _embed(params: Variables, tokens: Array, config: ModelConfig) -> Array:
    return jnp.take(params["embed_tokens"], tokens, axis=0).astype(config.dtype)


@functools.partial(jax.jit, static_argnames=("config", "dense"))
def _apply_block(
    stack: Variables, layer: int, x: Array, positions: Array, config: ModelConfig, dense: bool
) -> tuple[Array, MoEStats | None]:
    """The output and statistics of one layer of a stack; compiled once for all its layers."""
    one = jax.tree.map(lambda leaf: leaf[layer], stack)
    x, _, stats = Block(config, dense).apply(one, x, positions)  # type: ignore[misc]
    return x, stats


@functools.partial(jax.jit, static_argnames="config")
def _head(params: Variables, x: Array, config: ModelConfig) -> tuple[Array, Array]:
    final = rms_norm(x, params["norm"], config.rms_norm_eps)
    return logits_of(params, final), final


@functools.partial(jax.jit, static_argnames="config")
def _apply_mtp(
    module: Variables, x: Array, embedded: Array, depth: int, positions: Array, config: ModelConfig
) -> tuple[Array, MoEStats]:
    embedding = jnp.roll(embedded, -(depth + 1), axis=1)
    x, _, stats = MTPModule(config).apply(module, x, embedding, positions)  # type: ignore[misc]
    return x, stats


def _array(value: Any) -> np.ndarray:
    """As NumPy; a sequence of arrays is stacked, and bf16, which .npz cannot hold, becomes f32."""
    array = np.stack(list(map(np.asarray, value))) if isinstance(value, (list, tuple)) else value
    array = np.asarray(array)
    return array if array.dtype.kind in "iu" else array.astype(np.float32)
