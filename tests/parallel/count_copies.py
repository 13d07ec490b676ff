"""Prints, as JSON, what hierarchical and flat exchanges send on 8 nodes of 4 devices.

A program of its own, because a process has one number of virtual devices.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import choose_places
from dsv3_jax.model.router import route
from dsv3_jax.parallel.audit import collectives_of
from dsv3_jax.parallel.expert import dispatch
from dsv3_jax.parallel.load_balancer import balance
from tests.parallel.exchanges import AXES, dense, distance, exchange_over, mesh_of, over

NODES, LOCAL, TOKENS, DIM, WIDTH = 8, 4, 32, 32, 16
SHAPE = {"node": NODES, "local": LOCAL}
DEVICES = NODES * LOCAL
MODEL = ModelConfig(
    hidden_size=DIM, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4
)
EXPERTS, PER_TOKEN = MODEL.n_routed_experts, MODEL.num_experts_per_tok
SPLIT = PartitionSpec(AXES)


def remote_copies(exchange, x, routing, mesh):
    """Rows sent to other nodes, counted in the plans of the first hop, a token."""

    def per_device(x, weights, experts):
        handle = dispatch(x, weights, experts, exchange, 8)[2]
        per_node = handle.plans[0].sent_N.reshape(NODES, -1).sum(1)
        elsewhere = jnp.arange(NODES) != lax.axis_index("node")
        return lax.psum(jnp.where(elsewhere, per_node, 0).sum(), AXES), handle.left.any()[None]

    spread = jax.shard_map(
        per_device, mesh=mesh, in_specs=(SPLIT,) * 3, out_specs=(PartitionSpec(), SPLIT)
    )
    copies, left = jax.jit(spread)(x, routing.weights_TK, routing.experts_TK)
    assert not left.any()
    return int(copies) / (DEVICES * TOKENS)


def replicated(kind, x, routing, mesh):
    """Copies a token, distinct nodes a token and busiest / mean device, with 32 further places."""
    load = np.bincount(np.asarray(routing.experts_TK).ravel(), minlength=EXPERTS)[None]
    groups = {"num_groups": MODEL.n_group, "num_nodes": NODES} if kind == "hierarchical" else {}
    plan = balance(load, EXPERTS + DEVICES, num_devices=DEVICES, **groups)
    device = jnp.arange(len(x)) // TOKENS
    nodes = {"num_nodes": NODES, "places_per_node": (EXPERTS + DEVICES) // NODES}
    first_node = plan.place_LEC[0][:, 0][routing.experts_TK] // nodes["places_per_node"]
    elsewhere = first_node != np.asarray(device // LOCAL)[:, None]
    distinct = [len(set(row[far])) for row, far in zip(first_node, elsewhere)]
    report = {"without": {"copies": sum(distinct) / len(x)}}  # of each expert one place
    for name, known in (("near", nodes | {"own_node": device // LOCAL}), ("any", {})):
        places = choose_places(
            routing.experts_TK, plan.place_LEC[0], plan.count_LE[0], device * 7, **known
        )
        assert (plan.expert_LP[0][np.asarray(places)] == np.asarray(routing.experts_TK)).all()
        exchange = exchange_over(
            mesh,
            {"transport": "padded", "capacity_factor": 100.0},
            PER_TOKEN,
            tokens=TOKENS,
            num_experts=EXPERTS + DEVICES,
            max_nodes=MODEL.topk_group,
            limit_is_certain=False,
        )
        per_device = np.bincount(np.asarray(places).ravel() // (EXPERTS // DEVICES + 1))
        report[name] = {
            "copies": remote_copies(exchange, x, routing._replace(experts_TK=places), mesh),
            "busiest": float(per_device.max() / per_device.mean()),
        }
    return report


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)
    mesh = mesh_of(NODES, LOCAL)
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (DEVICES * TOKENS, DIM))
    gate = jax.random.normal(keys[1], (EXPERTS, DIM)) / DIM**0.5
    gate_up = jax.random.normal(keys[2], (EXPERTS, 2, WIDTH, DIM)) / DIM**0.5
    down = jax.random.normal(keys[3], (EXPERTS, DIM, WIDTH)) / WIDTH**0.5
    d_y = jax.random.normal(keys[4], x.shape)
    routing = route(x, gate, jnp.zeros(EXPERTS), MODEL)
    experts = np.asarray(routing.experts_TK)
    device = np.repeat(np.arange(DEVICES), TOKENS)[:, None]
    owner, node = experts // (EXPERTS // DEVICES), experts // (EXPERTS // NODES)
    remote = node != device // LOCAL

    def distinct(places):
        return sum(len(set(row[far])) for row, far in zip(places, remote)) / len(x)

    report = {
        "distinct_remote_nodes": distinct(node),
        "distinct_remote_devices": distinct(owner),
        "remote_experts": float(remote.sum(1).mean()),
    }
    arrays = (x, routing.weights_TK, gate_up, down, d_y, routing.experts_TK)
    want = dense(*arrays)
    sizes = {"tokens": TOKENS, "num_experts": EXPERTS, "max_nodes": MODEL.topk_group}
    for name, hierarchical in (("hierarchical", True), ("flat", False)):
        config = {"transport": "padded", "hierarchical": hierarchical}
        roomy = config | {"capacity_factor": 100.0}
        # Counted where buffers hold an even load, and one round is all there is.
        even = config | {"capacity_factor": 1.0, "overflow": "error"}
        program = over(mesh, even, PER_TOKEN, **sizes).lower(*arrays).as_text()
        data = [c for c in collectives_of(program, SHAPE) if c.op == "all_to_all"]
        rows = data[0].shape[0] * data[0].shape[1]  # of all peers' buffers, in the first hop
        y, _, gradients = over(mesh, roomy, PER_TOKEN, **sizes)(*arrays)
        exchange = exchange_over(mesh, roomy, PER_TOKEN, **sizes)
        report[name] = {
            "copies": remote_copies(exchange, x, routing, mesh),
            "lowered_copies": rows * (1 - 1 / NODES) / TOKENS,
            "axes": sorted({c.axes for c in data}),
            "distance": distance((y, gradients), want),
        }
    report["replicas"] = {
        kind: replicated(kind, x, routing, mesh) for kind in ("hierarchical", "global")
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
