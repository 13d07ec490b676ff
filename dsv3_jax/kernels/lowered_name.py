"""The name of a lowered kernel: all that decides what Mosaic makes of it, as text.

Two kernels that differ must have two names; where that is not certain there is no name. What the
source of this package holds counts as it is in its files.
"""

import contextvars
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOMS = ("kernels", "quantization")  # of this package, that decide a kernel: they import no other
_PACKAGE = Path(__file__).parent.parent
# Options of JAX that say where it runs and what it writes.
_OF_NO_KERNEL = re.compile(
    "cache|log|platform|distributed|cross_host|devices|transfer|profile|pgle"
)


def apart(function: Callable[[], Any]) -> Any:
    """function(), in a thread of its own: of what is in scope it sees our context variables."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, function).result()


def world() -> str:
    """All that decides every kernel: versions, our source and where it lies, settings."""
    return "\n".join([source(), repr(settings()), repr(mosaic_settings())])


def settings() -> list[tuple[str, Any]]:
    """JAX's, as they are in a thread that has none of its own; not those that decide no kernel."""
    config: Any = jax.config
    values = apart(lambda: sorted(config.values.items()))
    return [(name, value) for name, value in values if not _OF_NO_KERNEL.search(name)]


@functools.cache
def source() -> str:
    """What decides every kernel in this process: versions, and our source, by its digest."""
    digest = hashlib.sha256(str(_PACKAGE).encode())
    for room in ROOMS:
        for file in sorted((_PACKAGE / room).rglob("*.py")):
            digest.update(str(file.relative_to(_PACKAGE)).encode() + file.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
    return "\n".join([*versions, sys.version, digest.hexdigest()])


def mosaic_settings() -> dict[str, str]:
    """Mosaic's, which are variables of the environment."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("MOSAIC_GPU_")}


def of_device(device: Any) -> str:
    """What kernels are told of a device."""
    names = ("platform", "device_kind", "compute_capability", "num_cores", "core_count")
    return repr({name: str(getattr(device, name, None)) for name in names})


def described(value: Any) -> str:
    """A text that two values share only if kernels cannot tell them apart; TypeError if unknown."""
    of = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{of}.{value.name}"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    # Before arrays: a `BlockScaled` has a shape and a dtype, too.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, described(getattr(value, f.name))) for f in dataclasses.fields(value)]
        return f"{of}{fields}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array: Any = value
        ref = "Ref" if isinstance(value, jax.Ref) else "array"
        weak = getattr(value, "weak_type", False)
        return f"{ref} {np.dtype(array.dtype)} {tuple(array.shape)} {weak}"
    if isinstance(value, Mapping):
        return f"{of}{sorted((described(k), described(v)) for k, v in value.items())}"
    if isinstance(value, tuple | list):
        return f"{of}{list(map(described, value))}"
    if isinstance(value, type | np.dtype):
        return str(np.dtype(value))
    raise TypeError(f"{of} says not what it is made of")
