"""The model once more, in NumPy f64 with plain loops, written from the papers' equations.

Nothing here is shared with the code under test but the parameter tree and the config. It is slow
and says each equation once, for one row of tokens at a time: x is [T, D] throughout.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig

Tree = Any


class Routed(NamedTuple):
    """One MoE layer's routing of one row."""

    experts: np.ndarray  # [T, K], best first
    weights: np.ndarray  # [T, K]
    scores: np.ndarray  # [T, E]


class Row(NamedTuple):
    """The whole model on one row."""

    logits: np.ndarray  # [T, V]
    mtp_logits: list[np.ndarray]  # of depth k, T - k rows
    routed: list[Routed]  # of every main MoE layer
    mtp_routed: list[Routed]


def float64(tree: Tree) -> Tree:
    """The same nested dicts with f64 arrays."""
    if isinstance(tree, dict):
        return {name: float64(sub) for name, sub in tree.items()}
    return np.asarray(tree, np.float64)


def layer(tree: Tree, index: int) -> Tree:
    """One layer of a stacked tree."""
    if isinstance(tree, dict):
        return {name: layer(sub, index) for name, sub in tree.items()}
    return tree[index]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """facts: theta**(-2j/dim), and YaRN's ramp between the corrected dims."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    result = []
    for j in range(dim // 2):
        frequency = theta ** (-2 * j / dim)
        if yarn is not None:

            def corrected(turns):
                ratio = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
                return dim * math.log(ratio) / (2 * math.log(theta))

            low = max(math.floor(corrected(yarn.beta_fast)), 0)
            high = min(math.ceil(corrected(yarn.beta_slow)), dim - 1)
            if low == high:
                high += 0.001
            smooth = 1 - min(max((j - low) / (high - low), 0), 1)
            frequency = frequency / yarn.factor * (1 - smooth) + frequency * smooth
        result.append(frequency)
    return np.array(result)


def rotate(x: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """RoPE of one vector [R]: pair (2j, 2j + 1) is a complex number turned by position * f_j."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
    out = np.empty_like(x)
    out[0::2], out[1::2] = turned.real, turned.imag
    return out


def mla(x: np.ndarray, p: Tree, config: ModelConfig, documents=None) -> np.ndarray:
    """Eqs. 1-11, one token, one head, one key at a time; documents [T] forbids crossing them."""
    length, nope = len(x), config.qk_nope_head_dim
    frequencies = rope_frequencies(config)
    scale = 1 / math.sqrt(nope + config.qk_rope_head_dim)
    if config.rope_scaling is not None:
        m = 0.1 * config.rope_scaling.mscale_all_dim * math.log(config.rope_scaling.factor) + 1
        scale *= m * m
    compressed = x @ p["kv_a_proj_with_mqa"].T
    c_kv = rms_norm(compressed[:, : config.kv_lora_rank], p["kv_a_layernorm"], 1e-6)  # 1
    k_rope = [rotate(compressed[t, config.kv_lora_rank :], t, frequencies) for t in range(length)]
    c_q = x  # 6
    if config.q_lora_rank is not None:
        c_q = rms_norm(x @ p["q_a_proj"].T, p["q_a_layernorm"], 1e-6)
    out = np.zeros_like(x)
    for head in range(config.num_attention_heads):
        w_q = p["q_b_proj" if config.q_lora_rank is not None else "q_proj"][head]
        w_uk, w_uv = p["kv_b_proj"][head][:nope], p["kv_b_proj"][head][nope:]
        for t in range(length):
            q_t = w_q @ c_q[t]
            q_t = np.concatenate([q_t[:nope], rotate(q_t[nope:], t, frequencies)])  # 7-9
            seen = [j for j in range(t + 1) if documents is None or documents[j] == documents[t]]
            keys = np.stack([np.concatenate([w_uk @ c_kv[j], k_rope[j]]) for j in seen])  # 2-4
            values = np.stack([w_uv @ c_kv[j] for j in seen])  # 5
            o_t = softmax(keys @ q_t * scale) @ values  # 10
            out[t] += p["o_proj"][:, head] @ o_t  # 11
    return out


def feed_forward(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T


def route(x: np.ndarray, gate: np.ndarray, bias: np.ndarray | None, config: ModelConfig) -> Routed:
    """Eqs. 13, 15, 16 with node-limited routing, one token at a time, by sorting."""
    logits = x @ gate.T
    scores = 1 / (1 + np.exp(-logits)) if config.scoring_func == "sigmoid" else softmax(logits)
    experts, weights = [], []
    for s in scores:
        c = s if bias is None else s + bias
        allowed = list(range(len(c)))
        if config.topk_method != "greedy" and config.n_group > 1:
            size = len(c) // config.n_group
            members = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
            best = 1 if bias is None else 2
            value = [sum(sorted((c[e] for e in group), reverse=True)[:best]) for group in members]
            winners = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
            allowed = [e for g in sorted(winners) for e in members[g]]
        chosen = sorted(allowed, key=lambda e: -c[e])[: config.num_experts_per_tok]
        w = s[chosen]
        if config.norm_topk_prob:
            w = w / w.sum()
        experts.append(chosen)
        weights.append(w * config.routed_scaling_factor)
    return Routed(np.array(experts), np.array(weights), scores)


def moe(
    x: np.ndarray, p: Tree, bias: np.ndarray | None, config: ModelConfig
) -> tuple[np.ndarray, Routed]:
    """Eq. 12 without its residual."""
    routed = route(x, p["gate"], bias, config)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(routed.experts[t], routed.weights[t], strict=True):
            gate_up, down = (p["experts"][n][expert] for n in ("gate_up_proj", "down_proj"))
            out[t] += weight * feed_forward(x[t], gate_up, down)
        if config.n_shared_experts:
            shared = p["shared_experts"]
            out[t] += feed_forward(x[t], shared["gate_up_proj"], shared["down_proj"])
    return out, routed


def balance_loss(scores: np.ndarray, per_token: int) -> float:
    """Eqs. 17-20 of one sequence without alpha: raw scores, no bias, no groups."""
    length, num_experts = scores.shape
    total = 0.0
    for i in range(num_experts):
        count = 0
        for t in range(length):
            others = sorted(range(num_experts), key=lambda e: -scores[t, e])
            count += i in others[:per_token]
        f_i = num_experts / (per_token * length) * count
        p_i = sum(scores[t, i] / scores[t].sum() for t in range(length)) / length
        total += f_i * p_i
    return total


def block(x: np.ndarray, p: Tree, router: Tree, config: ModelConfig, documents=None):
    """One layer; (x, None) when it is dense, (x, Routed) when it has experts."""
    eps = config.rms_norm_eps
    x = x + mla(rms_norm(x, p["input_layernorm"], eps), p["self_attn"], config, documents)
    normed = rms_norm(x, p["post_attention_layernorm"], eps)
    if "experts" not in p["mlp"]:
        return x + feed_forward(normed, p["mlp"]["gate_up_proj"], p["mlp"]["down_proj"]), None
    bias = router["mlp"]["e_score_correction_bias"] if router else None
    y, routed = moe(normed, p["mlp"], bias, config)
    return x + y, routed


def forward(variables: Tree, tokens: np.ndarray, config: ModelConfig, documents=None) -> Row:
    """Logits of one row [T], and those of the MTP chain (eqs. 21-23), shorter by one a depth."""
    p, router = float64(variables["params"]), float64(variables["router"])
    eps, length = config.rms_norm_eps, len(tokens)
    x, routed, mtp_logits, mtp_routed = p["embed_tokens"][tokens], [], [], []
    for name, count in (
        ("dense_layers", config.num_dense_layers),
        ("moe_layers", config.num_moe_layers),
    ):
        for index in range(count):
            layer_router = layer(router[name], index) if name in router else None
            x, choice = block(x, layer(p[name], index), layer_router, config, documents)
            routed += [] if choice is None else [choice]
    h = rms_norm(x, p["norm"], eps)
    logits = h @ p["lm_head"].T
    for k in range(1, config.num_nextn_predict_layers + 1):
        m = p[f"mtp_{k - 1}"]
        # Rows 1..T-k only: each is joined with the embedding of the token k places on.
        embedding = rms_norm(p["embed_tokens"][tokens[k:]], m["enorm"], eps)
        joined = np.concatenate([embedding, rms_norm(h[: length - k], m["hnorm"], eps)], axis=1)
        mtp_router = router[f"mtp_{k - 1}"]["block"] if f"mtp_{k - 1}" in router else None
        cut = None if documents is None else documents[: length - k]
        x, choice = block(joined @ m["eh_proj"].T, m["block"], mtp_router, config, cut)
        h = rms_norm(x, m["norm"], eps)
        mtp_logits.append(h @ p["lm_head"].T)
        mtp_routed.append(choice)
    return Row(logits, mtp_logits, routed, mtp_routed)


def nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log P of each target, [T]."""
    return np.array([-np.log(softmax(row)[t]) for row, t in zip(logits, targets, strict=True)])
