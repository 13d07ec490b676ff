"""What the keys of config.json mean here, as tables: defaults of each model type, and the rest.

A key that a file leaves out has the value of its model type's own configuration class; one that
this package does not read is either known to change nothing that is computed, or known to change
it, or unknown and then named.
"""

from __future__ import annotations

from typing import Any

from dsv3_jax.config.files import shown

# What the modelling code of a type takes where its file is silent: transformers 5.24, of each type
# configuration_*.py, and for what it fixes in code (scoring_func, topk_method) the router there.
# Kimi-K2's own configuration_deepseek.py has DeepSeek-V3's numbers.
_V3_DEFAULTS = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_V2_DEFAULTS = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GLM_DEFAULTS = _V3_DEFAULTS | {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3_DEFAULTS,
    "kimi_k2": _V3_DEFAULTS,
    "deepseek_v2": _V2_DEFAULTS,
    "glm4_moe_lite": _GLM_DEFAULTS,  # GLM-4.7-Flash: V3's network under another name
}

# Features of other models, each with the values that switch it off: any other is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "scale_emb": (None, 1, 1.0),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "swiglu_limit": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "qk_norm": (None, False),
    "index_topk": (None,),
    "index_n_heads": (None,),
    "index_head_dim": (None,),
    "num_experts_per_token_list": (None,),
    "zero_expert_num": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "compression_config": (None,),
    "text_config": (None,),
}

# Change nothing that is computed from token ids at inference: names and versions, dropout and
# auxiliary losses of training, caches, and what transformers keeps for generation.
# fmt: off
HARMLESS = frozenset([
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "attn_implementation", "_experts_implementation",
    "_commit_hash", "architectures", "auto_map", "model_name", "model_type", "model_version",
    "transformers_version", "license", "tokenizer_class", "torchscript", "use_bfloat16",
    "torch_dtype", "dtype", "use_cache", "cache_implementation", "cache_position", "return_dict",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_router_logits",
    "output_scores", "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout",
    "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout",
    "aux_loss_alpha", "router_aux_loss_coef", "router_z_loss_coef", "seq_aux",
    "moe_aux_loss_coeff", "ep_size", "tp_size", "pretraining_tp", "initializer_range",
    "use_flash_attn", "gradient_checkpointing", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "pruned_heads",
    "chunk_size_feed_forward", "tf_legacy_loss", "prefix", "pad_token_id", "sep_token_id",
    "unk_token_id", "mask_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "remove_invalid_values", "is_decoder",
    "cross_attention_hidden_size", "tie_encoder_decoder", "max_window_layers",
    "model_max_length", "max_seq_len", "unsloth_fixed", "unsloth_version",
])
# fmt: on


# Of generation_config.json: what changes the text, with the values that change nothing. A caller
# says these; only the ids that end a text are read.
_OF_GENERATION: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, 50),  # 50 is transformers' own default
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
}


def unread_generation_settings(values: dict[str, Any]) -> list[str]:
    """ "key=value" for every setting of a generation_config.json that would change the text."""
    return [
        f"{name}={shown(values[name])}"
        for name, off in _OF_GENERATION.items()
        if (value := values.get(name)) not in _ABSENT and value not in off
    ]


_ABSENT = (None, False, "", [], {})


def features_switched_on(values: dict[str, Any]) -> list[str]:
    """ "key=value" for every key of NEUTRAL whose value is not one that switches it off."""
    return [
        f"{name}={str(values[name])[:60]}"
        for name, off in NEUTRAL.items()
        if name in values
        and not any(type(values[name]) is type(v) and values[name] == v for v in off)
    ]


def unknown(values: dict[str, Any], read: frozenset[str]) -> list[str]:
    """Keys neither read nor in a table here, but for those that say "not there" (null, false, ...).

    `read` are the keys that the caller reads.
    """
    known = read | HARMLESS | NEUTRAL.keys()
    return sorted(name for name, v in values.items() if name not in known and v not in _ABSENT)
