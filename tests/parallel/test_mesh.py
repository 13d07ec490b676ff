"""The mesh: its axes, and what it says when the devices do not suffice."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dsv3_jax.config import Config, ParallelConfig, TrainConfig, UserError
from dsv3_jax.parallel import mesh as mesh_module
from dsv3_jax.parallel.mesh import (
    AXES,
    batch_sharding,
    check_hosts,
    fill_mesh,
    make_mesh,
    replicated,
)


def test_the_mesh_has_all_axes_slowest_link_first():
    mesh = make_mesh(ParallelConfig(data=4))
    assert mesh.axis_names == AXES == ("pipe", "data", "node", "local", "context", "tensor")
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [d.id for d in mesh.devices.ravel()] == [0, 1, 2, 3]


def test_a_batch_is_spread_and_weights_are_not():
    mesh = make_mesh(ParallelConfig(data=4))
    rows = jax.device_put(np.zeros((3, 8, 5)), batch_sharding(mesh, batch_dim=1))
    assert {s.data.shape for s in rows.addressable_shards} == {(3, 2, 5)}
    weights = jax.device_put(np.zeros((7, 5)), replicated(mesh))
    assert {s.data.shape for s in weights.addressable_shards} == {(7, 5)}


def test_a_mesh_larger_than_the_devices_spells_the_numbers_out():
    with pytest.raises(UserError) as error:
        make_mesh(ParallelConfig(data=16))
    assert "needs data 16 = 16 devices, but there are 8 (cpu)" in str(error.value)
    assert "--devices 16" in str(error.value)


def test_idle_devices_are_reported(caplog):
    make_mesh(ParallelConfig(data=2))
    assert "the mesh uses 2 of 8 devices: raise mesh.data" in caplog.text
    caplog.clear()
    make_mesh(ParallelConfig(data=8))
    assert not caplog.text


def test_given_devices_are_taken_in_their_order(caplog):
    devices = jax.devices()[6:1:-1]
    mesh = make_mesh(ParallelConfig(data=2, tensor=2), devices)
    assert mesh.devices.ravel().tolist() == devices[:4] and not caplog.records
    with pytest.raises(UserError, match=r"needs data 8 = 8 devices, but there are 5"):
        make_mesh(ParallelConfig(data=8), devices)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the check of hosts looks at."""

    process_index: int


def devices_of(processes, *, node, local):
    """A device of each of these processes, in the order of the mesh."""
    grid = np.empty(len(processes), object)
    grid[:] = [Device(p) for p in processes]
    return grid.reshape(1, 1, node, local, 1, 1)


def test_local_groups_lie_inside_one_host():
    check_hosts(devices_of([0, 0, 1, 1], node=2, local=2), ["a", "b"])
    check_hosts(devices_of([0, 0, 1, 1], node=4, local=1), ["a", "b"])
    with pytest.raises(UserError, match=r"mesh\.local=4 groups .* of processes \[0, 1\].*\(a, b\)"):
        check_hosts(devices_of([0, 0, 1, 1], node=1, local=4), ["a", "b"])


def test_a_host_may_have_a_process_for_each_device():
    check_hosts(devices_of([0, 1, 2, 3], node=2, local=2), ["a", "a", "b", "b"])
    with pytest.raises(UserError, match=r"processes \[1, 2\].* lie inside one, which has 2 dev"):
        check_hosts(devices_of([0, 3, 1, 2], node=2, local=2), ["a", "a", "b", "a"])


def test_devices_of_a_host_are_neighbours_in_the_mesh(monkeypatch):
    """Eight processes dealt out to two hosts in turn."""
    devices = [Device(process) for process in range(8)]
    monkeypatch.setattr(mesh_module, "host_of_each_process", lambda: ["a", "b"] * 4)
    monkeypatch.setattr(mesh_module, "Mesh", lambda grid, *_, **__: grid)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    grid = make_mesh(ParallelConfig(node=2, local=4))
    of_host = [[device.process_index for device in row] for row in grid.reshape(2, 4)]
    assert of_host == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_process_without_a_device_is_refused():
    with pytest.raises(UserError, match=r"4 devices leave processes \[2\] without one"):
        check_hosts(devices_of([0, 0, 1, 1], node=2, local=2), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("rows", "mesh", "data"),
    [
        (16, ParallelConfig(data=0), 8),  # all 8
        (16, ParallelConfig(data=0, tensor=2), 4),  # those that tensor leaves
        (16, ParallelConfig(data=0, local=2), 4),
        (6, ParallelConfig(data=0), 6),  # 8 do not divide 6 rows
        (5, ParallelConfig(data=0, tensor=4), 1),
        (16, ParallelConfig(data=2), 2),  # what was asked for
    ],
)
def test_data_0_takes_the_devices_that_are_left_and_divide_the_rows(rows, mesh, data):
    config = Config(mesh=mesh, train=TrainConfig(batch_size=rows))
    assert fill_mesh(config).mesh == dataclasses.replace(mesh, data=data)
    assert fill_mesh(config).validate().mesh.num_devices <= 8


def test_data_0_is_filled_for_devices_that_are_not_here():
    config = Config(mesh=ParallelConfig(data=0, local=2), train=TrainConfig(batch_size=64))
    assert fill_mesh(config, 64).mesh.data == 32
