"""Tiny Hugging Face checkpoints, made name by name from the published layout, not from NAME_MAP."""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.safetensors import save_file

# Odd on purpose: no dim is another's multiple by accident, kv_a has a partial 128-block, and
# heads (24 + 8 = 32 rows) lie across blocks.
TINY = ModelConfig(
    vocab_size=67,
    hidden_size=160,
    num_hidden_layers=3,
    max_position_embeddings=512,
    num_attention_heads=5,
    q_lora_rank=48,
    kv_lora_rank=136,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=20,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64),
    intermediate_size=144,
    moe_intermediate_size=40,
    first_k_dense_replace=1,
    n_routed_experts=6,
    n_shared_experts=2,
    num_experts_per_tok=2,
    n_group=3,
    topk_group=2,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
    dtype="float32",
)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def hf_tensors(config: ModelConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of every published name; dtype is "f32", "bf16" or "fp8"."""
    rng = np.random.default_rng(seed)
    c = config
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, fp8: bool = False) -> None:
        if fp8 and dtype == "fp8":
            tensors[name] = np.clip(rng.normal(size=shape) * 100, -448, 448).astype(FP8)
            blocks = tuple(math.ceil(n / 128) for n in shape)
            scales = rng.uniform(1e-4, 9e-4, blocks).astype(np.float32)
            tensors[name + "_scale_inv"] = scales
        else:
            spread = 0.1 if len(shape) > 1 else 0.3
            values = rng.normal(size=shape, scale=spread) + (len(shape) == 1)
            tensors[name] = values.astype(np.float32 if dtype == "f32" else BF16)

    def mlp(prefix: str, width: int) -> None:
        add(prefix + "gate_proj.weight", width, c.hidden_size, fp8=True)
        add(prefix + "up_proj.weight", width, c.hidden_size, fp8=True)
        add(prefix + "down_proj.weight", c.hidden_size, width, fp8=True)

    def layer(number: int, dense: bool) -> None:
        at = f"model.layers.{number}."
        query, nope, rope = c.qk_head_dim, c.qk_nope_head_dim, c.qk_rope_head_dim
        heads, dim, latent = c.num_attention_heads, c.hidden_size, c.kv_lora_rank
        add(at + "input_layernorm.weight", dim)
        add(at + "post_attention_layernorm.weight", dim)
        if c.q_lora_rank is None:
            add(at + "self_attn.q_proj.weight", heads * query, dim, fp8=True)
        else:
            add(at + "self_attn.q_a_proj.weight", c.q_lora_rank, dim, fp8=True)
            add(at + "self_attn.q_a_layernorm.weight", c.q_lora_rank)
            add(at + "self_attn.q_b_proj.weight", heads * query, c.q_lora_rank, fp8=True)
        add(at + "self_attn.kv_a_proj_with_mqa.weight", latent + rope, dim, fp8=True)
        add(at + "self_attn.kv_a_layernorm.weight", latent)
        add(at + "self_attn.kv_b_proj.weight", heads * (nope + c.v_head_dim), latent, fp8=True)
        add(at + "self_attn.o_proj.weight", dim, heads * c.v_head_dim, fp8=True)
        if dense:
            mlp(at + "mlp.", c.intermediate_size)
            return
        add(at + "mlp.gate.weight", c.n_routed_experts, dim)
        if c.topk_method == "noaux_tc":
            bias = rng.normal(size=c.n_routed_experts, scale=0.1).astype(np.float32)
            tensors[at + "mlp.gate.e_score_correction_bias"] = bias
        for expert in range(c.n_routed_experts):
            mlp(f"{at}mlp.experts.{expert}.", c.moe_intermediate_size)
        if c.n_shared_experts:
            mlp(at + "mlp.shared_experts.", c.n_shared_experts * c.moe_intermediate_size)

    add("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    for number in range(c.num_hidden_layers):
        layer(number, dense=number < c.first_k_dense_replace)
    add("model.norm.weight", c.hidden_size)
    add("lm_head.weight", c.vocab_size, c.hidden_size)
    for depth in range(c.num_nextn_predict_layers):
        number = c.num_hidden_layers + depth
        layer(number, dense=False)
        at = f"model.layers.{number}."
        add(at + "enorm.weight", c.hidden_size)
        add(at + "hnorm.weight", c.hidden_size)
        add(at + "eh_proj.weight", c.hidden_size, 2 * c.hidden_size)
        add(at + "shared_head.norm.weight", c.hidden_size)
        tensors[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[at + "shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def write_hf(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    *,
    shards: int = 3,
    scale_fmt: str | None = None,
) -> Path:
    """A Hugging Face folder of these tensors, in `shards` files of every n-th tensor."""
    folder.mkdir(parents=True)
    fp8 = any(t.dtype == FP8 for t in tensors.values())
    dtype = "float32" if tensors["lm_head.weight"].dtype == np.float32 else "bfloat16"
    values = model_config_to_hf(config, dtype, fp8, scale_fmt)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text('{"model": "a stand-in"}')
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def make_hf(tmp_path):
    """make_hf(dtype, name=..., shards=..., **fields) -> (folder, config, tensors)."""

    def make(dtype: str, name: str = "hf", shards: int = 3, scale_fmt=None, **fields):
        config = dataclasses.replace(TINY, **fields)
        tensors = hf_tensors(config, dtype)
        folder = write_hf(tmp_path / name, config, tensors, shards=shards, scale_fmt=scale_fmt)
        return folder, config, tensors

    return make
