"""Kernels compiled alone, as other processes do for a first start, by the compiler for GPUs."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from dsv3_jax.compiling import targets
from dsv3_jax.kernels import backend, compiled_alone, kept_files, lowered_form, lowering_process
from dsv3_jax.kernels.compiled_alone import alone

pytestmark = pytest.mark.skipif(
    targets.missing("gpu") is not None, reason="the compiler for GPUs is not here"
)


@pytest.fixture(scope="module")
def h200():
    return targets.devices_of(targets.parse_topology("h200:1x1"))


@pytest.fixture(scope="module")
def topology(h200) -> bytes:
    """As a process with a GPU writes down what it has."""
    return topologies.TopologyDescription(h200).serialize()


@pytest.fixture
def quantizer(h200, topology, tmp_path, monkeypatch):
    """A kernel that XLA gets in a program, as others are told it."""
    told = []
    monkeypatch.setattr(kept_files, "folder", lambda: None)
    monkeypatch.setattr(lowered_form, "on_emit", [lambda *args: told.append(args)])
    how = {"implementation": "pallas_gpu"}

    def quantized(x):
        return backend.run("dsv3_jax.kernels.fused", "quantize_blocks", x, **how)

    with backend.compiling_for(h200[0]):
        traced = jax.jit(quantized).trace(jax.ShapeDtypeStruct((128, 256), jnp.float32))
    traced.lower(lowering_platforms=("cuda",))
    ((kernel, operands, results),) = told
    return alone(kernel, operands, results, topology, tmp_path / "kernels")


def test_another_process_leaves_the_kernel_under_its_hash(quantizer):
    """In the executable, which is what loading it is for."""
    processes = lowering_process.Processes(1)
    answer = processes.submit(pickle.dumps(quantizer), first=False)
    assert answer.result(timeout=120) == ""
    executable = compiled_alone.left(quantizer)
    # The file is packed (snappy), which may take four bytes of the hash from elsewhere: a third of
    # it stands there in one piece whatever else is written, such as a folder's name.
    name = quantizer.kernel.hash
    assert any(name[i : i + 10] in executable for i in range(len(name) - 9))
    assert not any(name[::-1][i : i + 10] in executable for i in range(len(name) - 9))
    assert executable.count(b"\x7fELF") >= 1  # the host's function, or the GPU's
    assert len(executable) < 1e6
    with pytest.raises(jax.errors.JaxRuntimeError):  # not by a CPU, but as an error
        compiled_alone.load(executable, jax.devices("cpu")[0])


def test_what_cannot_be_compiled_is_an_answer(quantizer, tmp_path):
    wrong = alone(quantizer.kernel, [], [], b"no devices", tmp_path)
    answer = lowering_process.Processes(1).submit(pickle.dumps(wrong), first=False)
    assert "Error" in answer.result(timeout=120)
