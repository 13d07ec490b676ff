"""What every test runs under: eight virtual CPU devices, strict dtypes, one compilation cache."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# The kernels' tests run on a GPU with JAX_PLATFORMS=cuda,cpu ./run test tests/kernels
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# XLA spends most of a test run on compiling programs that run for milliseconds. Without its costly
# passes they compile four times as fast on jax 0.10 (11.3 -> 3.0 CPU seconds for a gradient), less
# so later, where the second switch is gone and an unknown flag would end the process. The flag is
# read once, and must not reach the processes that tests start.
xla_flags = os.environ.get("XLA_FLAGS")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{xla_flags or ''} --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import jaxtyping  # noqa: E402

from tests import signatures  # noqa: E402

signatures.install("dsv3_jax")

jax.config.update("jax_disable_most_optimizations", jax.config.jax_platforms == "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()
if xla_flags is None:
    os.environ.pop("XLA_FLAGS", None)
else:
    os.environ["XLA_FLAGS"] = xla_flags
# f32 meets bf16 only where the code says so.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A second run compiles nothing. `./run` names the folder; a bare pytest uses the same one.
if jax.config.jax_compilation_cache_dir is None:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache_home / "dsv3_jax" / "compiled"))
# The processes that tests start use it too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def what_signatures_check(request):
    """A test of what the package itself says of operands that do not fit gets past beartype."""
    disabled = jaxtyping.config.jaxtyping_disable
    misuse = bool(request.node.get_closest_marker("misuse"))
    jaxtyping.config.update("jaxtyping_disable", disabled or misuse)
    yield
    jaxtyping.config.update("jaxtyping_disable", disabled)


WORKER_BYTES, PROGRAMS_BYTES = 1.5e9, 10e9  # a process, and what all of them compile together


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`: a process for each core, or fewer where memory is short; told in a line."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's, of both kinds
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path("/sys/fs/cgroup", limit).read_text()))
    workers = max(1, min(cores, int((memory - PROGRAMS_BYTES) / WORKER_BYTES)))
    told = f"{workers} processes run the tests: {cores} cores, {memory / 1e9:.0f} GB of memory"
    needed = (PROGRAMS_BYTES + workers * WORKER_BYTES) / 1e9
    print(f"{told}, of which they take about {needed:.0f}; -n 1 for one", file=sys.stderr)
    return workers


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again and again.

    Tracing makes objects by the million, few of them in cycles: 4 % of a run went to looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """Marked tests skip where they cannot run, each with its reason (-ra shows them)."""
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = "takes minutes: run with --slow"
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        skips["oracle"] = f"needs {' and '.join(missing)}: pip install '.[oracle]'"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
