"""A module's parameters, made from their rows in the table of weights and handed out by name."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import Weight, Where, weights
from dsv3_jax.model.adapters import Adapted
from dsv3_jax.model.fp8_weights import FP8Weight
from dsv3_jax.quantization.block_scaled import BlockScaled, StepWeight


def parameters(
    module: nn.Module,
    config: ModelConfig,
    where: Where,
    path: str = "",
    num_places: int | None = None,
) -> Any:
    """All weights of a module, by their names: arrays, or FP8Weight where variables are FP8.

    The module is that at `path` ("self_attn", "mlp/experts") of the blocks, or of the MTP modules,
    that `where` says. A weight of experts has num_places of them where some have replicas. The
    order is the table's: each parameter's random numbers depend on its number in the module.
    """
    here = tuple(path.split("/")) if path else ()
    rows = [row for row in weights(config) if (row.where, row.module) == (where, here)]
    return SimpleNamespace(
        **{row.name: _parameter(module, row, config, num_places) for row in rows}
    )


def initializer(row: Weight, config: ModelConfig) -> Any:
    """The row's initialiser: a function of key and shape; f32."""
    kinds = jax.nn.initializers
    if row.init == "normal":
        return kinds.normal(config.initializer_range)
    return {"ones": kinds.ones, "zeros": kinds.zeros}[row.init]


def _parameter(module: nn.Module, row: Weight, config: ModelConfig, num_places: int | None) -> Any:
    shape = row.dims_of(config)
    if row.of_expert and num_places is not None:
        shape = (num_places, *shape[1:])
    if row.collection != "params":
        fill = {"ones": jnp.ones, "zeros": jnp.zeros}[row.init]  # state is not drawn
        return module.variable(row.collection, row.name, fill, shape, jnp.float32).value
    if module.has_variable("params", row.name):
        numbers = module.get_variable("params", row.name)
        if isinstance(numbers, Adapted):
            return dataclasses.replace(numbers, shape=shape)
        if isinstance(numbers, StepWeight):
            return numbers
        if isinstance(numbers, BlockScaled):
            return FP8Weight(numbers, shape)
    return module.param(row.name, initializer(row, config), shape)
