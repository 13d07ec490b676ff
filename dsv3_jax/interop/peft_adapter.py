"""Adapters in the form of Hugging Face peft: adapter_config.json and adapter_model.safetensors.

peft loads them onto transformers' model by module names, a matrix A [r, K] and B [N, r] for each
published matrix. Those of attention are `target_modules`. peft (0.21) takes any such gate_proj,
up_proj and down_proj of this architecture for parts of routed experts
(peft:utils/transformers_weight_conversion.py), so those of feed-forwards are `target_parameters`:
the `weight` of a dense or shared projection; and of routed experts the one parameter that
transformers 5 makes of a layer's, gate's and up's adapters side by side in twice the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import LoraConfig, ModelConfig
from dsv3_jax.interop.name_map import Place, places
from dsv3_jax.interop.safetensors import save_file
from dsv3_jax.interop.stream import carry_along, finished_folder
from dsv3_jax.model.adapters import A, B

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class PeftForm(NamedTuple):
    """Adapters by peft's names, and what its config says of them.

    Fields:
        tensors: A and B, f32, by name.
        modules, parameters: target_modules and target_parameters.
        wider: of these parameters, those with adapters of twice the rank, which count twice alpha.
    """

    tensors: dict[str, np.ndarray]
    modules: list[str]
    parameters: list[str]
    wider: list[str]


def peft_form(adapters: Mapping[str, Any], model: ModelConfig) -> PeftForm:
    """The adapters of all layers as peft holds them."""
    form = PeftForm({}, [], [], [])
    for name, place in places(model).items():
        node = _adapter_at(adapters, place.path)
        if node is None:
            continue
        module = name.removesuffix(".weight")
        if ".experts." in name:
            if not any(place.index[1:]):  # the first expert's gate or down stands for all
                _add_experts(form, module.partition(".experts.")[0], adapters, place)
            continue
        a, b = (np.asarray(node[ours][place.index], np.float32) for ours in (A, B))
        _add(form, module, a, b)
        if ".mlp." in name:
            form.parameters.append(name)
        else:
            form.modules.append(module)
    return form


def _adapter_at(adapters: Mapping[str, Any], path: Sequence[str]) -> Any:
    node: Any = adapters if path[0] == "params" else None
    for key in path[1:]:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _add(form: PeftForm, module: str, a: np.ndarray, b: np.ndarray) -> None:
    for matrix, array in (("lora_A", a), ("lora_B", b)):
        form.tensors[f"{PREFIX}{module}.{matrix}.weight"] = np.ascontiguousarray(array)


def _add_experts(form: PeftForm, mlp: str, adapters: Mapping[str, Any], place: Place) -> None:
    """Those of all experts of a layer: A [E r, K] by experts, B [N, r E] by ranks."""
    *module, name = place.path
    node, parameter, at = _adapter_at(adapters, place.path), f"{mlp}.experts.{name}", "experts"
    a, b = (np.asarray(node[ours][place.index[0]], np.float32) for ours in (A, B))
    if name == "gate_up_proj":
        form.wider.append(parameter)
        experts, pair, width, rank = b.shape
        blocks = np.zeros((experts, pair, width, pair, rank), np.float32)
        for i in range(pair):
            blocks[:, i, :, i] = b[:, i]
        a, b = a.reshape(experts, pair * rank, -1), blocks.reshape(experts, pair * width, -1)
        # peft puts a layer around the experts for each parameter, that of down_proj outermost.
        if _adapter_at(adapters, (*module, "down_proj")) is not None:
            at = "experts.base_layer"
    form.parameters.append(parameter)
    by_ranks = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    _add(form, f"{mlp}.{at}", a.reshape(-1, a.shape[-1]), by_ranks)


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
    UserError when `dst` exists.
    """
    form = peft_form(adapters, model)
    wider = dict.fromkeys(form.wider, 2)
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
        "target_modules": form.modules,
        "target_parameters": form.parameters,
        "rank_pattern": {name: times * lora.rank for name, times in wider.items()},
        "alpha_pattern": {name: times * lora.alpha for name, times in wider.items()},
    }
    size = sum(tensor.nbytes for tensor in form.tensors.values())
    with finished_folder(Path(dst), size, overwrite=overwrite, resume=False) as folder:
        save_file(form.tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        carry_along(files_from, folder)
    return Path(dst)
