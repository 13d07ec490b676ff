"""Bytes of a training step's activations on a device: kept by layers, worked on, and logits.

Constants that no config determines are those of compiled programs (docs/scale.md).
"""

from __future__ import annotations

import math

from dsv3_jax.config import Config, ModelConfig

BYTES = {"bfloat16": 2, "float32": 4}
TILE = 128  # rows of an expert's group are filled up to a multiple of it
WIDE = 8  # times as many outputs as inputs, and a product is wide (model/remat.py)
# What the backward pass of one layer holds at once, over what its products read, in BF16: its
# inputs, rows on their way to experts and back, and gradients of both, as XLA's buffer assignment
# has them for V3 (1.1 MB a token).
AT_ONCE = 2.47
# Logits that the head has at a time (training/cross_entropy.py), and bytes of each: BF16, whose
# place the gradient takes.
LOGITS_AT_ONCE, LOGIT_BYTES = 1 << 30, 2
MASTER = 4  # bytes of a weight as it is trained, and of its gradient
LANES = 128  # numbers that a row of a TPU's registers has: a last dim is filled up to a multiple


def uses_fp8(config: Config) -> bool:
    """Whether the matmuls of this run are FP8; every preset that is, is named so."""
    return config.quant.preset.startswith("fp8")


def read_by_products(model: ModelConfig, moe: bool, tensor: int = 1) -> float:
    """Bytes a token of what the products, norms and SwiGLU of a layer read, in BF16."""
    D, N, K = model.hidden_size, model.num_attention_heads, model.num_experts_per_tok
    Q, C, R = model.q_lora_rank or 0, model.kv_lora_rank, model.qk_rope_head_dim
    H, U = model.qk_nope_head_dim, model.v_head_dim
    attention = N / tensor * (2 * (2 * (H + R) + U) + 2 * U + 4)  # q, k, v; o; statistics
    wide, rows = model.intermediate_size / tensor, 2 * D
    if moe:
        routed = K + model.n_shared_experts
        wide = routed * model.moe_intermediate_size / tensor
        rows = 2 * routed * D + 4 * model.n_routed_experts
    latents = 2 * (Q + C + R) + 2 * (D + Q + C)
    return 2 * 2 * D + attention + latents + rows + 2 * 3 * wide


def working_bytes(config: Config, platform: str | None = None) -> float:
    """A token's, while the backward pass works on a layer; of the kind of layer that takes most."""
    model = config.model
    kinds = [False] * (model.num_dense_layers > 0) + [True] * (model.num_moe_layers > 0)
    return max(working_bytes_of(config, moe, platform) for moe in kinds)


def working_bytes_of(
    config: Config, moe: bool, platform: str | None = None, in_halves: bool | None = None
) -> float:
    """A token's, while the backward pass works on a dense layer, or a MoE layer.

    in_halves: whether it goes through a MoE layer in opposite phases, as MTP's never does; None: as
    the config has it for the others.
    """
    read = read_by_products(config.model, moe, config.mesh.tensor)
    at_once = AT_ONCE * BYTES[config.model.dtype] / 2 * read
    if not moe or not is_tpu(platform):
        return at_once
    in_halves = config.expert_parallel.overlap if in_halves is None else in_halves
    return max(at_once, _in_sums_over_choices(config, platform, in_halves))


def _in_sums_over_choices(config: Config, platform: str | None, in_halves: bool) -> float:
    """A token's, while a TPU sums over K choices, or makes the gradients of their gate weights.

    XLA for TPUs gathers, for all K choices of all rows that arrived, the row of its expert before
    it multiplies the first, in f32 (`sum_rows`); TPU7x's sparse cores gather them in one order, and
    they lie there in another besides. Of halves it has those of one. Of a whole it has those of
    the first round beside those of the loop of further rounds, where both are there. The rows of
    experts, their gradients and what their products returned lie beside that, the bytes
    that came and go, and attention's operands.
    """
    model, tensor, expert = config.model, config.mesh.tensor, config.expert_parallel
    D, F, U = model.hidden_size, model.moe_intermediate_size / tensor, model.v_head_dim
    exchanged = config.mesh.node * config.mesh.local > 1
    twice = exchanged and expert.overflow == "rounds" and not in_halves
    copies = (2 if twice else 1) * (2 if platform == "tpu-7x" else 1)
    of_choices = copies * 2 * model.num_experts_per_tok * D + MASTER * D
    of_rows = 2 * 2 * D + 2 * 2 * F + 2 * D
    qk = math.ceil(model.qk_head_dim / LANES) * LANES
    attention = model.num_attention_heads / tensor * (2 * 2 * qk + 2 * 2 * U + MASTER * LANES)
    return _arrived(config) * (of_choices / (2 if in_halves else 1) + of_rows) + attention


def _arrived(config: Config) -> float:
    """Rows that arrive at a device for each of its tokens: one for each device of its experts."""
    devices = config.mesh.node * config.mesh.local
    if devices == 1:
        return 1.0
    spread = min(config.model.num_experts_per_tok, devices)
    return config.expert_parallel.capacity_factor * spread


def layer_bytes(config: Config, moe: bool) -> float:
    """Bytes that a layer keeps of a token from its forward to its backward."""
    return BYTES[config.model.dtype] / 2 * _kept_in_bf16(config, moe)


def _kept_in_bf16(config: Config, moe: bool) -> float:
    """What a layer of a BF16 model keeps of a token.

    By `train.remat` (model/remat.py), as JAX's traces for GPUs have it: "full" keeps the layer's
    input; "dots" with it what plain products return, which of ours only BF16's kv_b_proj is; "v3"
    attention's result and what products return that are not wide, those of experts among them.
    "none" keeps all that gradients read: in BF16 norms' inputs in f32, twice, and six arrays of
    SwiGLU; in FP8 what is multiplied as E4M3, and o_proj's input as E5M6 besides.
    """
    model, tensor, fp8 = config.model, config.mesh.tensor, uses_fp8(config)
    D, N = model.hidden_size, model.num_attention_heads / tensor
    Q, C, R = model.q_lora_rank or 0, model.kv_lora_rank, model.qk_rope_head_dim
    q = N * (model.qk_nope_head_dim + R)
    kv, o = N * (model.qk_nope_head_dim + model.v_head_dim), N * model.v_head_dim
    ffn, F = ffn_width(config, moe), model.moe_intermediate_size / tensor
    rows = rows_of_token(config) if moe else 0.0
    remat = config.train.remat
    if remat == "full":
        return 2 * D
    if remat == "dots":
        return 2 * D + (0 if fp8 else 2 * kv)
    if remat == "v3":
        narrow = 2 * kv * (kv * tensor <= WIDE * C) + 2 * q * (q * tensor <= WIDE * (Q or D))
        narrow += 2 * (D + Q + C + R) + 4 * ffn * (2 * ffn * tensor <= WIDE * D)
        return 2 * D + 2 * o + 4 * N + narrow + rows * (4 * F + 2 * D)
    if fp8:
        heads = 2 * (q + kv + o) + 1.5 * o + 4 * N
        return heads + (19 if moe else 7) * D + 3 * (Q + C) + 2 * ffn + rows * (2 * F + 3 * D)
    heads = 2 * (q + kv + 2 * o) + 4 * N
    stream = (26 if moe else 24) * D
    return heads + stream + 12 * (Q + C) + 12 * ffn + rows * (12 * F + 4 * D)


def logits_bytes(config: Config, tokens: float) -> float:
    """Of the main head and each MTP depth, a piece at a time, with their gradient."""
    model = config.model
    logits = tokens * (1 + model.num_nextn_predict_layers) * model.vocab_size / config.mesh.tensor
    return LOGIT_BYTES * min(logits, LOGITS_AT_ONCE)


def is_tpu(platform: str | None) -> bool:
    """Whether a platform, or a device by its name in analysis/hardware.py, is a TPU."""
    return platform is not None and platform.startswith("tpu")


def scatters_beside_work(platform: str | None) -> bool:
    """Whether XLA's reduce-scatters of gradients start there, and end when others have run."""
    return not is_tpu(platform) or platform == "tpu-7x"


def waiting_for_head(config: Config, platform: str | None, in_mtp: bool) -> float:
    """Bytes of what the head's weight gradient waits as, while the backward pass is in layers.

    Of up to two pieces of logits XLA makes it after MTP's layers, and after all others where it
    scatters beside work: until then the gradients of the logits wait. Of more pieces a loop adds it
    up at once; it then waits, whole, where it is scattered beside work.
    """
    beside = scatters_beside_work(platform)
    logits = tokens_per_micro_batch(config) * (1 + config.model.num_nextn_predict_layers)
    logits *= config.model.vocab_size / config.mesh.tensor
    if logits > 2 * LOGITS_AT_ONCE:
        return MASTER * table_size(config) if beside else 0.0
    return LOGIT_BYTES * logits if beside or in_mtp else 0.0


def table_size(config: Config) -> float:
    """Numbers of the embedding, or of the head, on a device that has its part whole."""
    return config.model.vocab_size * config.model.hidden_size / config.mesh.tensor


def tokens_per_micro_batch(config: Config) -> float:
    """Tokens of one micro-batch on one device."""
    mesh, tokens = config.mesh, config.micro_batch_size * config.train.seq_len
    return tokens / (mesh.data * mesh.node * mesh.local * mesh.context)


def ffn_width(config: Config, moe: bool) -> float:
    """The width of a dense layer's feed-forward, or of a MoE layer's shared experts."""
    model = config.model
    wide = model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size
    return wide / config.mesh.tensor


def rows_of_token(config: Config) -> float:
    """Rows that routed experts multiply in a MoE layer, for each token of a micro-batch."""
    tokens = tokens_per_micro_batch(config)
    here = config.model.n_routed_experts / (config.mesh.node * config.mesh.local)
    return experts_rows(config, tokens, here) / tokens


def experts_rows(config: Config, tokens: float, here: float) -> float:
    """Rows that a device's experts multiply in a layer, those that fill buffers and groups too."""
    model, expert = config.model, config.expert_parallel
    factor = expert.capacity_factor if config.mesh.node * config.mesh.local > 1 else 1.0
    entries = math.ceil(factor * tokens * model.num_experts_per_tok)
    return math.ceil((entries + here * (TILE - 1)) / TILE) * TILE
