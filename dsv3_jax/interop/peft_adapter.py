"""Adapters in the form of Hugging Face peft: adapter_config.json and adapter_model.safetensors.

peft loads them onto transformers' model by module names, a matrix A [r, K] and B [N, r] for each
published matrix. transformers 5 holds the experts of a layer as one parameter, and peft (0.21)
takes every gate_proj, up_proj and down_proj of the architecture for its parts
(peft:utils/transformers_weight_conversion.py). So adapters of attention have this form, and those
of feed-forwards are merged instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import LoraConfig, ModelConfig, UserError
from dsv3_jax.interop.name_map import places
from dsv3_jax.interop.safetensors import save_file
from dsv3_jax.interop.stream import carry_along, finished_folder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_tensors(adapters: Mapping[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """A and B, f32, by peft's names. UserError for adapters of feed-forwards."""
    found: dict[str, np.ndarray] = {}
    for name, place in places(model).items():
        node: Any = adapters
        for key in place.path[1:]:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None or place.path[0] != "params":
            continue
        if ".mlp." in name:
            raise UserError(
                f"{name} has an adapter that peft cannot load: with transformers 5 it takes "
                "gate_proj, up_proj and down_proj of this architecture for those of routed "
                "experts, which are one parameter there: export with --merge"
            )
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            array = np.asarray(node[ours][place.index], np.float32)
            found[f"{module}.{theirs}.weight"] = np.ascontiguousarray(array)
    return found


def export_adapter(
    adapters: Mapping[str, Any],
    model: ModelConfig,
    lora: LoraConfig,
    base: str,
    dst: str | Path,
    *,
    overwrite: bool = False,
    files_from: Path | None = None,
) -> Path:
    """Writes the adapters as a peft folder `dst` and returns it.

    `base` is what they belong to; tokenizer and chat template come from `files_from`. Raises
    UserError as `adapter_tensors`, and when `dst` exists.
    """
    tensors = adapter_tensors(adapters, model)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted({n.rpartition(".lora_")[0].removeprefix(PREFIX) for n in tensors}),
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with finished_folder(Path(dst), size, overwrite=overwrite, resume=False) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        carry_along(files_from, folder)
    return Path(dst)
