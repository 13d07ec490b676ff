"""Which experts get a second place, and on which device: plans for redundant experts, in NumPy.

A plan gives every layer's E experts P >= E places ("physical experts"), P / num_devices on each
device, so that the busiest device has as little to do as a greedy search finds. Where the groups of
node-limited routing divide over the nodes, a group and all replicas of its experts stay on one node
and tokens cross to no more nodes than before (hierarchical); otherwise any place may take any
expert (global).

The algorithm is that of deepseek-ai/EPLB (README, "hierarchical" and "global load balancing"),
written anew, with one promise added: where it finds nothing better than the plain order of experts,
that order is kept, so that no plan is worse than none. Serving: `inference/redundant_experts.py`.
"""

from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from dsv3_jax.config import UserError
from dsv3_jax.config.records import records_in


class Placement(NamedTuple):
    """Where the replicas of every expert are; int32. Device d has places d P / D to (d+1) P / D."""

    expert_LP: Int[np.ndarray, "L P"]  # the expert in each place
    place_LEC: Int[np.ndarray, "L E C"]  # the places of an expert, in order; -1 after the last
    count_LE: Int[np.ndarray, "L E"]  # how many places it has


def balance(
    load_LE: Num[np.ndarray, "L E"],
    num_places: int,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_devices: int = 1,
) -> Placement:
    """The plan for experts with these loads (tokens, or fractions of them) in every layer.

    Hierarchical when num_nodes divides num_groups, else global. Raises UserError when the places
    are fewer than the experts, or do not divide evenly over the devices.
    """
    load = np.asarray(load_LE, np.float64)
    _check(load, num_places, num_groups, num_nodes, num_devices)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers = [_layer(row, num_places, num_groups, num_nodes, num_devices) for row in load]
    return placement_of(np.array(layers), load.shape[1])


def placement_of(expert_LP: Int[np.ndarray, "L P"], num_experts: int) -> Placement:
    """The placement that puts these experts there; UserError when an expert has no place."""
    expert_LP = np.asarray(expert_LP, np.int32)
    count_LE = np.array([np.bincount(row, minlength=num_experts) for row in expert_LP], np.int32)
    if not count_LE.all():
        layer, expert = np.argwhere(count_LE == 0)[0]
        raise UserError(f"expert {expert} of layer {layer} has no place in the plan")
    place_LEC = np.full((*count_LE.shape, count_LE.max()), -1, np.int32)
    for layer, expert in np.ndindex(count_LE.shape):
        found = np.flatnonzero(expert_LP[layer] == expert)
        place_LEC[layer, expert, : len(found)] = found
    return Placement(expert_LP, place_LEC, count_LE)


def device_load(
    load_LE: Num[np.ndarray, "L E"], placement: Placement, num_devices: int
) -> Float[np.ndarray, "L D"]:
    """What each device has to do when the tokens of an expert are shared out over its replicas."""
    share_LE = np.asarray(load_LE, np.float64) / placement.count_LE
    share_LP = np.take_along_axis(share_LE, placement.expert_LP, axis=1)
    return share_LP.reshape(len(share_LP), num_devices, -1).sum(-1)


def imbalance(
    load_LE: Num[np.ndarray, "L E"], placement: Placement, num_devices: int
) -> Float[np.ndarray, " L"]:
    """The busiest device's load over the mean, for every layer: 1 when balanced or without load."""
    per_device = device_load(load_LE, placement, num_devices)
    mean = per_device.mean(-1)
    return np.where(mean > 0, per_device.max(-1) / np.where(mean > 0, mean, 1), 1.0)


def logged_load(metrics_file: str | Path, last: int = 10) -> Float[np.ndarray, "L E"]:
    """The mean `expert_load` of the last lines of a metrics.jsonl that have one.

    Fractions of a layer's tokens; MTP modules come after the main model's MoE layers. A layer that
    saw no token (null) counts as balanced. Raises UserError when no line has any.
    """
    path = Path(metrics_file)
    if not path.is_file():
        raise UserError(f"{path}: no such file, so no expert loads to plan from")
    records = (record for _, record in records_in(path, of_steps=False))
    loads = deque((r["expert_load"] for r in records if r and r.get("expert_load")), last)
    if not loads:
        raise UserError(f"{path}: no line has an expert_load")
    shapes = {(len(load), len(load[0])) for load in loads}
    if len(shapes) > 1:
        raise UserError(f"{path}: the last {last} expert_loads have shapes {sorted(shapes)}")
    load = np.array(loads, np.float64)  # null becomes nan
    return np.nan_to_num(load, nan=1 / load.shape[-1]).mean(0)


def _check(load, num_places, num_groups, num_nodes, num_devices) -> None:
    if load.ndim != 2 or not np.isfinite(load).all() or (load < 0).any():
        raise UserError(f"loads of shape {load.shape} must be [layers, experts], finite, not < 0")
    num_experts = load.shape[1]
    if num_experts % num_groups:
        raise UserError(f"{num_experts} experts do not divide into {num_groups} groups")
    if num_devices % num_nodes:
        raise UserError(f"{num_devices} devices do not divide over {num_nodes} nodes")
    if num_places < num_experts:
        raise UserError(f"{num_places} places are too few for {num_experts} experts")
    if num_places % num_devices:
        least = -(-num_experts // num_devices) * num_devices - num_experts
        raise UserError(
            f"{num_experts} experts and {num_places - num_experts} redundant ones do not divide "
            f"over {num_devices} devices: use {least} redundant experts, or {num_devices} more "
            "or a multiple of that"
        )


def _layer(load, num_places, num_groups, num_nodes, num_devices) -> Int[np.ndarray, " P"]:
    """The expert in each place of one layer."""
    experts, places = len(load) // num_nodes, num_places // num_nodes  # of a node
    # Groups to nodes.
    grouped = np.arange(len(load)).reshape(num_groups, -1)
    group_load = load[grouped].sum(1)
    plan = []
    for groups in pack(group_load, num_nodes):
        # Replicas within the node, then replicas to its devices.
        members = grouped[groups].reshape(experts)
        replica = members[replicate(load[members], places)]
        share = load / np.bincount(replica, minlength=len(load)).clip(1)
        plan += [replica[places] for places in pack(share[replica], num_devices // num_nodes)]
    plan = np.concatenate(plan)
    if len(load) % num_devices:
        return plan
    plain = _plain_order(load, num_places, num_devices)
    return (
        plan if _busiest(load, plan, num_devices) <= _busiest(load, plain, num_devices) else plain
    )


def pack(weights: Num[np.ndarray, " N"], num_packs: int) -> list[Int[np.ndarray, " n"]]:
    """N / num_packs items for each pack: heaviest first, to the lightest pack with room.

    Ties go to the item and the pack of the lower number.
    """
    size = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = np.zeros(num_packs)
    for item in np.argsort(-weights, kind="stable"):
        lightest = int(np.argmin(total))
        packs[lightest].append(int(item))
        # A full pack takes part no more.
        total[lightest] += weights[item] if len(packs[lightest]) < size else np.inf
    return [np.array(items, int) for items in packs]


def replicate(load: Num[np.ndarray, " E"], num_places: int) -> Int[np.ndarray, " P"]:
    """The expert of each place: one each, then again and again one more for the heaviest replica.

    No choice of counts makes the heaviest replica lighter.
    """
    count = np.ones(len(load), int)
    extra = []
    for _ in range(num_places - len(load)):
        heaviest = int(np.argmax(load / count))
        extra.append(heaviest)
        count[heaviest] += 1
    return np.array([*range(len(load)), *extra], int)


def _plain_order(load, num_places, num_devices) -> Int[np.ndarray, " P"]:
    """Experts in order; further places repeat the device's own, which changes no device's load."""
    own = np.arange(len(load)).reshape(num_devices, -1)
    further = (num_places - len(load)) // num_devices
    heaviest_first = np.take_along_axis(own, np.argsort(-load[own], axis=1, kind="stable"), axis=1)
    repeats = heaviest_first[:, np.arange(further) % own.shape[1]]
    return np.concatenate([own, repeats], axis=1).reshape(-1)


def _busiest(load, plan, num_devices) -> float:
    share = load / np.bincount(plan, minlength=len(load))
    return share[plan].reshape(num_devices, -1).sum(1).max()
