"""Expert parallelism: tokens/s and bytes by mesh axis, forward and backward.

    python -m benchmarks.bench_expert_parallel --nodes 4 --local 2
    python -m benchmarks.bench_expert_parallel --nodes 1 --local 8 --ways hierarchical ragged

One line for each way that tokens may reach their experts: flat (one hop over both axes),
hierarchical (node, then local), all-gather, and, on accelerators, hierarchical and ragged. The
router limits a token to half of the nodes. Bytes are what a device sends for each of its tokens in
one round, forward and backward, counted in the lowered program, FP8 out and BF16 back; what a flat
exchange sends is split by where its peers are. Without accelerators, devices are virtual CPU
devices, which share this machine's cores and memory: time here measures the work around the
network, not a network.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ExpertParallelConfig, ModelConfig
from dsv3_jax.model.expert_ffn import exchanged_expert_ffn
from dsv3_jax.model.router import Routing, route
from dsv3_jax.parallel.audit import collectives_of, sent_by_axes
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.exchange import make_exchange
from dsv3_jax.quantization.recipe import BF16

AXES = ("node", "local")
SPLIT = PartitionSpec(AXES)
WAYS = {
    "flat": {"transport": "padded", "hierarchical": False},
    "hierarchical": {"transport": "padded"},
    "allgather": {"transport": "allgather"},
    "ragged": {"transport": "ragged"},
}
ON_CPU = ("flat", "hierarchical", "allgather")  # which lacks ragged_all_to_all


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=ON_CPU, choices=WAYS)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--local", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="a device")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=128, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    num_devices = options.nodes * options.local
    jax.config.update("jax_num_cpu_devices", num_devices)
    devices = np.array(jax.devices()[:num_devices]).reshape(options.nodes, options.local)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)
    model = ModelConfig(
        hidden_size=options.hidden_size,
        moe_intermediate_size=options.width,
        n_routed_experts=options.experts,
        n_group=options.nodes,
        topk_group=max(options.nodes // 2, 1),
    )
    arrays = inputs(mesh, model, options.tokens)
    steps, bytes_sent, rounds = {}, {}, {}
    for name in options.ways:
        way = WAYS[name] | {"capacity_factor": options.capacity_factor}
        steps[name] = step_of(mesh, model, options.tokens, way).lower(*arrays).compile()
        # A loop's body would count besides the first round.
        once = step_of(mesh, model, options.tokens, way | {"overflow": "error"})
        collectives = collectives_of(once.lower(*arrays).as_text(), dict(mesh.shape))
        bytes_sent[name] = by_distance(sent_by_axes(collectives), mesh)
        rounds[name] = int(steps[name](*arrays)[1])
    seconds = {name: [] for name in options.ways}
    for _ in range(options.repeats):  # in turn, so that a busy machine is busy for all
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[name].append(time.perf_counter() - start)
    total = options.tokens * num_devices
    print(
        f"{options.nodes} nodes x {options.local} devices, {options.tokens} tokens a device, "
        f"hidden size {options.hidden_size}, {model.num_experts_per_tok} of {options.experts} "
        f"experts of width {options.width}, at most {model.topk_group} nodes a token, BF16"
    )
    print(f"{'':14} {'tokens/s':>10} {'rounds':>7} {'bytes a token: to nodes':>24} {'within':>8}")
    for name in options.ways:
        between, within = (count / options.tokens for count in bytes_sent[name])
        rate = total / statistics.median(seconds[name])
        print(f"{name:14} {rate:10,.0f} {rounds[name]:7} {between:24,.0f} {within:8,.0f}")


def inputs(mesh: Mesh, model: ModelConfig, tokens: int) -> list[jax.Array]:
    """x, gate weights, the experts' two weights, d_y and the choices, spread over the mesh."""
    dim, width, experts = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens * mesh.size, dim))
    gate = jax.random.normal(keys[1], (experts, dim)) / dim**0.5
    routing = jax.jit(lambda x: route(x, gate, jnp.zeros(experts), model))(x)
    arrays = [
        x.astype(jnp.bfloat16),
        routing.weights_TK,
        jax.random.normal(keys[2], (experts, 2, width, dim)) / dim**0.5,
        jax.random.normal(keys[3], (experts, dim, width)) / width**0.5,
        jax.random.normal(keys[4], x.shape).astype(jnp.bfloat16),
        routing.experts_TK,
    ]
    return [jax.device_put(array, NamedSharding(mesh, SPLIT)) for array in arrays]


def step_of(mesh: Mesh, model: ModelConfig, tokens: int, way: dict):
    """The jitted forward and backward pass of the exchanged experts."""
    exchange = make_exchange(
        ExpertParallelConfig(**way, dispatch_format="fp8", combine_format="bf16"),
        dict(mesh.shape),
        AXES,
        tokens=tokens,
        per_token=model.num_experts_per_tok,
        num_experts=model.n_routed_experts,
        max_nodes=model.topk_group,
    )

    def per_device(x, weights, gate_up, down, experts):
        x, weights, gate_up, down = vary((x, weights, gate_up, down), AXES)
        routing = Routing(experts, weights, weights)
        return exchanged_expert_ffn(x, routing, gate_up, down, BF16, exchange)

    spread = jax.shard_map(
        per_device, mesh=mesh, in_specs=(SPLIT,) * 5, out_specs=(SPLIT, PartitionSpec())
    )

    def step(x, weights, gate_up, down, d_y, experts):
        y, pull_back, rounds = jax.vjp(
            lambda *operands: spread(*operands, experts), x, weights, gate_up, down, has_aux=True
        )
        return y, rounds, pull_back(d_y)

    return jax.jit(step)


def by_distance(sent: dict[tuple[str, ...], float], mesh: Mesh) -> tuple[float, float]:
    """Bytes that leave the node, and bytes that stay in it."""
    nodes, local = mesh.shape["node"], mesh.shape["local"]
    both = sent.get(AXES, 0.0)
    remote = both * (nodes - 1) * local / (nodes * local - 1)
    return sent.get(("node",), 0.0) + remote, sent.get(("local",), 0.0) + both - remote


if __name__ == "__main__":
    main()
