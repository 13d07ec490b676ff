"""Parameters, FLOPs and cache bytes of a model, counted from its config alone.

Works for every `ModelConfig` (MLA with experts) and for the dense grouped-query models that the
ISCA paper compares with (`DenseConfig`). FLOPs count a multiply-add as two, matmuls only; norms,
rotations, softmax and the embedding look-up are left out, as in the paper's tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import Part, weights


@dataclass(frozen=True)
class DenseConfig:
    """A dense Transformer with grouped-query attention; field names as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


Architecture = ModelConfig | DenseConfig

DEEPSEEK_V3 = ModelConfig()
# DeepSeek-V3 repository, inference/configs/config_236B.json.
DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    first_k_dense_replace=1,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=3,
    routed_scaling_factor=16.0,
    num_nextn_predict_layers=0,
)
# The published config.json of Qwen/Qwen2.5-72B and meta-llama/Llama-3.1-405B.
QWEN_2_5_72B = DenseConfig(152064, 8192, 80, 64, 8, 128, 29568)
LLAMA_3_1_405B = DenseConfig(128256, 16384, 126, 128, 8, 128, 53248)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part; `mtp` holds what the MTP modules add to the main model."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    mtp: int

    @property
    def main(self) -> int:
        """The main model, without the MTP modules."""
        return self.total - self.mtp

    @property
    def total(self) -> int:
        """Everything, with the embedding and head that MTP shares counted once."""
        return sum(vars(self).values())


def attention_parameters(model: Architecture) -> int:
    """Weights of one layer's attention projections, its latent norms included."""
    if isinstance(model, DenseConfig):
        heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
        return model.hidden_size * heads * model.head_dim
    return _of_part(model, "attention")


def expert_parameters(model: ModelConfig) -> int:
    """Weights of one routed expert: gate, up and down."""
    return _of_part(model, "routed_experts") // model.n_routed_experts


def _of_part(model: ModelConfig, part: Part) -> int:
    """Numbers of one layer's weights of a part."""
    return sum(row.size(model) for row in weights(model) if row.part == part)


def parameters(model: Architecture) -> Parameters:
    """Parameter counts of `model` by part; V3's main model has 671,026,419,200.

    A count is a number of weights, MTP's embedding and head, which are shared, not counted again.
    Raises nothing of its own. Source: V3 report, section 4.2; the shapes of
    deepseek-ai/DeepSeek-V3.

    >>> import dsv3_jax as ds
    >>> ds.parameters(ds.ModelConfig()).main
    671026419200
    """
    D, V, L = model.hidden_size, model.vocab_size, model.num_hidden_layers
    if isinstance(model, DenseConfig):
        ffn = 3 * D * model.intermediate_size
        attention = L * attention_parameters(model)
        return Parameters(V * D, V * D, attention, L * ffn, 0, 0, 0, (2 * L + 1) * D, 0)
    counts = dict.fromkeys(get_args(Part), 0)
    for row in weights(model):
        main, mtp = row.count(model)
        counts[row.part] += main * row.size(model)
        counts["mtp"] += mtp * row.size(model)
    return Parameters(**counts)


def activated_parameters(model: Architecture) -> int:
    """Main-model parameters that one token uses, head and embedding row's table included."""
    count = parameters(model)
    if isinstance(model, DenseConfig):
        return count.main
    unused = model.n_routed_experts - model.num_experts_per_tok
    return count.main - model.num_moe_layers * unused * expert_parameters(model)


def matmul_parameters(model: Architecture, mtp: bool = False) -> int:
    """Weights that one token is multiplied with: what 2N in "2N FLOPs a token" means.

    Leaves the embedding (a look-up), norms and router bias out. `mtp` adds the MTP modules, each
    with its pass through the shared head.
    """
    if isinstance(model, DenseConfig):
        D, V, L = model.hidden_size, model.vocab_size, model.num_hidden_layers
        return L * (attention_parameters(model) + 3 * D * model.intermediate_size) + V * D
    found = 0
    for row in weights(model, copies=True):  # MTP modules have the head as a copy
        if row.is_matrix and row.part != "embedding":
            of_main, of_mtp = row.count(model)
            size = row.size(model)
            if row.of_expert:
                size = size // model.n_routed_experts * model.num_experts_per_tok
            found += (of_main + of_mtp * mtp) * size
    return found


def attention_core_flops(model: Architecture, length: float, causal: bool = True) -> float:
    """Forward FLOPs per token and layer of scores and weighted sum over a sequence of `length`.

    Causal counts the lower triangle only (FlashAttention's convention), else the whole square
    (Megatron's).
    """
    if isinstance(model, DenseConfig):
        dims = 2 * model.head_dim
    else:
        dims = model.qk_head_dim + model.v_head_dim
    return 2 * model.num_attention_heads * dims * length * (0.5 if causal else 1.0)


def training_flops_per_token(
    model: Architecture,
    seq_len: int = 4096,
    causal: bool = True,
    mtp: bool = False,
    frozen: bool = False,
) -> float:
    """FLOPs of forward and backward per token: 6N, and three times the attention core.

    4N where the weights are frozen and have no gradients; adapters beside them do not count.
    V3 at 4096: 250.45e9 causal, 281.15e9 not (ISCA paper, table 2: 250). A multiply-add is two
    FLOPs; `mtp` adds the MTP modules. Raises nothing of its own. Source: ISCA paper, table 2.

    >>> import dsv3_jax as ds
    >>> round(ds.training_flops_per_token(ds.ModelConfig()) / 1e9, 2)
    250.45
    """
    layers = model.num_hidden_layers
    if mtp and isinstance(model, ModelConfig):
        layers += model.num_nextn_predict_layers
    core = layers * attention_core_flops(model, seq_len, causal)
    return (4.0 if frozen else 6.0) * matmul_parameters(model, mtp) + 3 * core


AttentionKind = Literal["mla", "mha", "gqa", "mqa"]


def kv_values_per_token(
    model: Architecture, kind: AttentionKind | None = None, kv_heads: int = 8
) -> int:
    """Numbers cached per token and layer.

    `kind` None is the model's own form: the latent and the shared rotated key for MLA, a key and a
    value per kv head else. Otherwise what the same model would cache as MHA, GQA (with `kv_heads`)
    or MQA, a head as wide as its value.
    """
    if kind is None:
        kind = "mla" if isinstance(model, ModelConfig) else "gqa"
        kv_heads = getattr(model, "num_key_value_heads", kv_heads)
    if kind == "mla":
        if isinstance(model, DenseConfig):
            raise ValueError("a dense comparator has no MLA latent: kind='mla' needs a ModelConfig")
        return model.kv_lora_rank + model.qk_rope_head_dim
    width = model.head_dim if isinstance(model, DenseConfig) else model.v_head_dim
    heads = {"mha": model.num_attention_heads, "gqa": kv_heads, "mqa": 1}[kind]
    return 2 * heads * width


def kv_bytes_per_token(
    model: Architecture,
    bytes_per_value: float = 2,
    kind: AttentionKind | None = None,
    kv_heads: int = 8,
) -> float:
    """Cache bytes per token over all main layers; V3 in BF16: 70,272 (ISCA paper, table 1).

    `kind` computes what MHA, GQA of `kv_heads` or MQA with the model's heads would need instead.
    Raises ValueError for the kind "mla" of a model without a latent. Source: ISCA paper, table 1.

    >>> import dsv3_jax as ds
    >>> ds.kv_bytes_per_token(ds.ModelConfig())
    70272
    """
    return model.num_hidden_layers * kv_values_per_token(model, kind, kv_heads) * bytes_per_value


def expected_groups_hit(experts: int, groups: int, chosen: int, limit: int | None = None) -> float:
    """Mean number of distinct groups (nodes, ranks) that a token's `chosen` experts lie in.

    Experts are drawn uniformly without replacement, from `limit` of the groups when it is given:
    G(1 - C(E - E/G, k) / C(E, k)) (DeepEP's analytical model). V3 on 8 nodes: 5.29, limited to 4
    nodes 3.63.
    """
    if experts % groups:
        raise ValueError(f"{experts=} must be a multiple of {groups=}")
    size, used = experts // groups, min(limit or groups, groups)
    pool = used * size
    if chosen > pool:
        raise ValueError(f"{chosen=} exceeds the {pool} experts of {used} groups")
    return used * (1 - math.comb(pool - size, chosen) / math.comb(pool, chosen))
