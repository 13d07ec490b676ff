"""What the ISCA paper's recommendations for the network would be worth, by simulating a fabric.

The studies of `what_if` whose answer depends on which link a message takes: planes that fail,
routing, and traffic that shares a NIC.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsv3_jax.analysis.fabric import Fabric, Traffic, route
from dsv3_jax.analysis.network import max_min_rates, simulate
from dsv3_jax.analysis.reproduce import ring_bandwidth
from dsv3_jax.analysis.study import Panel, Study
from dsv3_jax.analysis.traffic import all_to_all_by_rail


def planes_lost() -> Study:
    """All-to-all time as planes die, against one fabric that loses as many of its spines [12, 17].

    64 nodes, leaves of 16. A lost plane's rails go over NVLink to living NICs; a lost eighth of the
    spines takes an eighth of every leaf's cables. Both under adaptive routing.
    """
    lost = range(5)
    whole = Fabric(nodes=64, leaf_ports=16)
    demand = all_to_all_by_rail(whole, 1e6)

    def seconds(fabric: Fabric) -> float:
        return simulate(route(fabric, demand), demand.bytes, fabric.capacity).seconds

    base = seconds(whole)
    planes = [seconds(dataclasses.replace(whole, dead_planes=tuple(range(n)))) / base for n in lost]
    single = Fabric(nodes=64, planes=1, leaf_ports=16)
    spines = []
    for n in lost:
        dead = tuple((0, leaf, path) for leaf in range(single.leaves) for path in range(2 * n))
        spines.append(seconds(dataclasses.replace(single, dead_cables=dead)) / base)
    rows = tuple((n, p, 8 / (8 - n), s) for n, p, s in zip(lost, planes, spines))
    return Study(
        "planes_lost",
        (12, 17),
        ("eighths lost", "8 planes: time", "8 / (8 - lost)", "1 plane, spines lost: time"),
        rows,
        (
            Panel(
                "All-to-all time, 512 GPUs",
                "eighths of the network lost",
                "relative to whole",
                tuple(lost),
                {"8 planes, planes lost": planes, "1 plane, spines lost": spines},
            ),
        ),
    )


def adaptive_routing() -> Study:
    """Ring collectives of 1,024 GPUs under hashed, static and adaptive routing [14].

    One plane, 128 nodes, leaves of 16, ring neighbours on different leaves; the mean over all rings
    of the slowest hop, for ten hash seeds.
    """
    sizes = (8, 4, 2)
    series = {
        "ECMP": [
            float(np.mean([ring_bandwidth(n, "ecmp", s) for s in range(10)])) / 1e9 for n in sizes
        ],
        "static": [ring_bandwidth(n, "static") / 1e9 for n in sizes],
        "adaptive": [ring_bandwidth(n, "adaptive") / 1e9 for n in sizes],
    }
    rows = tuple((n, *(values[i] for values in series.values())) for i, n in enumerate(sizes))
    return Study(
        "adaptive_routing",
        (14,),
        ("ring of", *(f"{name} GB/s" for name in series)),
        rows,
        (
            Panel(
                "Ring bandwidth, all groups at once",
                "GPUs in a ring",
                "GB/s",
                tuple(str(n) for n in sizes),
                series,
                bars=True,
            ),
        ),
    )


def traffic_priority() -> Study:
    """Expert exchange beside cache transfers on one NIC, with and without priorities [9].

    8 decode nodes exchange tokens while `k` prefill GPUs send caches to each decode GPU; max-min
    fair sharing against the exchange first.
    """
    decode, prefill, per_node = 8, 8, 8
    fabric = Fabric(nodes=decode + prefill)
    inner = all_to_all_by_rail(Fabric(nodes=decode), 1.0)
    remote = inner.source // per_node != inner.target // per_node
    exchange = Traffic(inner.source[remote], inner.target[remote], inner.bytes[remote])
    gpus = np.arange(decode * per_node)
    alone = max_min_rates(route(fabric, exchange), fabric.capacity).sum()
    streams, shares = (0, 1, 2, 4, 8), []
    for k in streams:
        source = (decode + np.arange(k)[:, None]) * per_node + gpus % per_node
        target = np.broadcast_to(gpus, source.shape)
        caches = Traffic(source.reshape(-1), target.reshape(-1), np.ones(source.size))
        rates = max_min_rates(route(fabric, exchange + caches), fabric.capacity)
        shares.append(float(rates[: exchange.source.size].sum() / alone))
    rows = tuple((k, share, 1.0, 1 / share) for k, share in zip(streams, shares))
    return Study(
        "traffic_priority",
        (9,),
        ("cache streams a GPU", "exchange rate, fair", "with priority", "exchange slows by"),
        rows,
        (
            Panel(
                "Expert exchange beside cache transfers",
                "cache streams to each GPU",
                "share of its own rate",
                streams,
                {"fair sharing": shares, "exchange first": [1.0] * len(streams)},
            ),
        ),
    )
