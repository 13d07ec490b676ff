"""A kernel compiled as a program of its own, which another process loads.

jaxlib keeps each compiled kernel by the hash of Mosaic's program until the process ends, and an
executable that is loaded puts its kernels there (jaxlib/mosaic/gpu/custom_call.cc,
`GetOrCreateKernel`). So a process that has loaded this program need not compile the kernel for
another one: 0.75 s, one at a time. What is loaded is dropped at once, and never runs: code comes
to a GPU when a program first does.

What decides the binary is in its name: the kernel's hash, versions, XLA's flags, and the devices as
JAX writes them down, which says the compute capability and the host's CPU.
"""

import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dsv3_jax.kernels import kept_files, lowered_name
from dsv3_jax.kernels.lowered_form import Lowered, call_lowered

# Packages that a compiled kernel is made by: jax, its plugins, ptxas and libdevice.
_MAKERS = re.compile(r"jax|jaxlib|jax-cuda.*|nvidia-(cuda-nvcc|nvvm|nvjitlink).*")


@dataclass(frozen=True)
class Alone:
    """A kernel to compile, as another process is told it.

    Fields:
        operands, results: (shape, dtype) of each.
        topology: devices that it is compiled for, as `attached` wrote them down.
        folder: where it is left.
    """

    kernel: Lowered
    operands: tuple[tuple[tuple[int, ...], Any], ...]
    results: tuple[tuple[tuple[int, ...], Any], ...]
    topology: bytes
    folder: Path

    @functools.cached_property
    def name(self) -> str:
        """All that decides the binary."""
        devices = hashlib.sha256(self.topology).hexdigest()
        return "\n".join(["compiled", self.kernel.hash.hex(), devices, makers()])

    @property
    def file(self) -> Path:
        """Where it is left, under its name."""
        return kept_files.place(self.folder, self.name)


def alone(kernel: Lowered, operands: Any, results: Any, topology: bytes, folder: Path) -> Alone:
    """The kernel for operands and results of these types."""
    return Alone(kernel, _types(operands), _types(results), topology, folder)


def _types(arrays: Any) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return tuple((tuple(x.shape), np.dtype(x.dtype)) for x in arrays)


@functools.cache
def makers() -> str:
    """Versions of what compiles kernels, and its settings."""
    found = {(x.name, x.version) for x in importlib.metadata.distributions() if x.name}
    versions = sorted(x for x in found if _MAKERS.fullmatch(x[0].lower().replace("_", "-")))
    flags = os.environ.get("XLA_FLAGS", "")
    return "\n".join([repr(versions), flags, repr(lowered_name.mosaic_settings())])


def attached() -> bytes:
    """The GPUs of this process, as JAX writes devices down for another one."""
    attached: Any = topologies.get_attached_topology("cuda")  # not serialised before jax 0.11
    return attached.serialize()


@functools.cache
def _devices(topology: bytes) -> Sequence[Any]:
    # An empty description loads CUDA's compiler, without which no other one can be read.
    topologies.get_topology_desc(platform="cuda", target_config="", topology="1x1x1")
    of: Any = topologies.TopologyDescription
    return of.deserialize(topology).devices


def compile_alone(asked: Alone) -> bytes:
    """The executable of a program that is one call of the kernel; no GPU is needed for it."""
    _find_runtime()
    where = SingleDeviceSharding(_devices(asked.topology)[0])
    operands = [jax.ShapeDtypeStruct(*x, sharding=where) for x in asked.operands]
    results = tuple(jax.ShapeDtypeStruct(*x) for x in asked.results)
    call = jax.jit(functools.partial(call_lowered, asked.kernel, results))
    executable: Any = call.trace(*operands).lower().compile().runtime_executable()
    return executable.serialize()


def leave(asked: Alone) -> None:
    """Compiles the kernel and leaves it in its file, if no other process has."""
    if not asked.file.exists():
        kept_files.write(asked.file, kept_files.sealed(asked.name, compile_alone(asked)))


def left(asked: Alone) -> bytes:
    """The executable in the file; ValueError where it is damaged, or another kernel's."""
    name, executable = kept_files.opened(asked.file.read_bytes())
    if name != asked.name:
        raise ValueError("it is of another kernel")
    return executable


def load(executable: bytes, device: Any) -> None:
    """Puts the executable's kernels where this process looks for them, and runs nothing.

    What JAX loads a program by, from the folder of compiled ones, has no public name (jax 0.11).
    """
    from jaxlib import xla_client

    _find_runtime()
    options = xla_client.CompileOptions()
    ids = np.array([[device.id]], np.int32)
    options.device_assignment = xla_client.DeviceAssignment.create(ids)
    devices = xla_client.DeviceList((device,))
    device.client.deserialize_executable(executable, devices, options)


def _find_runtime() -> None:
    """Tells jaxlib where what kernels are linked with lies, as importing Pallas for GPUs does.

    Not when this module is imported: a process without a GPU would begin later.
    """
    import jax.experimental.pallas.mosaic_gpu  # noqa: F401
