"""What the network carries: all-to-alls, expert dispatch from real choices, rings, KV transfers.

Every function returns a `Traffic` of GPU-to-GPU demands on a `Fabric`; `fabric.route` finds the
paths. Expert traffic starts from router choices, recorded or drawn here with the model's own rule,
so node limits, repeats and imbalance are those of the tokens and not of a formula.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int

from dsv3_jax.analysis.fabric import Fabric, Traffic
from dsv3_jax.config import ModelConfig, UserError

Dedup = Literal["expert", "rank", "node"]
_CHUNK = 8192  # tokens scored at once: 8 MB for 256 experts


def all_to_all_by_rail(fabric: Fabric, bytes_per_pair: float) -> Traffic:
    """Every GPU to every GPU, as rails carry it after PXN: what goes over NICs, and what before.

    `bytes_per_pair` from each GPU to each other one. A node's messages for one remote GPU are
    merged by the GPU on the target's rail: nodes * (nodes - 1) * rails flows between nodes and
    rails * (rails - 1) a node to hand them over, in place of gpus * (gpus - 1).
    """
    nodes, rails = fabric.nodes, fabric.gpus_per_node
    sender, receiver = _pairs(nodes)
    rail = np.arange(rails)
    between = Traffic(
        (sender[:, None] * rails + rail).reshape(-1),
        (receiver[:, None] * rails + rail).reshape(-1),
        np.full(sender.size * rails, rails * bytes_per_pair),
    )
    giver, taker = _pairs(rails)
    node = np.arange(nodes)[:, None] * rails
    # To each GPU of the own node, its own message and one for each node on its rail.
    within = Traffic(
        (node + giver).reshape(-1),
        (node + taker).reshape(-1),
        np.full(nodes * giver.size, nodes * bytes_per_pair),
    )
    return between + within


def all_to_all(fabric: Fabric, bytes_per_pair: float) -> Traffic:
    """Every GPU to every other GPU, one flow each: gpus * (gpus - 1) flows."""
    source, target = _pairs(fabric.gpus)
    return Traffic(source, target, np.full(source.size, float(bytes_per_pair)))


def draw_choices(
    model: ModelConfig, tokens: int, seed: int = 0, skew: float = 0.0
) -> Int[np.ndarray, "T K"]:
    """Expert choices of `tokens` random tokens under the model's own routing rule.

    Scores are independent of each other except for a popularity drawn once per expert with standard
    deviation `skew`. Groups are ranked by their two best scores, or their best without a router
    bias, and only `topk_group` of them are open (V3 report, section 2.1.2).
    """
    rng = np.random.default_rng(seed)
    E, K = model.n_routed_experts, model.num_experts_per_tok
    popularity = skew * rng.standard_normal(E, np.float32)
    chosen = []
    for start in range(0, tokens, _CHUNK):
        count = min(_CHUNK, tokens - start)
        scores = rng.standard_normal((count, E), np.float32) + popularity
        if model.topk_method != "greedy" and model.n_group > 1:
            grouped = scores.reshape(count, model.n_group, -1)
            best = 2 if model.has_router_bias else 1
            rank = np.partition(grouped, -best, axis=2)[:, :, -best:].sum(axis=2)
            closed = np.argsort(rank, axis=1)[:, : model.n_group - model.topk_group]
            np.put_along_axis(grouped, closed[:, :, None], -np.inf, axis=1)
            scores = grouped.reshape(count, E)
        chosen.append(np.argpartition(scores, -K, axis=1)[:, -K:])
    return np.concatenate(chosen)


def expert_dispatch(
    fabric: Fabric,
    choices: Int[np.ndarray, "gpus T K"],
    num_experts: int,
    bytes_per_token: float,
    dedup: Dedup = "node",
) -> Traffic:
    """Dispatch of each GPU's tokens to their experts, which lie on the GPUs in order.

    `dedup` "expert" sends a copy for each chosen expert, "rank" one to each GPU, "node" one to each
    node, which the GPU on the sender's rail hands on over scale-up (the paper's way, section 4.3).
    The combine is `.reversed()`, scaled by its own bytes.
    """
    gpus, per_node = fabric.gpus, fabric.gpus_per_node
    if choices.shape[0] != gpus or num_experts % gpus:
        raise UserError(
            f"{num_experts} experts and choices of {choices.shape[0]} GPUs do not spread evenly "
            f"over the fabric's {gpus} GPUs"
        )
    owner = choices // (num_experts // gpus)
    rows = np.zeros((gpus, gpus))  # token copies from GPU s for GPU d
    node_rows = np.zeros((gpus, fabric.nodes))  # tokens of GPU s with an expert on node j
    for s in range(gpus):
        if dedup == "expert":
            rows[s] = np.bincount(owner[s].reshape(-1), minlength=gpus)
        else:
            rows[s] = _distinct(owner[s], gpus)
        node_rows[s] = _distinct(owner[s] // per_node, fabric.nodes)
    if dedup != "node":
        np.fill_diagonal(rows, 0)
        return _from_matrix(rows * bytes_per_token)
    own_node = np.arange(gpus) // per_node
    hop = np.zeros((gpus, gpus))
    for s in range(gpus):
        forwarder = np.arange(fabric.nodes) * per_node + s % per_node
        hop[s, forwarder] += np.where(np.arange(fabric.nodes) == own_node[s], 0, node_rows[s])
        hop[np.repeat(forwarder, per_node), np.arange(gpus)] += rows[s]
    np.fill_diagonal(hop, 0)
    return _from_matrix(hop * bytes_per_token)


def rings(groups: Int[np.ndarray, "groups members"], bytes_per_hop: float) -> Traffic:
    """Each member of each group to the next, the last to the first.

    A ring reduce-scatter or all-gather of B bytes sends (n-1)/n * B over each hop, an all-reduce
    twice that.
    """
    following = np.roll(groups, -1, axis=1)
    return Traffic(groups.reshape(-1), following.reshape(-1), np.full(groups.size, bytes_per_hop))


def kv_transfer(
    fabric: Fabric, prefill_nodes: int, requests: int, bytes_per_request: float, seed: int = 0
) -> Traffic:
    """Caches of `requests` requests, each from a GPU of the first nodes to one of the others.

    Prefill GPUs take turns; the decode GPU is drawn, as a scheduler that looks at memory and not at
    the network would choose.
    """
    if not 0 < prefill_nodes < fabric.nodes:
        raise UserError(f"{prefill_nodes=} must leave decode nodes among {fabric.nodes}")
    first_decode = prefill_nodes * fabric.gpus_per_node
    source = np.arange(requests) % first_decode
    target = np.random.default_rng(seed).integers(first_decode, fabric.gpus, requests)
    return Traffic(source, target, np.full(requests, float(bytes_per_request)))


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.divmod(np.arange(n * n), n)
    different = first != second
    return first[different], second[different]


def _distinct(owner: np.ndarray, places: int) -> np.ndarray:
    """How many rows of `owner` [T, K] name each place at least once."""
    hit = np.zeros((owner.shape[0], places), bool)
    hit[np.arange(owner.shape[0])[:, None], owner] = True
    return hit.sum(axis=0)


def _from_matrix(bytes_: np.ndarray) -> Traffic:
    source, target = np.nonzero(bytes_)
    return Traffic(source, target, bytes_[source, target])
