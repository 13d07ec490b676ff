"""Which transport a mesh's experts get: what `auto` stands for, and what `pallas` needs."""

import ctypes
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import ExpertParallelConfig, UserError

log = logging.getLogger(__name__)

_HOPPER = "9.0"
_MEASURED = 4  # GPUs, at most, on which `pallas` was timed beside the others
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: over NVLink, not over PCIe


def resolve(mesh: Mesh | AbstractMesh, expert: ExpertParallelConfig) -> ExpertParallelConfig:
    """The config with a transport that this mesh can run in place of "auto".

    On GPUs that is what was faster on two and four H200s of one host, 4,096 tokens a GPU: `pallas`,
    where they can read each other. Dispatch and combine on four took it 1.20 ms in BF16
    (`allgather` 2.18, `padded` 2.41) and 1.04 with FP8 rows (1.71, 1.85; 2 x 2: 1.63, `padded`
    2.41), `ragged` 28 to 55; a training step of V3's layers 289 ms (`padded` 298), on two 287
    (293). Without `pallas` it is `allgather` in BF16 up to four GPUs, else `padded`. Where it was
    not measured (other platforms, more GPUs) it is `allgather` up to 8 devices and `padded` for
    more, which sends less. The choice is logged. Raises UserError where "pallas" was asked for and
    GPUs cannot do it.
    """
    if isinstance(mesh, AbstractMesh):
        return expert
    devices = list(mesh.devices.flat)
    peers = mesh.shape["local"] if expert.hierarchical else math.prod(_expert_sizes(mesh))
    spread = math.prod(_expert_sizes(mesh))
    on_gpus = devices[0].platform in ("gpu", "cuda")
    if expert.transport == "pallas":
        if on_gpus and peers > 1 and (reason := why_not_reading(mesh)):
            raise UserError(
                f"expert_parallel.transport='pallas': {reason}: use 'padded' or 'auto' instead"
            )
        return expert
    if expert.transport != "auto":
        return expert
    if spread == 1:
        return dataclasses.replace(expert, transport="local")
    small = spread <= (4 if on_gpus and expert.dispatch_format == "none" else 0 if on_gpus else 8)
    transport: Any = "allgather" if small else "padded"
    measured = on_gpus and peers > 1 and spread <= _MEASURED and expert.combine_format != "logfmt10"
    if measured and why_not_reading(mesh) is None:
        transport = "pallas"
    log.info("experts travel by %s", transport)
    return dataclasses.replace(expert, transport=transport)


def why_not_reading(mesh: Mesh) -> str | None:
    """Why these GPUs cannot read each other's rows by `kernels.peers`; None if they can."""
    devices = list(mesh.devices.flat)
    if mesh.shape.get("pipe", 1) > 1:  # Mosaic names the whole mesh to XLA
        return "XLA would hold the ranks of mesh.pipe at one barrier, and they come at other times"
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
        return f"it needs jax 0.11 or newer, and this is {jax.__version__}"
    capability = str(getattr(devices[0], "compute_capability", ""))
    if capability != _HOPPER:
        return f"it needs compute capability {_HOPPER} (Hopper), and this is {capability}"
    if len({device.process_index for device in devices}) > 1:
        return "its peers must be in one process, and the mesh is of several"
    ids = [device.id for device in devices]
    if ids != list(range(len(ids))):
        return f"its mesh must be of the first {len(ids)} devices in their order, and is {ids}"
    if devices[0] not in jax.devices():  # a program for other machines
        return None
    apart = unlinked([device.local_hardware_id for device in devices])
    if apart is not None:
        return f"GPUs {apart[0]} and {apart[1]} are not linked by NVLink, or may not access another"
    return None


def unlinked(ordinals: Sequence[int]) -> tuple[int, int] | None:
    """The first two of these GPUs that cannot read each other's memory over NVLink.

    None if all can, and where the driver cannot be asked.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    for a in ordinals:
        for b in ordinals:
            if a == b:
                continue
            access, atomics = ctypes.c_int(), ctypes.c_int()
            asked = (
                cuda.cuDeviceCanAccessPeer(ctypes.byref(access), a, b),
                cuda.cuDeviceGetP2PAttribute(ctypes.byref(atomics), _NATIVE_ATOMICS, a, b),
            )
            if asked == (0, 0) and not (access.value and atomics.value):
                return a, b
    return None


def _expert_sizes(mesh: Mesh) -> tuple[int, ...]:
    return mesh.shape["node"], mesh.shape["local"]
