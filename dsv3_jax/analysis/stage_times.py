"""What the acts of a pipeline's stage take, and the mean over the stages that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.parallel.timeline import Durations


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch in one stage; `compute` and `wire` by action (F, I, W)."""

    compute: dict[str, float]
    wire: dict[str, float]
    shares: dict[str, float]  # of matmul, attention, elementwise, recomputation in all compute

    def durations(self, paired: bool, transfer: float) -> Durations:
        """As the schedule's actions last; `paired` hides the wire of an FB pair behind compute."""
        each = {op: self.compute[op] + self.wire[op] for op in "FIW"}
        compute, wire = sum(self.compute.values()), sum(self.wire.values())
        pair = max(compute, wire) if paired else compute + wire
        return Durations(each["F"], each["I"], each["W"], pair, transfer)


def mean_of_stages(times: list[StageTimes]) -> StageTimes:
    """The mean of the stages a rank takes turns with; shares are weighted by compute."""

    def mean(name: str) -> dict[str, float]:
        groups = [getattr(t, name) for t in times]
        return {key: sum(g[key] for g in groups) / len(groups) for key in groups[0]}

    weights = [sum(t.compute.values()) for t in times]
    shares = {
        key: sum(w * t.shares[key] for w, t in zip(weights, times)) / sum(weights)
        for key in times[0].shares
    }
    return StageTimes(mean("compute"), mean("wire"), shares)
