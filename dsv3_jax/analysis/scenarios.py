"""`python -m dsv3_jax simulate`: traffic on a simulated network, and what networks cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dsv3_jax.analysis import charts, topology, traffic
from dsv3_jax.analysis.fabric import Fabric, Forwarding, Routing, Traffic, route
from dsv3_jax.analysis.latency import fp8_message_bytes
from dsv3_jax.analysis.network import simulate as simulate_flows
from dsv3_jax.analysis.output import table, write_json
from dsv3_jax.config import ModelConfig, UserError, load_config

Scenario = Literal["all-to-all", "experts", "ring", "kv-transfer", "topologies"]


@dataclass(frozen=True)
class SimulateOptions:
    """Traffic on a simulated network: how long it takes and which link is the bottleneck."""

    scenario: Scenario = "all-to-all"
    nodes: int = 32
    planes: int = 8  # 8: multi-plane fat tree; 1: multi-rail fat tree
    radix: int = 64  # ports of a switch; half of them go down
    routing: Routing = "adaptive"
    forwarding: Forwarding = "sender"
    nic_gbytes: float = 50.0  # GB/s one way
    scale_up_gbytes: float = 200.0
    dead_planes: tuple[int, ...] = ()
    dead_cables: tuple[str, ...] = ()  # each "plane:leaf:cable"
    megabytes: float = 16.0  # to each GPU (all-to-all), around each ring, or of each cache
    tokens: int = 512  # a GPU (experts)
    skew: float = 0.0  # standard deviation of the experts' popularity (experts)
    choices: Path | None = None  # recorded expert choices, .npy of [gpus, tokens, k] (experts)
    config: Path | None = None  # the model (experts); None: DeepSeek-V3
    ring_size: int = 8
    prefill_nodes: int = 8  # (kv-transfer)
    requests: int = 512  # (kv-transfer)
    prices: Path | None = None  # a price book in JSON (topologies); None: the fitted one
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None


def simulate(options: SimulateOptions) -> int:
    """Runs the scenario on the simulated network and prints time, rates and bottleneck; 0."""
    if options.scenario == "topologies":
        return _print_topologies(options)
    if options.radix < 2 or options.radix % 2:
        raise UserError(f"radix={options.radix} must be even: use {max(options.radix + 1, 2)}")
    for name in ("megabytes", "tokens", "requests"):
        if getattr(options, name) <= 0:
            raise UserError(f"{name}={getattr(options, name)} must be positive")
    fabric = Fabric(
        nodes=options.nodes,
        planes=options.planes,
        leaf_ports=options.radix // 2,
        nic_bandwidth=options.nic_gbytes * 1e9,
        scale_up_bandwidth=options.scale_up_gbytes * 1e9,
        dead_planes=options.dead_planes,
        dead_cables=tuple(_cable(text) for text in options.dead_cables),
    )
    demand = _demand(options, fabric)
    start = time.perf_counter()
    routes = route(fabric, demand, options.routing, options.forwarding, options.seed)
    outcome = simulate_flows(routes, demand.bytes, fabric.capacity)
    wall = time.perf_counter() - start
    between = demand.source // fabric.gpus_per_node != demand.target // fabric.gpus_per_node
    out = np.bincount(demand.source[between], demand.bytes[between], fabric.gpus)
    rows = [
        ["endpoints", fabric.gpus],
        ["flows", demand.source.size],
        ["time, ms", outcome.seconds * 1e3],
        ["GB between nodes", out.sum() / 1e9],
        ["mean NIC rate until the end, GB/s", out.mean() / outcome.seconds / 1e9],
        ["slowest flow at the start, GB/s", float(outcome.first_rates.min()) / 1e9],
        ["fastest flow at the start, GB/s", float(outcome.first_rates.max()) / 1e9],
    ]
    print(table([f"{options.scenario}, {options.routing}", "value"], rows))
    busiest = outcome.busiest()
    print(f"busiest link: {fabric.link_name(busiest)}, {100 * outcome.utilisation[busiest]:.1f} %")
    print(f"simulated in {wall:.2f} s")
    if options.json:
        write_json(
            options.json,
            {
                "options": {k: str(v) for k, v in vars(options).items()},
                "summary": dict(rows),
                "busiest": fabric.link_name(busiest),
                "wall_seconds": wall,
            },
        )
    if options.plot:
        charts.plot_outcome(outcome, f"{options.scenario}, {fabric.gpus:,} GPUs", options.plot)
    return 0


def _cable(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(p.isdigit() for p in parts):
        raise UserError(f"dead cable {text!r} must be plane:leaf:cable, as in 0:3:17")
    plane, leaf, cable = map(int, parts)
    return plane, leaf, cable


def _demand(options: SimulateOptions, fabric: Fabric) -> Traffic:
    bytes_ = options.megabytes * 1e6
    if options.scenario == "all-to-all":
        return traffic.all_to_all_by_rail(fabric, bytes_)
    if options.scenario == "kv-transfer":
        return traffic.kv_transfer(
            fabric, options.prefill_nodes, options.requests, bytes_, options.seed
        )
    if options.scenario == "ring":
        size = options.ring_size
        if size < 2 or fabric.nodes % size:
            raise UserError(f"ring_size={size} must be at least 2 and divide nodes={fabric.nodes}")
        nodes = np.arange(fabric.nodes).reshape(size, -1).T  # far apart: across leaves
        rails = np.arange(fabric.gpus_per_node)[None, :, None]
        groups = nodes[:, None, :] * fabric.gpus_per_node + rails
        return traffic.rings(groups.reshape(-1, size), (size - 1) / size * bytes_)
    model = load_config(options.config).model if options.config else ModelConfig()
    if options.choices:
        choices = _recorded(options.choices)
    else:
        drawn = traffic.draw_choices(
            model, fabric.gpus * options.tokens, options.seed, options.skew
        )
        choices = drawn.reshape(fabric.gpus, options.tokens, -1)
    return traffic.expert_dispatch(
        fabric, choices, model.n_routed_experts, fp8_message_bytes(model.hidden_size)
    )


def _recorded(path: Path) -> np.ndarray:
    try:
        choices = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"choices {path}: {error}") from error
    if choices.ndim != 3 or not np.issubdtype(choices.dtype, np.integer):
        raise UserError(f"choices {path}: must be integers of [gpus, tokens, k]")
    return choices


def _print_topologies(options: SimulateOptions) -> int:
    prices = topology.load_price_book(options.prices) if options.prices else topology.FITTED_PRICES
    radix = options.radix
    made = [
        topology.fat_tree_2(radix),
        topology.multi_plane_fat_tree(radix, options.planes),
        topology.fat_tree_3(radix),
        topology.slim_fly(_slim_fly_order(radix)),
        topology.dragonfly(radix // 4, radix // 2, radix // 4),
    ]
    rows = [
        [
            t.name,
            t.endpoints,
            t.switches,
            t.links,
            topology.cost(t, prices) / 1e6,
            topology.cost(t, prices) / t.endpoints / 1e3,
        ]
        for t in made
    ]
    print(table(["network", "endpoints", "switches", "links", "M$", "k$ an endpoint"], rows))
    print(f"prices: {prices.source}")
    if options.json:
        write_json(options.json, {"prices": prices, "topologies": made})
    return 0


def _slim_fly_order(radix: int) -> int:
    """The largest q whose Slim Fly switches have at most `radix` ports."""
    for q in range(radix, 2, -1):
        if q % 4 != 2:
            degree = (3 * q - {0: 0, 1: 1, 3: -1}[q % 4]) // 2
            if degree + -(-degree // 2) <= radix:
                return q
    raise UserError(f"{radix=} is too small for a Slim Fly: use 8 or more")
