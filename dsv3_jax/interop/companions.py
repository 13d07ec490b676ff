"""The files beside a run's exported weights: its tokenizer, what generation needs, a model card.

A published folder brings these along. A run has a tokenizer.json at most, and feeds bos before
every text; here that is written down, so that transformers' AutoTokenizer feeds what infer.py does.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config, ModelConfig, UserError
from dsv3_jax.config.files import read_json
from dsv3_jax.data.chat import CHAT_TEMPLATE_FILE as CHAT_TEMPLATE
from dsv3_jax.data.tokens import TOKENIZER_CONFIG
from dsv3_jax.interop.checkpoint import GENERATION

log = logging.getLogger(__name__)

CARD = "README.md"
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES = 128 << 20, 1 << 22
# Post-processors that put special tokens around a text.
_PLACING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of the checkpoint that is exported.

    Fields:
        step: the number of optimizer steps done.
        config: of the run.
        metrics: the newest numbers then (`tokens`; `loss` and `val_loss` in nats a token).
    """

    step: int
    config: Config
    metrics: dict[str, Any] = field(default_factory=dict)


def write_run_files(folder: Path, config: ModelConfig, tokenizer: Path | None) -> None:
    """Writes generation_config.json, and the tokenizer's files where the run has a tokenizer.json.

    A chat template beside that file is carried along.
    """
    ends = config.eos_token_id
    generation = {"bos_token_id": config.bos_token_id}
    generation |= {"eos_token_id": ends if isinstance(ends, int) else list(ends)}
    _write(folder / GENERATION, generation)
    if tokenizer is None:
        return
    spec = read_json(tokenizer, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES)
    added = spec.get("added_tokens") or []
    try:
        names = {token["id"]: token["content"] for token in added}
    except (TypeError, KeyError) as error:
        raise UserError(f"{tokenizer}: added_tokens is no list of tokens") from error
    bos = names.get(config.bos_token_id)
    eos = next((names[i] for i in config.eos_token_ids if i in names), None)
    if bos is None or eos is None:
        log.warning("%s has no token for bos or eos: it is exported unchanged", tokenizer)
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        return
    spec["post_processor"] = _with_bos(spec.get("post_processor"), bos, config.bos_token_id)
    _write(folder / "tokenizer.json", spec)
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    _write(folder / TOKENIZER_CONFIG, told)
    if (tokenizer.parent / CHAT_TEMPLATE).is_file():
        shutil.copyfile(tokenizer.parent / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)


def model_card(
    name: str, config: ModelConfig, parameters: int, dtypes: set[str], facts: RunFacts | None
) -> str:
    """README.md of an export: what the model is, the run's numbers, and how to load it."""
    layers = f"{config.num_hidden_layers} layers, {config.num_dense_layers} of them dense"
    rows = {
        "parameters": f"{parameters:,} stored, as {', '.join(sorted(dtypes))}",
        "architecture": f"{layers}; hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}",
        "experts": f"{config.n_routed_experts} a layer, {config.num_experts_per_tok} a token, "
        f"{config.n_shared_experts} shared; {config.num_nextn_predict_layers} MTP modules",
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {name}", "", "Exported by dsv3_jax; `config.json` has every field.", ""]
    lines += _table(rows)
    if facts is not None:
        lines += ["", "## Training", "", *_table(_training(facts))]
    prompt = _prompt_option(facts)
    on_bytes = "byte" in prompt
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM" + ("" if on_bytes else ", AutoTokenizer"),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        *([] if on_bytes else [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']),
        "```",
        "",
        "```",
        f"python infer.py --checkpoint {name} {prompt}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _training(facts: RunFacts) -> dict[str, str]:
    run, metrics = facts.config, facts.metrics
    rows = {"steps": f"{facts.step:,}"}
    formats = {"tokens": ",", "loss": ".4f", "val_loss": ".4f", "val_bits_per_byte": ".4f"}
    rows |= {
        key: format(metrics[key], form)
        for key, form in formats.items()
        if isinstance(metrics.get(key), int | float)
    }
    rows["batch"] = f"{run.train.batch_size} sequences of {run.train.seq_len} tokens"
    rows["tokenizer"] = Path(run.data.tokenizer).name  # not where it lay
    rows["seed"] = str(run.seed)
    return rows


def _prompt_option(facts: RunFacts | None) -> str:
    on_bytes = facts is not None and facts.config.data.tokenizer == "byte"
    return '--tokenizer byte --prompt "..."' if on_bytes else '--prompt "..."'


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]


def _with_bos(processor: Any, bos: str, bos_id: int) -> Any:
    """The post-processor with bos before every text; one that places tokens stays as it is."""
    if any(f'"{kind}"' in json.dumps(processor) for kind in _PLACING):
        return processor
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            token,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    if not processor:
        return template
    before = processor["processors"] if processor.get("type") == "Sequence" else [processor]
    return {"type": "Sequence", "processors": [*before, template]}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
