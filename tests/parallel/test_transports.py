"""Which transport a mesh gets, and which one it is refused."""

import ctypes
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, UserError
from dsv3_jax.parallel import transports


def mesh_of(monkeypatch, nodes=1, local=4, platform="gpu", **changes):
    """What `resolve` looks at of a mesh of Hopper GPUs, all of one process."""
    gpu = {"platform": platform, "compute_capability": "9.0", "process_index": 0}
    devices = [
        SimpleNamespace(id=i, local_hardware_id=i, **(gpu | changes)) for i in range(nodes * local)
    ]
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(transports, "unlinked", lambda ordinals: None)
    shape = {"node": nodes, "local": local}
    return SimpleNamespace(devices=np.array(devices, object), shape=shape)


def chosen(mesh, **options):
    return transports.resolve(mesh, ExpertParallelConfig(**options)).transport


def test_auto_takes_what_was_measured_to_be_fastest(monkeypatch):
    for nodes, local in ((1, 2), (1, 4), (2, 2)):
        for form in ("none", "fp8"):
            mesh = mesh_of(monkeypatch, nodes, local)
            assert chosen(mesh, transport="auto", dispatch_format=form) == "pallas"
    assert chosen(mesh_of(monkeypatch, 2, 4, "tpu"), transport="auto") == "allgather"
    assert chosen(mesh_of(monkeypatch, 4, 4, "tpu"), transport="auto") == "padded"
    assert chosen(mesh_of(monkeypatch, 1, 1), transport="auto") == "local"
    back = {"transport": "auto", "combine_format": "logfmt10"}
    assert chosen(mesh_of(monkeypatch), **back) == "allgather"
    assert chosen(mesh_of(monkeypatch, 4, 1), transport="auto") == "allgather"
    assert chosen(mesh_of(monkeypatch, 1, 8), transport="auto") == "padded"
    stages = mesh_of(monkeypatch)
    stages.shape["pipe"] = 2
    assert chosen(stages, transport="auto") == "allgather"
    ampere = mesh_of(monkeypatch, compute_capability="8.0")
    assert chosen(ampere, transport="auto") == "allgather"
    assert chosen(ampere, transport="auto", dispatch_format="fp8") == "padded"


def test_a_transport_named_is_kept_or_refused(monkeypatch):
    mesh = mesh_of(monkeypatch)
    for name in ("pallas", "padded", "ragged", "allgather"):
        assert chosen(mesh, transport=name) == name
    assert chosen(mesh_of(monkeypatch, platform="cpu"), transport="pallas") == "pallas"

    def refused(mesh):
        with pytest.raises(UserError) as error:
            chosen(mesh, transport="pallas")
        return str(error.value)

    older = mesh_of(monkeypatch, compute_capability="8.0")
    assert "compute capability 9.0 (Hopper), and this is 8.0: use 'padded'" in refused(older)
    stages = mesh_of(monkeypatch)
    stages.shape["pipe"] = 2
    assert "ranks of mesh.pipe" in refused(stages)
    mesh = mesh_of(monkeypatch)
    mesh.devices[3].process_index = 1
    assert "must be in one process" in refused(mesh)
    mesh = mesh_of(monkeypatch)
    mesh.devices[:] = mesh.devices[::-1].copy()
    assert "first 4 devices in their order, and is [3, 2, 1, 0]" in refused(mesh)
    mesh = mesh_of(monkeypatch)
    monkeypatch.setattr(transports, "unlinked", lambda ordinals: (0, 3))
    assert "GPUs 0 and 3 are not linked by NVLink" in refused(mesh)
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert "jax 0.11 or newer, and this is 0.10.2" in refused(mesh)


def test_the_driver_is_asked_about_every_pair(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceCanAccessPeer(self, answer, a, b):
            answer._obj.value = 1
            return 0

        def cuDeviceGetP2PAttribute(self, answer, attribute, a, b):
            assert attribute == 3
            answer._obj.value = (a, b) != (1, 2)
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert transports.unlinked([0, 1]) is None
    assert transports.unlinked([0, 1, 2]) == (1, 2)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert transports.unlinked([0, 1]) is None
