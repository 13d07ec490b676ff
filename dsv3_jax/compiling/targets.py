"""Clusters that programs are compiled for without being there: their names and their devices.

XLA compiles for a described topology. For GPUs the description is of one GPU, from its data sheet,
and of how many there are; TPU compilers know their own by name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from typing import Any

from dsv3_jax.analysis.hardware import ACCELERATORS, Accelerator, nearest
from dsv3_jax.config import UserError

# By the name before the colon: the accelerator of analysis/hardware.py, and how its sizes are read.
GPUS = {"h100": "h100", "h200": "h200"}
TPUS = {"v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "tpu7x": "tpu-7x"}
_DIMS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_DEVICES_PER_CHIP = {"tpu7x": 2}
_KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
EXAMPLES = (
    "h200:256x8 (hosts x GPUs of each), h100:32x8, v5p:8x16x16 and tpu7x:4x4x8 (chips of a "
    "torus), v6e:16x16, v5e:16x16"
)

# One Hopper GPU as XLA's `GpuTargetConfigProto`. On a machine with the GPU, XLA_FLAGS=--xla_dump_to
# writes the same; what differs between the two is filled in from their data sheets.
_HOPPER = """gpu_device_info {{
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{kind}"
"""


@dataclass(frozen=True)
class Target:
    """Devices that a program is compiled for.

    Fields:
        name: as it was asked for, "h200:256x8".
        platform: "gpu" or "tpu".
        sizes: hosts and GPUs of each, or chips along each dim of the torus.
        num_devices: of JAX's; a TPU7x chip is two.
        accelerator: what one device has.
    """

    name: str
    platform: str
    sizes: tuple[int, ...]
    num_devices: int
    accelerator: Accelerator


def parse_topology(name: str) -> Target:
    """The target of a name such as "h200:256x8" or "v5p:8x16x16"; UserError lists what there is."""
    kind, _, rest = name.partition(":")
    if kind not in GPUS and kind not in TPUS:
        raise UserError(
            f"unknown topology {name!r}: {nearest(kind, [*GPUS, *TPUS])}. Examples: {EXAMPLES}"
        )
    dims = 2 if kind in GPUS else _DIMS[kind]
    if not re.fullmatch(r"[1-9]\d{0,5}" + r"x[1-9]\d{0,5}" * (dims - 1), rest):
        raise UserError(
            f"topology {name!r} must be {kind}: and {dims} sizes with an x between them. "
            f"Examples: {EXAMPLES}"
        )
    sizes = tuple(int(size) for size in rest.split("x"))
    count = _DEVICES_PER_CHIP.get(kind, 1)
    for size in sizes:
        count *= size
    platform = "gpu" if kind in GPUS else "tpu"
    return Target(name, platform, sizes, count, ACCELERATORS[{**GPUS, **TPUS}[kind]])


def install_line(platform: str) -> str:
    """What installs the compiler for a platform, of this jax's version."""
    version = importlib.metadata.version("jax")
    if platform == "tpu":
        return f"pip install 'jax[tpu]=={version}'"
    return f"pip install 'jax[cuda13-local]=={version}' 'nvidia-cuda-nvcc<14' 'nvidia-nvvm<14'"


def missing(platform: str) -> str | None:
    """Why programs cannot be compiled for this platform here, and what to install; None if so."""
    module, extra = {"gpu": ("jax_cuda13_plugin", "aot-gpu"), "tpu": ("libtpu", "aot-tpu")}[
        platform
    ]
    if importlib.util.find_spec(module) is not None:
        return None
    return (
        f"compiling for a {platform.upper()} needs the extra {extra}: pip install "
        f"'dsv3_jax[{extra}]', or: {install_line(platform)}"
    )


def devices_of(target: Target) -> list[Any]:
    """The target's devices, described; UserError where the compiler is missing or refuses them.

    JAX itself runs on the CPU from then on: its CUDA plugin asks the driver for GPUs otherwise.
    """
    if reason := missing(target.platform):
        raise UserError(reason)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked about TPUs
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    toolkit = "/usr/local/cuda/bin"
    if target.platform == "gpu" and not shutil.which("ptxas") and os.path.isdir(toolkit):
        os.environ["PATH"] += os.pathsep + toolkit
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        if target.platform == "tpu":
            return list(topologies.get_topology_desc(target.name, platform="tpu").devices)
        of_gpu = _HOPPER.format(
            bandwidth=target.accelerator.hbm_bandwidth,
            memory=target.accelerator.hbm_bytes,
            kind=_KINDS[target.name.split(":")[0]],
        )
        shape = "x".join(map(str, (1, *target.sizes)))
        described = topologies.get_topology_desc(
            platform="cuda", target_config=of_gpu, topology=shape
        )
        return list(described.devices)
    except Exception as error:
        raise UserError(f"topology {target.name!r}: {error}") from error
