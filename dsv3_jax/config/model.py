"""The architecture: ModelConfig, with the fields of the Hugging Face config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dsv3_jax.config.rules import DType, require_positive, round_up

# The largest each count may be: several times what any published model of the family has, and small
# enough that a table of all expected tensors can be made. Configurations come from strangers too.
LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1 << 10,
    "max_position_embeddings": 1 << 30,
    "num_attention_heads": 1 << 12,
    "q_lora_rank": 1 << 16,
    "kv_lora_rank": 1 << 16,
    "qk_nope_head_dim": 1 << 12,
    "qk_rope_head_dim": 1 << 12,
    "v_head_dim": 1 << 12,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "first_k_dense_replace": 1 << 10,
    "n_routed_experts": 1 << 12,
    "n_shared_experts": 1 << 8,
    "num_experts_per_tok": 1 << 10,
    "n_group": 1 << 12,
    "topk_group": 1 << 12,
    "num_nextn_predict_layers": 16,
}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (V3 report, section 4.3); field names as in `rope_scaling`."""

    type: Literal["yarn"] = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; field names and meanings are those of the Hugging Face config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    max_position_embeddings: int = 163840
    bos_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1  # what ends a text; any of several, or none: ()

    # MLA
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: queries are projected straight from the hidden state
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)

    # Feed-forward
    intermediate_size: int = 18432  # of the dense layers
    moe_intermediate_size: int = 2048  # of one expert
    first_k_dense_replace: int = 3  # this many layers at the start are dense
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8

    # Router
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    # MTP
    num_nextn_predict_layers: int = 1

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # V3 report, section 4.2; the published config.json says 0.02
    dtype: DType = "bfloat16"  # of activations and matmuls; parameters are held in f32 to train

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, the first of which fills up what has ended; may be empty."""
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def qk_head_dim(self) -> int:
        """Dims of one head's query and key: the nope part, then the rope part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense feed-forward."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with experts; MTP layers are not counted."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias steers the choice of experts (auxiliary-loss-free balancing)."""
        return self.topk_method == "noaux_tc"

    def problems(self) -> list[str]:
        """Every inconsistency of the architecture, each with the rule and a fix."""
        found: list[str] = []
        require_positive(
            found,
            self,
            [
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
                "n_group",
                "topk_group",
                "rope_theta",
                "rms_norm_eps",
            ],
        )
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            found.append(
                f"q_lora_rank={self.q_lora_rank} must be positive, or None for no query compression"
            )
        for name, most in LIMITS.items():
            if (getattr(self, name) or 0) > most:
                found.append(f"{name}={getattr(self, name)} exceeds {most}")
        if found:
            return found  # the rules below divide by these
        if self.qk_rope_head_dim % 2:
            found.append(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even (RoPE rotates pairs): "
                f"use {self.qk_rope_head_dim + 1}"
            )
        experts, per_tok = self.n_routed_experts, self.num_experts_per_tok
        if per_tok > experts:
            found.append(
                f"num_experts_per_tok={per_tok} exceeds n_routed_experts={experts}: "
                f"use at most {experts}"
            )
        grouped = self.topk_method != "greedy"
        if grouped and experts % self.n_group:
            found.append(
                f"n_routed_experts={experts} must be a multiple of n_group={self.n_group}: "
                f"use n_routed_experts={round_up(experts, self.n_group)}"
            )
        elif grouped:
            group_size = experts // self.n_group
            if self.topk_group > self.n_group:
                found.append(
                    f"topk_group={self.topk_group} exceeds n_group={self.n_group}: "
                    f"use at most {self.n_group}"
                )
            elif per_tok > self.topk_group * group_size:
                found.append(
                    f"num_experts_per_tok={per_tok} exceeds the "
                    f"{self.topk_group * group_size} experts "
                    f"of topk_group={self.topk_group} groups of {group_size}: "
                    f"use topk_group={math.ceil(per_tok / group_size)} or more"
                )
            if self.has_router_bias and self.n_group > 1 and group_size < 2:
                found.append(
                    f"groups are scored by their 2 best experts, but n_group={self.n_group} leaves "
                    f"{group_size} a group: use n_group={max(experts // 2, 1)} or fewer"
                )
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
        ):
            if not all(0 <= token < self.vocab_size for token in ids):
                found.append(
                    f"{name}={getattr(self, name)} is outside vocab_size={self.vocab_size}"
                )
        if self.num_nextn_predict_layers and not self.num_moe_layers:
            found.append(
                "MTP modules are MoE blocks, but first_k_dense_replace="
                f"{self.first_k_dense_replace} makes all {self.num_hidden_layers} layers dense: "
                "use a smaller first_k_dense_replace or num_nextn_predict_layers=0"
            )
        return found
