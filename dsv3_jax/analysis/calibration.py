"""An efficiency that a measured rate of training implies."""

from dsv3_jax.analysis.estimate import DEFAULT_EFFICIENCY, Efficiency, estimate_step
from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.config import Config, UserError


def calibrate(
    config: Config,
    device: Accelerator,
    measured_tokens_per_second: float,
    schedule: str = "1f1b",
    source: str = "calibrated",
) -> Efficiency:
    """The default Efficiency times the one factor that makes `estimate_step` give the measurement.

    Found by bisection, as exchange and bubble do not scale with it. UserError when even full
    efficiency is slower than what was measured, or the measurement is not positive.
    """
    if not measured_tokens_per_second > 0:
        raise UserError(f"{measured_tokens_per_second=} must be positive")

    def rate(factor: float) -> float:
        scaled = DEFAULT_EFFICIENCY.scaled(factor, source)
        return estimate_step(config, device, schedule, scaled).tokens_per_second

    low, high = 1e-6, 1 / min(DEFAULT_EFFICIENCY.matmul, DEFAULT_EFFICIENCY.attention)
    if rate(high) < measured_tokens_per_second:
        raise UserError(
            f"measured {measured_tokens_per_second:,.0f} tokens/s exceed the "
            f"{rate(high):,.0f} that {device.name} reaches at full efficiency: check its peaks"
        )
    for _ in range(26):  # to 1e-6 of the factor
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rate(middle) < measured_tokens_per_second else (low, middle)
    return DEFAULT_EFFICIENCY.scaled(high, source)
