"""What the ISCA paper's hardware recommendations would be worth, where a model can say.

One function a study, some of them in `what_if_fabric`; each returns a `Study` with a table and
panels to draw. Numbers in brackets are the items of the paper's list of recommendations, counted in
the order of its sections 3.1.2 to 6.6; docs/codesign.md says which of the 22 no model here can
weigh. None of the paper's recommendations comes with a figure for its gain, so nothing here is
compared with the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dsv3_jax.analysis import latency
from dsv3_jax.analysis.estimate import DEFAULT_EFFICIENCY, estimate_step
from dsv3_jax.analysis.hardware import ACCELERATORS
from dsv3_jax.analysis.model_cost import DEEPSEEK_V3, expected_groups_hit
from dsv3_jax.analysis.study import Panel, Study
from dsv3_jax.analysis.what_if_fabric import adaptive_routing, planes_lost, traffic_priority
from dsv3_jax.analysis.what_if_scale import scale
from dsv3_jax.config import Config, OptimizerConfig, ParallelConfig, QuantConfig, TrainConfig

H800 = ACCELERATORS["h800"]
NIC = 50e9
D, LAYERS = DEEPSEEK_V3.hidden_size, DEEPSEEK_V3.num_hidden_layers
DESTINATIONS = 9  # 8 routed experts and the shared one, each on a device of its own
TOKENS = 32  # a device and micro-batch, as in the paper's section 2.3.2

# V3's own training run (V3 report, section 4.2), the base of the training studies.
V3_RUN = Config(
    mesh=ParallelConfig(pipe=16, data=2, node=8, local=8),
    train=TrainConfig(batch_size=15360, micro_batch_size=128, seq_len=4096, remat="dots"),
    quant=QuantConfig(preset="fp8_paper"),
    optimizer=OptimizerConfig(moment_dtype="bfloat16"),
)


def native_accumulation() -> Study:
    """What promoting partial sums to FP32 costs Hopper, and what not promoting would [1, 2].

    Error: the emulated accumulator (32 products aligned to the largest, 13 fraction bits, the rest
    cut off) on random E4M3-like numbers, K = 4096, against float64. Work: one multiply-add on CUDA
    cores (66.9 TFLOPS, H100 SXM datasheet) for each output and interval, over Tensor-core time.
    """
    intervals = (4096, 1024, 512, 256, 128, 64, 32)
    errors = [100 * _accumulation_error(n) for n in intervals]
    cuda_flops = 66.9e12
    share = [100 * H800.fp8_flops / cuda_flops / n for n in intervals]
    rows = tuple(zip(intervals, errors, share))
    x = tuple(str(n) for n in intervals)
    return Study(
        "native_accumulation",
        (1, 2),
        ("promotion interval", "relative error %", "CUDA-core time % of Tensor-core time"),
        rows,
        (
            Panel(
                "Error of an FP22 sum, K = 4096",
                "products between promotions",
                "%",
                x,
                {"mean relative error": errors},
                log=True,
            ),
            Panel(
                "Work of promotion",
                "products between promotions",
                "% of Tensor-core time",
                x,
                {"CUDA cores": share},
                log=True,
            ),
        ),
    )


def _accumulation_error(interval: int, outputs: int = 128, terms: int = 4096) -> float:
    """Mean |error| over mean |sum| of an FP22 accumulator promoted every `interval` products."""
    rng = np.random.default_rng(0)
    a, b = (_round_fraction(rng.standard_normal((outputs, terms)), 3, np.round) for _ in range(2))
    products = a * b
    exact = products.sum(axis=1)
    total, register = np.zeros(outputs), np.zeros(outputs)
    for start in range(0, terms, 32):
        group = np.concatenate([register[:, None], products[:, start : start + 32]], axis=1)
        _, exponent = np.frexp(np.abs(group).max(axis=1, keepdims=True))
        step = np.ldexp(1.0, exponent - 1 - 13)
        register = _round_fraction((np.trunc(group / step) * step).sum(axis=1), 13, np.trunc)
        if (start + 32) % interval == 0:
            total, register = total + register, np.zeros(outputs)
    return float(np.abs(total + register - exact).mean() / np.abs(exact).mean())


def _round_fraction(x: np.ndarray, bits: int, rounding: Callable[..., np.ndarray]) -> np.ndarray:
    """`x` with `bits` fraction bits after the leading one."""
    mantissa, exponent = np.frexp(x)
    scale = 2.0 ** (bits + 1)
    return np.ldexp(rounding(mantissa * scale) / scale, exponent)


def _ceiling_ms(
    row_bytes: float, bandwidth: float, tokens: int = TOKENS, wait: float = 0.0
) -> float:
    """TPOT in ms when the exchange of `row_bytes` a token and destination is all there is."""
    exchange = tokens * DESTINATIONS * row_bytes / bandwidth + wait
    return latency.decode_ceiling(exchange, LAYERS).tpot * 1e3


def logfmt_in_network() -> Study:
    """The decode ceiling when the network compresses the combine [3, 20].

    Endpoints stay BF16; only bytes on the wire change, encoding is free. The paper's 50 to 100 %
    software overhead is left out, as it does not say of what.
    """
    combine = {
        "BF16": 2 * D,
        "LogFMT-10": latency.logfmt_message_bytes(D, 10),
        "LogFMT-8": latency.logfmt_message_bytes(D, 8),
    }
    sent = latency.fp8_message_bytes(D)
    slow = [_ceiling_ms(sent + bytes_, NIC) for bytes_ in combine.values()]
    fast = [_ceiling_ms(sent + bytes_, 900e9) for bytes_ in combine.values()]
    rows = tuple(
        (name, bytes_, s, slow[0] / s, f)
        for (name, bytes_), s, f in zip(combine.items(), slow, fast)
    )
    return Study(
        "logfmt_in_network",
        (3, 20),
        ("combine", "bytes a token", "TPOT ms, 50 GB/s", "gain", "TPOT ms, 900 GB/s"),
        rows,
        (
            Panel(
                "Decode ceiling, 50 GB/s",
                "combine format",
                "TPOT, ms",
                tuple(combine),
                {"CX7": slow},
                bars=True,
            ),
            Panel(
                "Decode ceiling, 900 GB/s",
                "combine format",
                "TPOT, ms",
                tuple(combine),
                {"NVL72": fast},
                bars=True,
            ),
        ),
    )


def in_network_collectives() -> Study:
    """NIC bytes a token when switches replicate dispatches and add up combines [7, 19].

    EP64 on 8 nodes with V3's node limit; bytes to and from one NIC, dispatch of one micro-batch
    overlapping the combine of the other. The busier direction sets the time.
    """
    model = DEEPSEEK_V3
    experts, chosen = model.n_routed_experts, model.num_experts_per_tok
    remote = 7 / 8
    copies = {
        "copy per expert": chosen * remote,
        "copy per GPU": expected_groups_hit(experts, 64, chosen) * remote,
        "copy per node, then NVLink": expected_groups_hit(experts, 8, chosen, 4) * remote,
    }
    sent, back = latency.fp8_message_bytes(D), 2 * D
    traffic = {}
    for name, n in copies.items():
        traffic[name] = (n * (sent + back), n * (sent + back))
    for name in ("copy per GPU", "copy per node, then NVLink"):
        n = copies[name]
        traffic[f"switch: {name}"] = (sent + n * back, n * sent + back)
    rows = tuple(
        (name, out / 1e3, into / 1e3, max(out, into) / NIC * 1e6)
        for name, (out, into) in traffic.items()
    )
    kb = np.array([[row[1], row[2]] for row in rows])
    return Study(
        "in_network_collectives",
        (7, 19),
        ("who copies", "sent KB", "received KB", "us a token"),
        rows,
        (
            Panel(
                "One NIC, dispatch and combine at once",
                "",
                "KB a token",
                ("expert", "GPU", "node", "switch\nto GPU", "switch\nto node"),
                {"sent": kb[:, 0].tolist(), "received": kb[:, 1].tolist()},
                bars=True,
            ),
        ),
    )


def unified_fabric() -> Study:
    """V3's training step when communication leaves the SMs, and when both networks are one [4-6].

    Today 20 of 132 SMs move tokens (V3 report, section 3.2.2), and a NIC has a quarter of NVLink's
    bandwidth. Kernel efficiencies as assumed in `Efficiency`: read the differences.
    """
    free = dataclasses.replace(DEFAULT_EFFICIENCY, exchange_units=0.0)
    joined = dataclasses.replace(H800, scale_out_bandwidth=H800.scale_up_bandwidth)
    cases = {
        "today": (H800, DEFAULT_EFFICIENCY),
        "SMs freed": (H800, free),
        "SMs freed, one network of 200 GB/s": (joined, free),
    }
    schedules = ("1f1b", "dualpipe")
    steps = {
        name: [estimate_step(V3_RUN, device, s, eff).seconds for s in schedules]
        for name, (device, eff) in cases.items()
    }
    base = steps["today"]
    rows = tuple(
        (name, one, base[0] / one, dual, base[1] / dual) for name, (one, dual) in steps.items()
    )
    return Study(
        "unified_fabric",
        (4, 5, 6),
        ("network", "1F1B step s", "gain", "DualPipe step s", "gain"),
        rows,
        (
            Panel(
                "V3 on 2,048 H800: training step",
                "",
                "seconds",
                ("1F1B", "DualPipe"),
                steps,
                bars=True,
            ),
        ),
    )


def network_latency() -> Study:
    """The decode ceiling against the batch with each network's latency added [13, 15].

    Two messages a layer and micro-batch, across leaves (InfiniBand 3.7 us, RoCE 5.6 us, ISCA table
    5), FP8 dispatch and BF16 combine at 50 GB/s.
    """
    batches = (1, 2, 4, 8, 16, 32, 64, 128)
    waits = {
        "no latency": 0.0,
        "InfiniBand": 2 * latency.INFINIBAND.over(3),
        "RoCE": 2 * latency.ROCE.over(3),
    }
    row = latency.fp8_message_bytes(D) + 2 * D
    series = {
        name: [_ceiling_ms(row, NIC, tokens=b, wait=wait) for b in batches]
        for name, wait in waits.items()
    }
    rows = tuple(
        (b, *(series[name][i] for name in waits), series["RoCE"][i] / series["InfiniBand"][i])
        for i, b in enumerate(batches)
    )
    return Study(
        "network_latency",
        (13, 15),
        ("tokens a device", *(f"TPOT ms, {name}" for name in waits), "RoCE over InfiniBand"),
        rows,
        (
            Panel(
                "Decode ceiling, 50 GB/s",
                "tokens a device and micro-batch",
                "TPOT, ms",
                batches,
                series,
                log=True,
            ),
        ),
    )


def ordered_memory() -> Study:
    """The decode ceiling with and without the sender's fence before each flag [8, 18].

    Write, fence, flag: the flag leaves one round trip after the data, so a message takes three
    one-way latencies. With ordering at the receiver (region acquire/release) it takes one.
    """
    row = latency.fp8_message_bytes(D) + 2 * D
    cases = []
    for tokens in (4, 16, 32, 64):
        for name, network in (("InfiniBand", latency.INFINIBAND), ("RoCE", latency.ROCE)):
            one_way = network.over(3)
            fenced = _ceiling_ms(row, NIC, tokens, wait=2 * 3 * one_way)
            ordered = _ceiling_ms(row, NIC, tokens, wait=2 * one_way)
            cases.append((tokens, name, fenced, ordered, fenced / ordered))
    gains = {
        name: [case[4] for case in cases if case[1] == name] for name in ("InfiniBand", "RoCE")
    }
    return Study(
        "ordered_memory",
        (8, 18),
        ("tokens a device", "network", "TPOT ms, fence", "TPOT ms, ordered", "gain"),
        tuple(cases),
        (
            Panel(
                "Gain from ordering without a fence",
                "tokens a device and micro-batch",
                "times faster (ceiling)",
                ("4", "16", "32", "64"),
                gains,
                bars=True,
            ),
        ),
    )


STUDIES: dict[str, Callable[[], Study]] = {
    study.__name__: study
    for study in (
        native_accumulation,
        logfmt_in_network,
        in_network_collectives,
        unified_fabric,
        planes_lost,
        network_latency,
        adaptive_routing,
        traffic_priority,
        ordered_memory,
        scale,
    )
}
