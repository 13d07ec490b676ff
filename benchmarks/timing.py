"""Times of a GPU's kernels with a cold L2 cache, by JAX or by torch, and what machine they are of.

Medians of CUPTI's kernel durations: launching does not count.
"""

import functools
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
import jax.numpy as jnp

REPEATS = 10
FLUSH_BYTES = 256 << 20  # several times the L2 cache
COPY_BYTES = 1 << 30


@functools.cache
def _flush() -> Callable[[], Any]:
    """A call that fills the L2 cache with something else, as exactly one kernel."""
    state = [jnp.zeros(FLUSH_BYTES // 4, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def flush():
        state[0] = add(state[0])
        return state[0]

    return flush


def microseconds(function: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Median time of the kernels that `function(*operands)` launches, with a cold L2 cache."""
    jax.block_until_ready((function(*operands), _flush()()))

    def calls():
        for _ in range(REPEATS):
            flushed = _flush()()
            out = function(*operands)
        jax.block_until_ready((flushed, out))

    return _kernel_microseconds(calls)


def _kernel_microseconds(calls: Callable[[], None]) -> float:
    """Median over REPEATS calls of the sum of kernel times after the flush that begins each."""
    from jax._src.lib import mosaic_gpu  # CUPTI has no public door in JAX

    cupti = mosaic_gpu._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        calls()
    finally:
        timings = cupti._cupti_get_timings(True)
    each, rest = divmod(len(timings), REPEATS)
    if rest or not each:
        raise RuntimeError(f"{len(timings)} kernels do not divide into {REPEATS} calls")
    milliseconds = [
        sum(time for _, time in timings[call * each + 1 : (call + 1) * each])
        for call in range(REPEATS)
    ]
    return 1e3 * statistics.median(milliseconds)


def microseconds_in_torch(call: Callable[[], Any]) -> float:
    """`microseconds` of the kernels that a call launches through torch."""
    import torch

    buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    call()
    torch.cuda.synchronize()

    def calls():
        for _ in range(REPEATS):
            buffer.add_(1)
            call()
        torch.cuda.synchronize()

    return _kernel_microseconds(calls)


def copy_rate() -> float:
    """TB/s of a copy of 1 GiB, counting what is read and what is written."""
    x = jnp.zeros(COPY_BYTES // 4, jnp.int32)
    negate = jax.jit(jnp.negative)  # a plain copy would be aliased away
    return 2 * COPY_BYTES / microseconds(negate, (x,)) / 1e6


def machine() -> str:
    """The first GPU, its clocks, power and temperature now, and JAX's version."""
    fields = "name,clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return f"{told[0]}, jax {jax.__version__}"
