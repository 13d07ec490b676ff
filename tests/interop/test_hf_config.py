"""config.json: both forms, every published model by fields alone, and nothing sized by a lie."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import (
    Config,
    ModelConfig,
    RopeScaling,
    UserError,
    config_from_dict,
    load_config,
    to_json,
)
from dsv3_jax.interop.hf_config import (
    _COUNTS,
    model_config_from_hf,
    model_config_to_hf,
    scale_format_of_hf,
)
from dsv3_jax.interop.hf_keys import unread_generation_settings
from dsv3_jax.model.rope import rope_tables, softmax_scale

ROOT = Path(__file__).parent.parent.parent

# The hub's files as quoted in public code, without keys that describe no architecture.
V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE = MOONLIGHT | {
    "model_type": "deepseek_v2",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "vocab_size": 102400,
}
PUBLISHED = {
    "deepseek_v3": V3,
    "moonlight_16b": MOONLIGHT,
    "kimi_k2": KIMI_K2,
    "deepseek_v2_lite": V2_LITE,
}


def test_v3_is_our_default_but_for_the_papers_initializer():
    assert model_config_from_hf(V3) == ModelConfig(initializer_range=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_folder_holds_the_published_values(name):
    config = load_config(ROOT / f"configs/{name}.py")
    assert config.problems() == []
    found = dataclasses.replace(config.model, initializer_range=0.02)
    assert found == model_config_from_hf(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_config_reads_back_the_same(name):
    config = model_config_from_hf(PUBLISHED[name])
    text = json.dumps(model_config_to_hf(config, fp8=True, scale_fmt="ue8m0"))
    assert model_config_from_hf(json.loads(text)) == config
    assert scale_format_of_hf(json.loads(text)) == "ue8m0"


def test_written_v3_config_has_the_hubs_values():
    written = model_config_to_hf(ModelConfig(initializer_range=0.02), fp8=True)
    assert {name: written[name] for name in V3 if name not in ("auto_map", "ep_size")} == {
        name: value for name, value in V3.items() if name not in ("auto_map", "ep_size")
    }


def test_transformers_5_form_reads_the_same():
    new = {name: value for name, value in V3.items() if name not in _LEFT_OUT_BY_TRANSFORMERS_5}
    new |= {"dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "rope_interleave": True}
    new["rope_parameters"] = V3["rope_scaling"] | {"rope_theta": 10000, "rope_type": "yarn"}
    assert model_config_from_hf(new) == model_config_from_hf(V3)
    plain = new | {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}
    found = model_config_from_hf(plain)
    assert found.rope_scaling is None and found.rope_theta == 50000.0


_LEFT_OUT_BY_TRANSFORMERS_5 = {
    "scoring_func",
    "topk_method",
    "moe_layer_freq",
    "ep_size",
    "auto_map",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "quantization_config",
}


def test_a_head_dim_that_is_none_of_this_attention_s_is_refused():
    """transformers takes it for the rotary part; published files have one of these."""
    for fits in (None, V3["qk_rope_head_dim"], V3["qk_rope_head_dim"] + V3["qk_nope_head_dim"]):
        assert model_config_from_hf(V3 | {"head_dim": fits}) == model_config_from_hf(V3)
    with pytest.raises(UserError, match="head_dim=24 is none of this attention's: "):
        model_config_from_hf(V3 | {"head_dim": 24})


def test_settings_of_generation_are_told():
    values = {"eos_token_id": 1, "do_sample": True, "top_k": 50, "top_p": 1.0, "temperature": 0.6}
    assert unread_generation_settings(values) == ["temperature=0.6"]
    found = unread_generation_settings({"suppress_tokens": list(range(9999)), "num_beams": {}})
    assert len(found) == 1 and found[0].startswith("suppress_tokens=[0, 1") and len(found[0]) < 99


def test_yarn_without_mscales_leaves_the_softmax_scale_alone():
    scaling = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 128}
    found = model_config_from_hf(V3 | {"rope_scaling": scaling}).rope_scaling
    assert found == RopeScaling("yarn", 8.0, 128, 32.0, 1.0, mscale=1.0, mscale_all_dim=0.0)


def test_one_mscale_alone_is_what_the_published_code_makes_of_it(caplog):
    """modeling_deepseek.py: mscale is 1 and mscale_all_dim 0 where they are not given."""
    base = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 128}
    for scales, expected in (
        ({"mscale": 0.7}, (0.7, 0.0)),
        ({"mscale_all_dim": 0.7}, (1.0, 0.7)),
        ({"mscale": 0.7, "mscale_all_dim": None}, (0.7, 0.0)),
        ({"mscale": 0.7, "mscale_all_dim": 0}, (0.7, 0.0)),
        ({"truncate": True}, (1.0, 0.0)),
    ):
        caplog.clear()
        config = model_config_from_hf(V3 | {"rope_scaling": base | scales})
        assert config.rope_scaling is not None
        told = "transformers computes other logits" in caplog.text
        assert told == (expected != (1.0, 0.0))
        assert (config.rope_scaling.mscale, config.rope_scaling.mscale_all_dim) == expected
        # What DeepseekV3YarnRotaryEmbedding and DeepseekV3Attention compute from them.
        long = 1 + 0.1 * math.log(8) * expected[0]
        all_dim = 1 + 0.1 * math.log(8) * expected[1]
        cosines, _ = rope_tables(np.zeros((1, 1), np.int32), config)
        np.testing.assert_allclose(cosines, long / all_dim, rtol=1e-6)
        assert softmax_scale(config) == pytest.approx(192**-0.5 * all_dim**2)


# What each model type's configuration class has where config.json is silent (transformers 5.24).
SILENT = {
    "deepseek_v3": (8, 4, 2.5, True, "sigmoid", "noaux_tc", 0, 1),
    "kimi_k2": (8, 4, 2.5, True, "sigmoid", "noaux_tc", 0, 1),
    "glm4_moe_lite": (1, 1, 1.8, True, "sigmoid", "noaux_tc", 0, 1),
    "deepseek_v2": (1, 1, 1.0, False, "softmax", "greedy", 1, 2),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_silent_file_has_its_model_types_defaults(kind):
    names = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "scoring_func")
    names += ("topk_method", "bos_token_id", "eos_token_id")
    silent = {name: value for name, value in V3.items() if name not in names}
    found = model_config_from_hf(silent | {"model_type": kind})
    assert tuple(getattr(found, name) for name in names) == SILENT[kind]


def test_null_is_what_the_published_code_makes_of_it():
    for kind, name, value, field, expected in (
        ("deepseek_v3", "n_shared_experts", None, "n_shared_experts", 0),
        ("deepseek_v3", "num_nextn_predict_layers", None, "num_nextn_predict_layers", 0),
        ("deepseek_v3", "num_key_value_heads", None, "num_attention_heads", 128),
        ("deepseek_v3", "attention_bias", None, "num_attention_heads", 128),
        ("deepseek_v3", "torch_dtype", None, "dtype", "bfloat16"),
        ("deepseek_v3", "eos_token_id", None, "eos_token_id", ()),
        ("deepseek_v3", "bos_token_id", None, "bos_token_id", 1),  # eos begins texts, too
        ("deepseek_v2", "n_group", None, "n_group", 1),
        ("deepseek_v2", "topk_group", None, "topk_group", 1),
    ):
        source = V3 if kind == "deepseek_v3" else V2_LITE
        assert getattr(model_config_from_hf(source | {name: value}), field) == expected
    for name in ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "hidden_act"):
        with pytest.raises(UserError, match=f"{name}=None"):
            model_config_from_hf(V3 | {name: None})
    dense = model_config_from_hf(V3 | {"n_routed_experts": None, "num_nextn_predict_layers": 0})
    assert dense.num_moe_layers == 0 and dense.num_dense_layers == 61


def test_several_ids_end_a_text_and_are_written_as_they_were():
    for ids, field in ((1, 1), ([1, 5], (1, 5)), ([1], (1,)), ([], ())):
        config = model_config_from_hf(V3 | {"eos_token_id": ids})
        assert config.eos_token_id == field
        written = json.loads(json.dumps(model_config_to_hf(config)))
        assert written["eos_token_id"] == ids
        saved = json.loads(to_json(Config(model=config)))
        assert config_from_dict(saved).model == config
    assert ModelConfig(eos_token_id=3).eos_token_ids == (3,)


def test_v2_norms_without_its_factor_so_both_are_refused():
    with pytest.raises(UserError, match=r"norm_topk_prob=True with routed_scaling_factor=16"):
        model_config_from_hf(V2_LITE | {"norm_topk_prob": True, "routed_scaling_factor": 16.0})
    assert model_config_from_hf(V2_LITE | {"norm_topk_prob": True}).norm_topk_prob


FEATURES = {
    "sliding_window": 4096,
    "partial_rotary_factor": 0.5,
    "final_logit_softcapping": 30.0,
    "index_topk": 2048,
    "use_qk_norm": True,
    "qk_head_dim": 128,
    "mlp_layer_types": ["sparse"] * 61,
    "layer_types": ["sliding_attention"] * 61,
    "num_local_experts": 128,
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_other_models_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        model_config_from_hf(V3 | {name: FEATURES[name]})


def test_keys_that_nobody_knows_are_told_and_harmless_ones_are_not(caplog):
    harmless = {"_name_or_path": "x", "attention_dropout": 0.1, "pad_token_id": 2, "seq_aux": True}
    harmless |= {"sliding_window": None, "partial_rotary_factor": 1.0, "qk_head_dim": 192}
    harmless |= {"num_local_experts": 256, "new_feature": None, "another": False}
    harmless |= {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58}
    assert model_config_from_hf(V3 | harmless) == model_config_from_hf(V3)
    assert caplog.text == ""
    assert model_config_from_hf(V3 | {"magic_scale": 2.0}) == model_config_from_hf(V3)
    assert "magic_scale: not known here" in caplog.text


def test_glm_counts_its_dense_layers_by_their_kinds():
    glm = {
        n: v for n, v in V3.items() if n not in ("first_k_dense_replace", "n_group", "topk_group")
    }
    glm |= {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 59}
    assert model_config_from_hf(glm).first_k_dense_replace == 2
    del glm["mlp_layer_types"]
    assert model_config_from_hf(glm).first_k_dense_replace == 1


def test_zero_and_null_both_mean_no_query_compression():
    for value in (0, None):
        assert model_config_from_hf(V3 | {"q_lora_rank": value}).q_lora_rank is None


IMPOSSIBLE = {
    "num_hidden_layers": [0, -1, 10**9, 61.5, "61", True, None],
    "n_routed_experts": [0, 10**7, 255],
    "vocab_size": [0, 1 << 40],
    "hidden_size": [1 << 30],
    "q_lora_rank": [-1, 1 << 20],
    "num_nextn_predict_layers": [-1, 1000],
    "qk_rope_head_dim": [63],
    "eos_token_id": [129280, -1, "1"],
    "rms_norm_eps": [0, float("inf"), "1e-6"],
    "model_type": ["llama", None, 3],
    "attention_bias": [True],
    "tie_word_embeddings": [True],
    "hidden_act": ["gelu"],
    "moe_layer_freq": [2],
    "num_key_value_heads": [8],
    "torch_dtype": ["float16"],
    "scoring_func": ["tanh"],
    "topk_method": ["best"],
    "rope_scaling": [
        {"type": "linear", "factor": 2},
        {"type": "yarn"},
        "yarn",
        V3["rope_scaling"] | {"factor": -1},
        V3["rope_scaling"] | {"truncate": False},
    ],
    "quantization_config": [
        {"quant_method": "gptq"},
        V3["quantization_config"] | {"weight_block_size": [64, 64]},
        V3["quantization_config"] | {"fmt": "e5m2"},
        "fp8",
    ],
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_impossible_values_are_refused_by_name(field):
    for value in IMPOSSIBLE[field]:
        with pytest.raises(UserError, match=field):
            model_config_from_hf(V3 | {field: value})


def test_every_size_is_required_and_all_problems_are_said_at_once():
    with pytest.raises(UserError) as error:
        model_config_from_hf({"model_type": "deepseek_v3"})
    for name in (*_COUNTS, "q_lora_rank", "first_k_dense_replace", "rope_theta"):
        assert f"{name} is missing" in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    name = data.draw(st.sampled_from(sorted(V3)))
    value = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.sampled_from(["type", "factor", "fmt"]), st.integers() | st.text())
    )
    try:
        config = model_config_from_hf(V3 | {name: value})
    except UserError:
        return
    assert config.problems() == []
