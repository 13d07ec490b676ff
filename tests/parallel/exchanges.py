"""What tests of expert parallelism share: meshes, routings and the exchanged experts over them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.config import ExpertParallelConfig
from dsv3_jax.model.expert_ffn import exchanged_expert_ffn
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.exchange import make_exchange
from dsv3_jax.quantization.recipe import BF16

AXES = ("node", "local")
# A device's tokens, and experts in all: a token's 4 may lie on one device (8 of them) or on 4.
TOKENS, EXPERTS, PER_TOKEN, DIM, WIDTH = 6, 16, 4, 12, 10
TOPOLOGIES = [(8, 1), (4, 2), (2, 4), (1, 8)]
TRANSPORTS = {
    "allgather": {"transport": "allgather"},
    "padded": {"transport": "padded"},
    "padded_flat": {"transport": "padded", "hierarchical": False},
    "ragged": {"transport": "ragged"},
    "pallas": {"transport": "pallas"},
}


def mesh_of(nodes, local):
    devices = np.array(jax.devices()[: nodes * local]).reshape(nodes, local)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def routing_of(kind):
    """Experts of all 48 tokens."""
    rng = np.random.default_rng(0)
    tokens = 8 * TOKENS
    if kind == "top_1":
        return rng.integers(0, EXPERTS, (tokens, 1))
    if kind == "all_to_one_expert":
        return np.full((tokens, 1), 5)
    if kind == "an_empty_device":  # the fourth one's, 6 and 7
        others = [e for e in range(EXPERTS) if e not in (6, 7)]
        return np.stack([rng.permutation(others)[:PER_TOKEN] for _ in range(tokens)])
    return np.stack([rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(tokens)])


def arrays_of(experts, dim=DIM, **dtypes):
    rng = np.random.default_rng(1)
    tokens, per_token = experts.shape
    shapes = {
        "x": (tokens, dim),
        "weights": (tokens, per_token),
        "gate_up": (EXPERTS, 2, WIDTH, dim),
        "down": (EXPERTS, dim, WIDTH),
        "d_y": (tokens, dim),
    }
    scale = {"gate_up": dim**-0.5, "down": WIDTH**-0.5}
    return [
        jnp.asarray(scale.get(name, 1) * rng.normal(size=shape), dtypes.get(name, np.float32))
        for name, shape in shapes.items()
    ]


def exchange_over(mesh, config, per_token, tokens=TOKENS, num_experts=EXPERTS, **options):
    """The Exchange of `tokens` tokens a device."""
    return make_exchange(
        ExpertParallelConfig(**config),
        dict(mesh.shape),
        AXES,
        tokens=tokens,
        per_token=per_token,
        num_experts=num_experts,
        **options,
    )


def spread_over(*args, recipe=BF16, **options):
    """(y, rounds) of all tokens, spread over the mesh; arguments as for `exchange_over`."""
    exchange = exchange_over(*args, **options)
    mesh = args[0]

    def per_device(x, weights, gate_up, down, experts):
        x, weights, gate_up, down = vary((x, weights, gate_up, down), AXES)
        routing = Routing(experts, weights, weights)
        return exchanged_expert_ffn(x, routing, gate_up, down, recipe, exchange)

    split = PartitionSpec(AXES)
    return jax.shard_map(
        per_device, mesh=mesh, in_specs=(split,) * 5, out_specs=(split, PartitionSpec())
    )


def over(mesh, config, per_token, **options):
    """The jitted (y, rounds, gradients) of all tokens; arguments as for `spread_over`.

    Tests that ask for the same get the same function, which is compiled once.
    """
    return _over(mesh, tuple(sorted(config.items())), per_token, tuple(sorted(options.items())))


@cache
def _over(mesh, config, per_token, options):
    spread = spread_over(mesh, dict(config), per_token, **dict(options))

    @jax.jit
    def run(x, weights, gate_up, down, d_y, experts):
        y, pull_back, rounds = jax.vjp(
            lambda *operands: spread(*operands, experts), x, weights, gate_up, down, has_aux=True
        )
        return y, rounds, pull_back(d_y)

    return run


@jax.jit
def dense(x, weights, gate_up, down, d_y, experts):
    """Every expert on every token, weighted by 0 where it was not chosen."""

    def forward(x, weights, gate_up, down):
        chosen = (jax.nn.one_hot(experts, gate_up.shape[0]) * weights[..., None]).sum(1)
        h = jnp.einsum("td,ecfd->tecf", x, gate_up, precision="highest")
        h = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
        return jnp.einsum("tef,edf,te->td", h, down, chosen, precision="highest")

    y, pull_back = jax.vjp(forward, x, weights, gate_up, down)
    return y, pull_back(d_y)


def distance(got, want):
    """The norm of the difference over that of what is wanted, for the worst leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
