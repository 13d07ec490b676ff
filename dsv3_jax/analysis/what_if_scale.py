"""A step of V3 on 8 to 16,384 devices: what it takes, and where it goes.

The run is configs/scale's: FSDP, experts over as many devices as there are up to 64, eight rows of
4,096 tokens a device in two micro-batches, everything computed again. Devices are the only thing
that changes, so that the step would last as long on any number of them if nothing travelled.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.analysis.estimate import estimate_step, weights_on_the_wire
from dsv3_jax.analysis.hardware import ACCELERATORS, Accelerator
from dsv3_jax.analysis.study import Panel, Study
from dsv3_jax.config import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    QuantConfig,
    ShardingConfig,
    TrainConfig,
)

DEVICES = tuple(2**n for n in range(3, 15))
ROWS, MICRO_BATCHES = 8, 2
GB200_DOMAIN = 64  # of 72 devices: its scale-out network has no sourced number


def scaled(device: Accelerator, devices: int) -> Config:
    """The run on so many devices."""
    experts = min(devices, 64)
    local = min(experts, 8)
    rows = ROWS * devices
    return Config(
        mesh=ParallelConfig(data=devices // experts, node=experts // local, local=local),
        sharding=ShardingConfig(state="fsdp"),
        train=TrainConfig(
            batch_size=rows, micro_batch_size=rows // MICRO_BATCHES, seq_len=4096, remat="full"
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        quant=QuantConfig(preset="fp8_paper" if device.fp8_flops > device.bf16_flops else "bf16"),
    )


def scale() -> Study:
    """Step time from 8 to 16,384 devices, in parts, and what a network twice as fast gives back."""
    rows, steps = [], {}
    for name in ("h200", "tpu-v5p", "gb200-nvl72"):
        device = ACCELERATORS[name]
        most = GB200_DOMAIN if device.scale_out_bandwidth is None else DEVICES[-1]
        for devices in (count for count in DEVICES if count <= most):
            config = scaled(device, devices)
            made = estimate_step(config, device)
            faster = dataclasses.replace(
                device,
                scale_up_bandwidth=2 * device.scale_up_bandwidth,
                scale_out_bandwidth=device.scale_out_bandwidth and 2 * device.scale_out_bandwidth,
            )
            gained = made.seconds / estimate_step(config, faster).seconds
            wire = made.parts["exchange on the wire"]
            weights = weights_on_the_wire(config, device)
            rows.append(
                (
                    name,
                    devices,
                    made.seconds,
                    made.seconds - wire - made.parts["weights and gradients on the wire"],
                    wire,
                    weights,
                    made.memory.total / 1e9,
                    made.memory.total <= device.hbm_bytes,
                    gained,
                )
            )
            steps.setdefault(name, []).append(made.seconds)
    x = tuple(f"{count // 1024}k" if count >= 1024 else str(count) for count in DEVICES)
    h200 = [row for row in rows if row[0] == "h200"]
    long = {name: values for name, values in steps.items() if len(values) == len(DEVICES)}
    return Study(
        "scale",
        (4, 5, 6),
        (
            "device",
            "devices",
            "step s",
            "compute s",
            "exchange s",
            "weights beside it s",
            "GB",
            "fits",
            "gain of twice the network",
        ),
        tuple(rows),
        (
            Panel("A step, 8 rows a device", "devices", "s", x, long, log=True),
            Panel(
                "H200: where the step goes",
                "devices",
                "s",
                x,
                {
                    "compute": [row[3] for row in h200],
                    "exchange": [row[4] for row in h200],
                    "weights, beside compute": [row[5] for row in h200],
                },
            ),
        ),
    )
