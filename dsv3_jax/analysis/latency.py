"""Closed forms of time: expert exchange, decode ceiling, MTP gain, pipeline bubbles, MFU.

What the ISCA paper computes on the back of an envelope, as functions. Bandwidths are one-way bytes
a second, times seconds. `estimate` puts them together for a whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

FP8_TILE = 128  # values that share a scale
DEEPEP_HEADER_BYTES = 16  # DeepEP low-latency dispatch: source index and padding


@dataclass(frozen=True)
class NetworkLatency:
    """End-to-end time of a 64-byte message: endpoints + one `per_switch` for each switch passed.

    A leaf is one switch away, another leaf three. The two numbers of a network's row in the ISCA
    paper's table 5 determine both unknowns; nothing is left to check against.
    """

    endpoints: float
    per_switch: float

    @classmethod
    def from_measurements(cls, same_leaf: float, cross_leaf: float) -> NetworkLatency:
        """The split that gives `same_leaf` over one switch and `cross_leaf` over three."""
        per_switch = (cross_leaf - same_leaf) / 2
        return cls(same_leaf - per_switch, per_switch)

    def over(self, switches: int) -> float:
        """Seconds through `switches` switches: 1 within a leaf, 3 over two layers, 5 over three."""
        return self.endpoints + switches * self.per_switch


# ISCA paper, table 5 (CPU side, 64 bytes).
INFINIBAND = NetworkLatency.from_measurements(2.8e-6, 3.7e-6)
ROCE = NetworkLatency.from_measurements(3.6e-6, 5.6e-6)
NVLINK_SECONDS = 3.33e-6


def fp8_message_bytes(hidden: int) -> int:
    """Bytes of one dispatched token: E4M3 values, an f32 scale per 128, DeepEP's header."""
    return hidden + hidden // FP8_TILE * 4 + DEEPEP_HEADER_BYTES


def logfmt_message_bytes(hidden: int, bits: int = 10) -> int:
    """Bytes of one combined token in LogFMT: packed codes, and (amax, amin) in BF16 per 128.

    9,184 for V3's 7,168 values at 10 bits, against 14,336 in BF16 (DeepEP internode_ll.cu).
    """
    return hidden * bits // 8 + hidden // FP8_TILE * 4


def ep_exchange_seconds(
    tokens: int,
    destinations: float,
    hidden: int,
    bandwidth: float,
    dispatch_bytes: float = 1.0,
    combine_bytes: float = 2.0,
    latency: float = 0.0,
) -> float:
    """Seconds of one dispatch and one combine of `tokens` tokens a device (ISCA paper, 2.3.2).

    `destinations` counts devices a token is sent to (V3: 8 routed + 1 shared = 9); `*_bytes` are
    bytes a value; `latency` is paid twice, once each way. 120.96e-6 for 32 tokens, 7000 values and
    50 GB/s.
    """
    bytes_sent = (dispatch_bytes + combine_bytes) * tokens * destinations * hidden
    return bytes_sent / bandwidth + 2 * latency


@dataclass(frozen=True)
class DecodeCeiling:
    """What is left when compute costs nothing: time per output token bound by the exchange."""

    exchange: float  # one micro-batch, one layer, both ways
    layer: float  # two micro-batches take turns on the wire
    tpot: float
    tokens_per_second: float  # of one request


def decode_ceiling(exchange: float, layers: int = 61) -> DecodeCeiling:
    """The best TPOT two overlapped micro-batches reach, all compute hidden (ISCA paper, 2.3.2)."""
    layer = 2 * exchange
    return DecodeCeiling(exchange, layer, layers * layer, 1 / (layers * layer))


def dual_micro_batch_seconds(compute: float, exchange: float) -> float:
    """Time of one layer for two micro-batches, where one computes while the other communicates.

    `compute` and `exchange` are per micro-batch and layer. Steady state: whichever resource is
    busier sets the pace, 2 * max(compute, exchange) (ISCA paper, 2.3.1).
    """
    return 2 * max(compute, exchange)


def mtp_speedup(acceptance: float, depth: int = 1, step_overhead: float = 0.0) -> float:
    """Tokens a step over plain decoding, when each drafted token is accepted with `acceptance`.

    1 + p + ... + p^depth tokens a step, each step `step_overhead` (a fraction) longer. The papers
    see 80 to 90 % and 1.8 times the tokens a second.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"{acceptance=} must lie in [0, 1]")
    return sum(acceptance**i for i in range(depth + 1)) / (1 + step_overhead)


def bubble_seconds(
    schedule: str, ranks: int, forward: float, backward: float, weight: float, pair: float
) -> float:
    """The published idle time a rank (V3 report, table 2); `backward` includes `weight`.

    `pair` is an overlapped forward and backward. For DualPipeV `ranks` counts pipeline stages, two
    of which share a device. Eager and interleaved 1F1B have 1F1B's formula (Narayanan et al., arXiv
    2104.04473, section 2.2) with the times of one of a rank's two stages.
    """
    if schedule in ("1f1b", "eager_1f1b", "interleaved"):
        return (ranks - 1) * (forward + backward)
    if schedule == "zb1p":
        return (ranks - 1) * (forward + backward - 2 * weight)
    if schedule in ("dualpipe", "dualpipev"):
        return (ranks / 2 - 1) * (pair + backward - 3 * weight)
    raise ValueError(
        f"{schedule=} has no published formula: use 1f1b, eager_1f1b, interleaved, zb1p, dualpipe "
        "or dualpipev"
    )


def mfu(tokens_per_second: float, flops_per_token: float, devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: useful FLOPs a second over what the devices could do at peak.

    The papers divide by the BF16 peak, although most matmuls run in FP8.
    """
    return tokens_per_second * flops_per_token / (devices * peak_flops)
