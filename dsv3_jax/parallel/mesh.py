"""The device mesh and where arrays live on it."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config, ParallelConfig, UserError
from dsv3_jax.parallel.hosts import host_of_each_process

log = logging.getLogger(__name__)

# Slowest link first.
AXES = tuple(f.name for f in dataclasses.fields(ParallelConfig))

# The axes over which a batch's sequences are spread.
TOKEN_AXES = ("data", "node", "local")


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first devices with all six named axes, any of size 1.

    Devices are JAX's, those of one host one after the other; or those given, in their order, which
    may be ones that programs are only compiled for (jax.experimental.topologies). Raises UserError,
    with the numbers, when the axes need more devices than there are, and for a pipeline; of JAX's
    devices also when a process would have none in the mesh, or a `local` group several hosts.
    Source: this project (docs/parallelism.md); axes go from the slowest link to the fastest.

    >>> import dsv3_jax as ds
    >>> ds.make_mesh(ds.ParallelConfig()).axis_names
    ('pipe', 'data', 'node', 'local', 'context', 'tensor')
    """
    sizes, given = dataclasses.asdict(config), devices is not None
    hosts = [] if given else host_of_each_process()
    if devices is None:
        # Processes may have been dealt out to the hosts in turn.
        devices = sorted(jax.devices(), key=lambda device: hosts.index(hosts[device.process_index]))
    larger = {axis: size for axis, size in sizes.items() if size > 1}
    if config.num_devices > len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in larger.items())
        raise UserError(
            f"the mesh needs {product} = {config.num_devices} devices, but there are "
            f"{len(devices)} ({devices[0].device_kind}): make an axis smaller, or use --devices "
            f"{config.num_devices} for virtual CPU devices"
        )
    if config.num_devices < len(devices) and not given:
        log.warning(
            "the mesh uses %d of %d devices: raise mesh.data to use more",
            config.num_devices,
            len(devices),
        )
    grid = np.array(devices[: config.num_devices]).reshape(tuple(sizes.values()))
    if not given:
        check_hosts(grid, hosts)
    # make_mesh's default would be Explicit axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill_mesh(config: Config, num_devices: int | None = None) -> Config:
    """`config` with mesh.data=0 replaced by the number of devices that the other axes leave.

    By fewer where those do not divide the sequences of a micro-batch. num_devices: those of JAX
    unless given, as when a program is compiled for devices that are not here.
    """
    mesh, train = config.mesh, config.train
    if mesh.data:
        return config
    available = len(jax.devices()) if num_devices is None else num_devices
    left, others = available // mesh.num_devices, mesh.node * mesh.local
    if config.expert_parallel.overlap:  # in halves
        others *= 2
    rows = train.micro_batch_size or train.batch_size
    data = max((n for n in range(1, left + 1) if rows % (n * others) == 0), default=1)
    return dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))


def check_hosts(grid: np.ndarray, host_of: Sequence[str]) -> None:
    """UserError unless each `local` group lies inside one host, and no process is left out.

    host_of names the host of every process. `local` is the fast link (NVLink, ICI), which experts
    rely on.
    """
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(grid)
    if idle := set(range(len(host_of))) - set(processes.ravel().tolist()):
        raise UserError(
            f"the mesh's {grid.size} devices leave processes {sorted(idle)} without one: use all "
            "devices, or start fewer processes"
        )
    local = AXES.index("local")
    groups = np.moveaxis(processes, local, -1).reshape(-1, grid.shape[local])
    split = next((g for g in groups.tolist() if len({host_of[p] for p in g}) > 1), None)
    if split is not None:
        names = sorted({host_of[int(process)].split(" ")[0] for process in split})
        per_host = grid.size // len(set(host_of))
        raise UserError(
            f"mesh.local={len(split)} groups devices of processes {sorted(set(split))}, which are "
            f"on several hosts ({', '.join(names)}), but must lie inside one, which has {per_host} "
            f"devices: make mesh.local x mesh.context x mesh.tensor divide {per_host}, and "
            "mesh.node larger"
        )


def batch_sharding(mesh: Mesh | AbstractMesh, batch_dim: int) -> NamedSharding:
    """Dim `batch_dim` spread over the token axes, the rest on every device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, TOKEN_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(array: jax.Array) -> Mesh:
    """The mesh that an array was placed on."""
    assert isinstance(array.sharding, NamedSharding), array.sharding
    mesh = array.sharding.mesh
    assert isinstance(mesh, Mesh)
    return mesh
