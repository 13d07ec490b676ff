"""The first cell of a notebook: what is missing in one message, what runs it, where its files go.

    from dsv3_jax.notebook import start

    folder = start()

It works in any folder where dsv3_jax is installed: nothing is read from or written to the folder
that the notebook lies in.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from dsv3_jax.config import UserError

# Beside JAX, what the notebooks import; the extra `notebook` brings them.
NEEDED = ("matplotlib",)


class NotebookError(UserError):
    """A UserError that IPython shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"error: {self}"]


def start(devices: int | None = None) -> Path:
    """A fresh folder for what the notebook writes; prints in a line or two what it runs on.

    Products of float32 are exact from then on, on GPUs and TPUs, too.

    devices: run on this many virtual CPU devices, whatever else the machine has; None: on what JAX
    finds. To be called before anything else uses JAX.

    Raises NotebookError, one line in a notebook, when a package of the extra is missing, or when
    JAX already runs on other devices than were asked for (restart the kernel then).
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotebookError(
            f"the notebooks need {', '.join(missing)}: open them with ./run notebook, or "
            "pip install 'dsv3_jax[notebook]' where this kernel runs"
        )
    folder = Path(tempfile.mkdtemp(prefix="dsv3_jax-notebook-"))
    _use_cache(folder)
    import jax

    if devices is not None:
        _use_devices(jax, devices)
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 9})
    found = jax.devices()
    _multiply_exactly(jax, found[0].platform)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"jax {jax.__version__} on {len(found)} x {found[0].device_kind}; {cores} CPU cores")
    if cores == 1 and found[0].platform == "cpu":
        print("One core: cells that train take about twice as long as they say.")
    return folder


def _multiply_exactly(jax, platform: str) -> None:
    """Has products of float32 numbers made in float32, whatever the device, and says where."""
    from dsv3_jax.parallel.compiler_options import rounded_operands

    if rounded := rounded_operands(platform, "float32"):
        jax.config.update("jax_default_matmul_precision", "highest")
        print(f"Products of float32 numbers are exact here as on a CPU; XLA would take {rounded}.")


def _use_cache(folder: Path) -> None:
    """Puts caches into `folder` where the home folder cannot be written, and says so."""
    from dsv3_jax.data.corpus import default_cache_dir

    # ~/.cache may be another user's where the home folder is one's own, and may not be there yet.
    caches = default_cache_dir()
    there = next(path for path in (caches, *caches.parents) if path.exists())
    home = [] if os.environ.get("XDG_CACHE_HOME") else [Path(os.environ.get("HOME") or Path.home())]
    closed = next((path for path in (*home, there) if not _takes_files(path)), None)
    if closed is not None:
        cache = folder / "cache"
        cache.mkdir()
        print(f"{closed} cannot be written: caches go to {cache}, for this notebook alone.")
        os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = str(cache)
    import jax

    config: Any = jax.config  # its options are attributes that types do not know
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in it; permissions do not tell, least of all to root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _use_devices(jax, devices: int) -> None:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        pass  # JAX runs already; perhaps on just these
    found = jax.devices()
    if len(found) != devices or found[0].platform != "cpu":
        raise NotebookError(
            f"JAX already runs on {len(found)} x {found[0].device_kind}: restart the kernel, and "
            f"run this cell first (it asks for {devices} virtual CPU devices)"
        )
