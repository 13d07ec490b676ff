"""The frozen base of a LoRA run: read, held in FP8 or another dtype, and joined with adapters."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config, ModelConfig, UserError
from dsv3_jax.interop.load import LoadDType, abstract_leaves, return_free_memory, stores_fp8
from dsv3_jax.interop.load import load as load_checkpoint
from dsv3_jax.model.adapters import merged, with_adapters
from dsv3_jax.model.fp8_weights import describe_weights, to_fp8_weights
from dsv3_jax.model.placement import placed, shardings
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.block_scaled import BlockScaled, as_bytes
from dsv3_jax.starting import Weights, read_run, with_depths_of
from dsv3_jax.training.restore import read_state
from dsv3_jax.training.state import abstract_adapters

log = logging.getLogger(__name__)


def load_base(config: Config, weights: Weights | None, layout: Layout) -> Any:
    """The frozen variables of a LoRA run; None without LoRA.

    They lie where products want them, or in slices, as the state does, where layers (FSDP) or the
    stages of a pipeline gather them. UserError where the run wants MTP modules that the weights do
    not have.
    """
    if not config.lora.rank:
        return None
    assert weights is not None
    return load_frozen(config, weights, layout, stored=lies_in_slices(layout))


def load_frozen(config: Config, weights: Weights, layout: Layout, stored: bool = False) -> Any:
    """The weights in the form that config.lora.base says, where products want them.

    stored: in slices, as a run holds its state.
    """
    ours, form, checkpoint = config.model, _form_of_base(config, weights), weights.checkpoint
    if layout.platform == "cpu":
        return_free_memory()  # what compiling has freed
    if checkpoint is None:
        variables = read_run(weights, placed(abstract_variables(ours), layout, stored=stored))
        if form == "bf16":
            variables = _in_bf16(variables)
    else:
        wanted, places = with_depths_of(ours, checkpoint), None
        if layout.has_devices:
            places = shardings(abstract_leaves(wanted, form), layout, stored=stored)
        raw = layout.platform == "cpu"
        variables = load_checkpoint(wanted, dtype=form, shardings=places, as_bytes=raw)
    if form == "fp8":
        variables = _held_in_fp8(variables, ours, layout)
        if layout.has_devices:
            variables = jax.device_put(variables, shardings(variables, layout, stored=stored))
    if layout.platform == "cpu":
        return_free_memory()
    log.info("the base is frozen; %s", describe_weights(variables))
    return variables


def abstract_base(config: Config, weights: Weights | None, layout: Layout) -> Any:
    """`load_base` as shapes, dtypes and shardings, by headers alone."""
    if not config.lora.rank:
        return None
    assert weights is not None
    ours, form, checkpoint = config.model, _form_of_base(config, weights), weights.checkpoint
    if checkpoint is None:
        variables = abstract_variables(ours)
        if form == "bf16":
            variables = jax.eval_shape(_in_bf16, variables)
    else:
        variables = abstract_leaves(with_depths_of(ours, checkpoint), form)
    if form == "fp8":
        held = partial(_held_in_fp8, config=ours, layout=layout)
        variables = jax.eval_shape(held, variables)
    return placed(variables, layout, stored=lies_in_slices(layout))


def _form_of_base(config: Config, weights: Weights) -> LoadDType:
    """fp8, bf16 or f32; UserError for MTP modules that the weights do not have."""
    ours, theirs = config.model, weights.model
    if ours.num_nextn_predict_layers > theirs.num_nextn_predict_layers:
        raise UserError(
            f"model.num_nextn_predict_layers={ours.num_nextn_predict_layers}, but {weights.folder} "
            f"has {theirs.num_nextn_predict_layers}, and LoRA trains no weights that are not there"
        )
    if config.lora.base != "auto":
        return config.lora.base
    if weights.checkpoint is not None and stores_fp8(weights.checkpoint):
        return "fp8"
    return "f32" if ours.dtype == "float32" else "bf16"


def _held_in_fp8(variables: Any, config: ModelConfig, layout: Layout) -> Any:
    """Projections in FP8; on CPUs as bytes, as each step cuts layers from their stacks."""
    variables = to_fp8_weights(variables, config)
    if layout.platform != "cpu":
        return variables

    def convert(leaf: Any) -> Any:
        is_fp8 = isinstance(leaf, BlockScaled) and leaf.dtype != np.uint8
        return as_bytes(leaf) if is_fp8 else leaf

    return jax.tree.map(convert, variables, is_leaf=lambda leaf: isinstance(leaf, BlockScaled))


def _in_bf16(variables: Any) -> Any:
    params = jax.tree.map(lambda x: x.astype("bfloat16"), variables["params"])
    return {**variables, "params": params}


def lies_in_slices(layout: Layout) -> bool:
    """Whether a frozen base lies in slices, which layers or stages gather; else it lies whole, or
    cut over tensor and expert axes."""
    return layout.gathers_each_layer or layout.mesh.shape["pipe"] > 1


def read_adapters(run_dir: Path, step: int, config: Config, layout: Layout = ONE_DEVICE) -> Any:
    """The adapters of a LoRA run's valid checkpoint."""
    abstract = abstract_adapters(config, layout)
    found = read_state(run_dir / "checkpoints", step, {"params": abstract}, partial=True)[0]
    return found["params"]


def merged_variables(weights: Weights, adapters: Any, config: Config) -> Any:
    """Variables in f32 with the adapters added to their base, on the first device."""
    lora = dataclasses.replace(config.lora, base="f32")
    base = load_frozen(dataclasses.replace(config, lora=lora), weights, ONE_DEVICE)
    params = with_adapters(base["params"], adapters, config.lora)
    return {"params": merged(params, config.model), "router": base["router"]}
