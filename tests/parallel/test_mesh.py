"""The mesh: its axes, and what it says when the devices do not suffice."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dsv3_jax.config import ParallelConfig, UserError
from dsv3_jax.parallel.mesh import AXES, USABLE_AXES, batch_sharding, make_mesh, replicated


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


@pytest.mark.parametrize("axis", [a for a in AXES if a not in USABLE_AXES])
def test_an_axis_that_shards_nothing_is_refused(axis):
    with pytest.raises(UserError, match=rf"mesh\.{axis}=2: only mesh\.data"):
        make_mesh(ParallelConfig(**{axis: 2}))
