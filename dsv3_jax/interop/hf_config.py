"""config.json of Hugging Face checkpoints to `ModelConfig` and back, by fields alone.

Read are the hub's own form (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5
(`rope_parameters`, `dtype`); written is the hub's, which old and new runtimes load. A config.json
is data from a stranger: every number is bounded before anything is sized by it, what the model
cannot compute is refused by name, and `auto_map`, which names code, is not looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dsv3_jax.config import LIMITS, ModelConfig, RopeScaling, UserError
from dsv3_jax.config.files import shown
from dsv3_jax.interop.hf_keys import DEFAULTS, features_switched_on, unknown

log = logging.getLogger(__name__)

# Counts that a file must state, and those that may be 0; LIMITS says how large each may be.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
)
_COUNTS_FROM_ZERO = ("first_k_dense_replace", "n_shared_experts")

# Options that this model does not have, with the only value that means the same computation.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
FP8_BLOCK = 128
EosTokenId = int | tuple[int, ...]
# Other names of the same number: attribute_map of transformers 5.
_ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}

# Written as they are, besides the bounded counts.
_COPIED = (
    "q_lora_rank",
    "n_group",
    "topk_group",
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "rms_norm_eps",
    "routed_scaling_factor",
    "initializer_range",
    "scoring_func",
    "topk_method",
    "norm_topk_prob",
)
_ROPE_FIELDS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
_READ = frozenset(
    (*_COUNTS, *_COUNTS_FROM_ZERO, *_FIXED, *_COPIED, *_ALIASES)
    + ("num_key_value_heads", "qk_head_dim", "head_dim", "mlp_layer_types", "layer_types")
    + ("rope_theta", "rope_scaling", "rope_parameters", "quantization_config")
)


def model_config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The architecture that a parsed config.json describes.

    Raises UserError with every problem: a field that is missing, of the wrong type or out of
    bounds, an unknown `model_type`, a feature the model lacks, or fields that do not fit together.
    """
    values = _plain(values)
    read = _Reader(values)
    kind = read.choice("model_type", tuple(DEFAULTS), None)
    defaults = DEFAULTS.get(kind, DEFAULTS["deepseek_v3"])
    read.found += [f"{told} is not supported" for told in features_switched_on(values)]
    fields: dict[str, Any] = {name: read.integer(name, 1, LIMITS[name]) for name in _COUNTS}
    for name in _COUNTS_FROM_ZERO:
        fields[name] = read.integer(name, 0, LIMITS[name], defaults.get(name))
    # 0 is how some runtimes spell "no query compression" (interop with llama.cpp needs it).
    fields["q_lora_rank"] = read.integer("q_lora_rank", 0, LIMITS["q_lora_rank"], null=True) or None
    mtp = "num_nextn_predict_layers"
    fields[mtp] = read.integer(mtp, 0, LIMITS[mtp], defaults[mtp])
    fields["eos_token_id"] = read.tokens("eos_token_id", defaults["eos_token_id"])
    # Where no token begins a text, the end of the one before does, as in our tokenizers.
    begins = _ids(read.tokens("bos_token_id", defaults["bos_token_id"]))
    fields["bos_token_id"] = (*begins, *_ids(fields["eos_token_id"]), 0)[0]
    fields["rms_norm_eps"] = read.number("rms_norm_eps")
    fields["routed_scaling_factor"] = read.number(
        "routed_scaling_factor", defaults["routed_scaling_factor"]
    )
    fields["initializer_range"] = read.number("initializer_range", 0.02)
    scoring, topk = defaults["scoring_func"], defaults["topk_method"]
    fields["scoring_func"] = read.choice("scoring_func", ("sigmoid", "softmax"), scoring)
    methods = ("noaux_tc", "group_limited_greedy", "greedy")
    fields["topk_method"] = read.choice("topk_method", methods, topk)
    for name in ("n_group", "topk_group"):
        # The published greedy router looks at neither, so there either may be null.
        unused = fields["topk_method"] == "greedy" and values.get(name, defaults[name]) is None
        fields[name] = 1 if unused else read.integer(name, 1, 1 << 12, defaults[name])
    fields["norm_topk_prob"] = read.choice(
        "norm_topk_prob", (True, False), defaults["norm_topk_prob"]
    )
    if kind == "deepseek_v2" and fields["norm_topk_prob"] and fields["routed_scaling_factor"] != 1:
        read.found.append(
            f"norm_topk_prob=True with routed_scaling_factor={fields['routed_scaling_factor']}: "
            "DeepSeek-V2's code leaves the factor out then, which this model does not"
        )
    dtype = "dtype" if "dtype" in values else "torch_dtype"
    fields["dtype"] = read.choice(dtype, ("bfloat16", "float32", None), "bfloat16") or "bfloat16"
    fields["rope_theta"], fields["rope_scaling"] = _rope(values, read)
    for name, only in _FIXED.items():
        # The published code asks whether a switch is set: null is unset.
        read.choice(name, (only, None) if only is False else (only,), only)
    _check_derived(values, fields, read)
    _check_quantization(values.get("quantization_config"), read)
    read.raise_if_found()
    config = ModelConfig(**fields)
    if found := config.problems():
        raise UserError("config.json does not fit together:\n  - " + "\n  - ".join(found))
    if names := unknown(values, _READ):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        log.warning(
            "config.json: %s%s: not known here and not read",
            ", ".join(name[:60] for name in names[:8]),
            more,
        )
    return config


def eos_of_generation_config(values: dict[str, Any], vocab_size: int) -> EosTokenId | None:
    """eos_token_id of a parsed generation_config.json, () for null; None where it has no such key.

    Raises UserError for anything but ids of the vocabulary.
    """
    if "eos_token_id" not in values:
        return None
    read = _Reader(values)
    ids = read.tokens("eos_token_id", None)
    if not read.found and any(token >= vocab_size for token in _ids(ids)):
        read.found.append(f"eos_token_id={ids} is outside vocab_size={vocab_size}")
    if read.found:
        raise UserError("generation_config.json cannot be used:\n  - " + "\n  - ".join(read.found))
    return ids


def scale_format_of_hf(values: dict[str, Any]) -> str | None:
    """`scale_fmt` of the quantization_config: "ue8m0" for DeepSeek-V3.1, otherwise None."""
    return (values.get("quantization_config") or {}).get("scale_fmt")


def model_config_to_hf(
    config: ModelConfig,
    dtype: str = "bfloat16",
    fp8: bool = False,
    scale_fmt: str | None = None,
    not_converted: Sequence[str] = (),
) -> dict[str, Any]:
    """config.json in the hub's form for weights stored as `dtype`, or as FP8 blocks if `fp8`.

    `not_converted` are modules that are not FP8 though the others are (modules_to_not_convert).
    Keys that a runtime would otherwise guess are all there: llama.cpp takes softmax gating without
    `scoring_func`. A softmax router without a bias is DeepSeek-V2's architecture, otherwise V3's.
    """
    is_v2 = config.scoring_func == "softmax" and not config.has_router_bias
    scaling = config.rope_scaling
    values: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM" if is_v2 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v2" if is_v2 else "deepseek_v3",
        **{name: only for name, only in _FIXED.items() if name != "mlp_bias"},
        "attention_dropout": 0.0,
        "num_key_value_heads": config.num_attention_heads,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"type": "yarn"} | {name: getattr(scaling, name) for name in _ROPE_FIELDS},
        "torch_dtype": dtype,
        "use_cache": True,
    }
    for name in (*_COUNTS, *_COUNTS_FROM_ZERO, *_COPIED):
        values[name] = getattr(config, name)
    if fp8:
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        } | ({"scale_fmt": scale_fmt} if scale_fmt else {})
        if not_converted:
            values["quantization_config"]["modules_to_not_convert"] = list(not_converted)
    return dict(sorted(values.items()))


class _Reader:
    """Typed, bounded look-ups that collect problems instead of raising at the first."""

    def __init__(self, values: dict[str, Any]):
        self.values, self.found = values, []

    def integer(
        self, name: str, low: int, high: int, default: int | None = None, null: bool = False
    ) -> Any:
        value = self.values.get(name, default)
        if value is None and (null and name in self.values):
            return None
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and low <= value <= high:
            return value
        return self._missing_or(name, f"must be an integer in [{low}, {high}]", low)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if type(value) in (int, float) and 0 < value < 1e12:  # NaN is not
            return float(value)
        return self._missing_or(name, "must be a positive number", 1.0)

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.values.get(name, default)
        if any(type(value) is type(a) and value == a for a in allowed):
            return value
        shown = " or ".join(str(a) for a in allowed)
        return self._missing_or(name, f"must be {shown}", allowed[0])

    def tokens(self, name: str, default: int | None) -> EosTokenId:
        """One id, a tuple of the ids of a list, or () for null."""
        value = self.values.get(name, default)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) <= 1 << 10 and all(type(i) is int and 0 <= i < 1 << 22 for i in ids):
            return tuple(ids) if isinstance(value, list) else value
        return self._missing_or(name, "must be a token id, a list of them or null", 0)

    def raise_if_found(self) -> None:
        if self.found:
            raise UserError("config.json cannot be used:\n  - " + "\n  - ".join(self.found))

    def _missing_or(self, name: str, rule: str, stand_in: Any) -> Any:
        value = shown(self.values[name]) if name in self.values else None
        self.found.append(f"{name} is missing" if value is None else f"{name}={value} {rule}")
        return stand_in


def _rope(values: dict[str, Any], read: _Reader) -> tuple[float, RopeScaling | None]:
    """(rope_theta, YaRN or None) of either form; defaults are those of the published code."""
    form = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    scaling = values.get(form)
    if scaling is None:
        return read.number("rope_theta"), None
    if not isinstance(scaling, dict):
        read.found.append(f"{form} must be an object or null")
        return 1.0, None
    inner = _Reader(scaling)
    theta = (inner if "rope_theta" in scaling else read).number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        inner.found.append(f"type={shown(kind)} must be yarn")
    known = {"type", "rope_type", "rope_theta", *_ROPE_FIELDS}
    extra = sorted(name for name in scaling if name not in known and scaling[name] is not None)
    off = {"truncate": True, "partial_rotary_factor": 1}  # the values that mean no difference
    inner.found += [
        f"{shown(n)[1:-1]}={shown(scaling[n])} is not supported"
        for n in extra
        if scaling[n] != off.get(n)
    ]
    # As in the published code: mscale is 1 where it is not given, for cosines and sines alone;
    # without mscale_all_dim (or with 0 or null) the softmax scale is left alone.
    all_dim = 0.0 if not scaling.get("mscale_all_dim") else inner.number("mscale_all_dim")
    both = [bool(scaling.get(name)) for name in ("mscale", "mscale_all_dim")]
    if kind == "yarn" and any(both) and not all(both):
        log.warning(
            "%s has one of mscale and mscale_all_dim: as in the publisher's code the other is %s; "
            "transformers computes other logits",
            *(form, "0" if both[0] else "1"),
        )
    made = RopeScaling(
        factor=inner.number("factor"),
        original_max_position_embeddings=inner.integer(
            "original_max_position_embeddings", 1, 1 << 30
        ),
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        mscale=inner.number("mscale", 1.0),
        mscale_all_dim=all_dim,
    )
    read.found += [f"{form}.{problem}" for problem in inner.found]
    return theta, made


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values under their own keys: aliases of transformers 5 and layer types are resolved.

    What publishers write as null for a part that is not there, the published code asks for `is not
    None`: no shared experts, no MTP modules, and no routed experts, which makes all layers dense.
    """
    values = dict(values)
    for alias, name in _ALIASES.items():
        if alias in values:
            values.setdefault(name, values[alias])
    kinds = values.get("mlp_layer_types")
    if isinstance(kinds, list) and "first_k_dense_replace" not in values:
        values["first_k_dense_replace"] = kinds.count("dense")
    for name in ("n_shared_experts", "num_nextn_predict_layers"):
        if name in values and values[name] is None:
            values[name] = 0
    if "n_routed_experts" in values and values["n_routed_experts"] is None:
        values |= {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
        values |= {"topk_method": "greedy", "n_shared_experts": 0}
        values["first_k_dense_replace"] = values.get("num_hidden_layers")
        if not values.get("moe_intermediate_size"):
            values["moe_intermediate_size"] = values.get("intermediate_size")
    return values


def _check_derived(values: dict[str, Any], fields: dict[str, Any], read: _Reader) -> None:
    """Keys that repeat what others say must agree with them."""
    for alias, name in _ALIASES.items():
        if values.get(alias) is not None and values[alias] != values.get(name):
            ours, theirs = shown(values[alias]), shown(values.get(name))
            read.found.append(f"{alias}={ours} must equal {name}={theirs}")
    derived = {
        "num_key_value_heads": fields["num_attention_heads"],
        "qk_head_dim": fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
    }
    for name, value in derived.items():
        if values.get(name) is not None and values[name] != value:
            what = (
                "num_attention_heads" if name == "num_key_value_heads" else "the sum of its parts"
            )
            read.found.append(f"{name}={shown(values[name])} must equal {what}, {value}")
    parts = [fields[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v")]
    heads = [*parts, parts[0] + parts[1], fields["hidden_size"] // fields["num_attention_heads"]]
    if values.get("head_dim") is not None and values["head_dim"] not in heads:
        read.found.append(
            f"head_dim={shown(values['head_dim'])} is none of this attention's: "
            + ", ".join(map(str, sorted(set(heads))))
        )
    layers, dense = fields["num_hidden_layers"], fields["first_k_dense_replace"]
    expected = {
        "mlp_layer_types": ["dense"] * min(dense, layers) + ["sparse"] * max(layers - dense, 0),
        "layer_types": ["full_attention"] * layers,
    }
    for name, kinds in expected.items():
        if values.get(name) is not None and values[name] != kinds:
            read.found.append(
                f"{name} must be {layers} layers of {kinds[0]!r} to {kinds[-1]!r}, of which "
                f"first_k_dense_replace={dense} are dense"
                if name == "mlp_layer_types"
                else f"{name} must say 'full_attention' {layers} times"
            )


def _ids(tokens: EosTokenId) -> tuple[int, ...]:
    return (tokens,) if isinstance(tokens, int) else tokens


def _check_quantization(quantization: Any, read: _Reader) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        read.found.append("quantization_config must be an object or null")
        return
    expected = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3", None),
        "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
        "scale_fmt": ("ue8m0", None),
        "activation_scheme": ("dynamic", None),
    }
    for name, allowed in expected.items():
        if (value := quantization.get(name)) not in allowed:
            read.found.append(f"quantization_config.{name}={shown(value)} must be {allowed[0]!r}")
