"""What all kernels for TPUs share: whether they can run here, and the interpreter."""

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from typing import Any

from dsv3_jax.kernels import backend

pltpu: Any = importlib.import_module("jax.experimental.pallas.tpu")

# Finite, and below every logit: a row that has seen no key yet must not become NaN.
LOWEST = -1e30

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreting(**params: Any) -> Iterator[None]:
    """Inside, kernels are traced for Pallas's TPU interpreter, on any machine."""
    token = _interpreting.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)):
            yield
    finally:
        _interpreting.reset(token)


def interpreted() -> bool:
    """Whether the kernel being traced is for Pallas's interpreter."""
    return _interpreting.get()


def require() -> None:
    """Raises NotImplementedError, saying why, unless these kernels can be compiled and run."""
    if backend.platform() != "tpu" and not interpreted():
        raise NotImplementedError(f"needs a TPU, and this is for {backend.platform()!r}")
