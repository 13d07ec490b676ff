"""What the parts of bench_multi_gpu share: options, devices, timing and compiling side by side."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too
# A program that uses NVLink multicast can put a shared host's GPUs out of service.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("node", "local")
COMPILING = 8  # programs at once


@dataclass(frozen=True)
class Options:
    """The words of the command line."""

    parts: list[str]
    part: str
    seconds: float
    cache: str
    virtual: int
    tokens: list[int] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    devices: list[int] = field(default_factory=list)
    beside: bool = False


def begin(virtual: int = 0, cache: str = "") -> None:
    """Sets JAX up, before its first use: virtual CPU devices, a folder for compiled programs."""
    if virtual:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", virtual)
        jax.config.update("jax_disable_most_optimizations", True)  # to compile takes the time
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def kernel_by_kernel() -> dict[str, Any]:
    """Compiler options with which a profile knows each kernel's operation: no command buffers."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


def mesh_of(nodes: int = 1) -> Mesh:
    """All devices as `nodes` x the rest."""
    devices = np.array(jax.devices()).reshape(nodes, -1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def seconds_of(function: Callable[..., Any], *operands: Any, quick: bool = False) -> float:
    """A call's time among several in a row, the median of groups."""
    calls, groups = (2, 2) if quick else (20, 5)
    for _ in range(2):
        jax.block_until_ready(function(*operands))
    times = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*operands)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def compile_all(programs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """The result of each function, or the exception that it raised; several at once."""

    def guarded(build):
        try:
            return build()
        except Exception as error:  # told in the program's line
            return error

    start = time.monotonic()
    with ThreadPoolExecutor(COMPILING) as pool:
        built = dict(zip(programs, pool.map(guarded, programs.values()), strict=True))
    print(f"{len(built)} programs compiled in {time.monotonic() - start:.0f} s", flush=True)
    return built


def failure(error: Exception) -> str:
    """One line about a program that could not be compiled or run."""
    return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:240]}"
