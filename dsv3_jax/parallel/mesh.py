"""The device mesh and where arrays live on it."""

import dataclasses
import logging

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig, UserError

log = logging.getLogger(__name__)

# Slowest link first.
AXES = tuple(f.name for f in dataclasses.fields(ParallelConfig))

# The axes over which a batch's sequences are spread.
TOKEN_AXES = ("data", "node", "local")

# Sizes above 1 that the model can use today.
USABLE_AXES = ("data",)


def make_mesh(config: ParallelConfig) -> Mesh:
    """A mesh of the first devices with all six named axes, any of size 1.

    Raises UserError, with the numbers, when the axes need more devices than there are, and when an
    axis that nothing is sharded over yet is larger than 1.
    """
    sizes = dataclasses.asdict(config)
    devices = jax.devices()
    larger = {axis: size for axis, size in sizes.items() if size > 1}
    if unusable := [f"mesh.{a}={n}" for a, n in larger.items() if a not in USABLE_AXES]:
        raise UserError(
            f"{', '.join(unusable)}: only {', '.join('mesh.' + a for a in USABLE_AXES)} may exceed "
            "1 in this version; nothing is sharded over the other axes"
        )
    if config.num_devices > len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in larger.items())
        raise UserError(
            f"the mesh needs {product} = {config.num_devices} devices, but there are "
            f"{len(devices)} ({devices[0].device_kind}): make an axis smaller, or use --devices "
            f"{config.num_devices} for virtual CPU devices"
        )
    if config.num_devices < len(devices):
        log.warning(
            "the mesh uses %d of %d devices: raise mesh.data to use more",
            config.num_devices,
            len(devices),
        )
    grid = np.array(devices[: config.num_devices]).reshape(tuple(sizes.values()))
    # make_mesh's default would be Explicit axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh, batch_dim: int) -> NamedSharding:
    """Dim `batch_dim` spread over the token axes, the rest on every device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, TOKEN_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
