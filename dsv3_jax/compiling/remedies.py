"""What makes a program take less memory, cheapest first, in the options that `compile` is given."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dsv3_jax.compiling.programs import Serving
from dsv3_jax.config import Config

_STRONGER = {"none": "v3", "dots": "v3", "v3": "full"}


class Remedy(NamedTuple):
    """One change: the option that makes it, what it costs, and what is compiled with it."""

    option: str
    costs: str
    config: Config
    serving: Serving | None = None


def of_training(config: Config) -> list[Remedy]:
    """Changes that a training step may be given, those that cost the least time first."""
    found = []

    def offer(option: str, costs: str, group: str, **fields: object) -> None:
        changed = dataclasses.replace(getattr(config, group), **fields)
        candidate = dataclasses.replace(config, **{group: changed})
        if not candidate.problems():
            found.append(Remedy(option, costs, candidate))

    if config.optimizer.moment_dtype == "float32":
        offer(
            "--optimizer.moment-dtype bfloat16",
            "rounds the moments, as the paper does",
            "optimizer",
            moment_dtype="bfloat16",
        )
    if config.sharding.state != "fsdp" and config.mesh.num_devices > 1:
        offer(
            "--sharding.state fsdp",
            "gathers weights in every micro-batch",
            "sharding",
            state="fsdp",
        )
    if config.micro_batch_size % 2 == 0:
        half = config.micro_batch_size // 2
        offer(
            f"--train.micro-batch-size {half}",
            "twice as many gathers of weights, of half the tokens",
            "train",
            micro_batch_size=half,
        )
    if config.train.remat in _STRONGER:
        stronger = _STRONGER[config.train.remat]
        offer(
            f"--train.remat {stronger}",
            "computes more of the forward pass twice",
            "train",
            remat=stronger,
        )
    return found


def of_serving(config: Config, what: Serving, decode: bool) -> list[Remedy]:
    """Changes that a serving program may be given, cheapest first.

    A cache in FP8 is one of decoding alone; half the sequences must spread over the devices.
    """
    found = []
    if not what.fp8_weights:
        smaller = dataclasses.replace(what, fp8_weights=True)
        found.append(Remedy("--fp8-weights True", "weights as published", config, smaller))
    if decode and not what.fp8_cache:
        smaller = dataclasses.replace(what, fp8_cache=True)
        found.append(Remedy("--fp8-cache True", "rounds the latents", config, smaller))
    mesh = config.mesh
    if what.batch % (2 * mesh.data * mesh.node * mesh.local) == 0:
        half = dataclasses.replace(what, batch=what.batch // 2)
        found.append(Remedy(f"--batch {half.batch}", "half the sequences", config, half))
    return found
