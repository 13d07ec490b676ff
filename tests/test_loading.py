"""Loading for inference: a device is given its own part, a folder is opened once."""

import dataclasses

import jax
import numpy as np
import pytest

import infer
from dsv3_jax import loading
from dsv3_jax.config import ParallelConfig, UserError
from dsv3_jax.interop import checkpoint, name_map
from dsv3_jax.interop import load as loader
from dsv3_jax.model.placement import shardings
from dsv3_jax.quantization.block_scaled import BlockScaled
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

# Wide enough for the embedding, the head and a layer's experts to outweigh what lies everywhere.
WIDE = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    vocab_size=4096,
    moe_intermediate_size=512,
    num_attention_heads=4,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
)
MESH = ParallelConfig(node=2, local=2, tensor=2)


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("hf") / request.param
    return write_hf(place, WIDE, hf_tensors(WIDE, request.param), shards=2)


def bytes_on(device, arrays) -> int:
    """Bytes of the arrays' parts there; a shard is an array, too, and the same bytes."""
    shards = [part.data for array in arrays for part in array.addressable_shards]
    there = (data for data in shards if data.devices() == {device})
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in there}.values())


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_no_device_ever_holds_more_than_its_part(folder, fp8, monkeypatch):
    monkeypatch.setattr(loader, "HOST_BYTES", 1 << 16)  # larger parts grow on their devices
    before = {id(array) for array in jax.live_arrays()}
    device, peak, largest = jax.devices()[0], 0, 0

    def watched(self, index, rows_a_unit, read, put=loader._Growing.put):
        nonlocal peak, largest
        put(self, index, rows_a_unit, read)
        fresh = [array for array in jax.live_arrays() if id(array) not in before]
        peak = max(peak, bytes_on(device, fresh))
        largest = max(largest, 4 * int(np.prod(self.dims)))

    monkeypatch.setattr(loader._Growing, "put", watched)
    model = loading.load(folder, mesh=MESH, fp8=fp8)
    arrays = jax.tree.leaves(model.variables)
    part, whole = bytes_on(device, arrays), sum(array.nbytes for array in arrays)
    assert part < 0.5 * whole
    assert peak <= part + largest  # a piece that is on its way
    expected = shardings(model.variables, model.layout)
    for array, where in zip(arrays, jax.tree.leaves(expected), strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)


def test_a_mesh_loads_the_numbers_of_one_device(folder):
    one, mesh = (loading.load(folder, mesh=m, fp8=True).variables for m in (None, MESH))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(mesh), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    blocks = jax.tree.leaves(mesh, is_leaf=lambda node: isinstance(node, BlockScaled))
    assert any(isinstance(node, BlockScaled) for node in blocks)


@pytest.mark.slow
def test_a_folder_is_opened_once_and_its_names_listed_once(folder, monkeypatch, capsys):
    opened = []
    open_hf = checkpoint.open_hf
    monkeypatch.setattr(checkpoint, "open_hf", lambda f: opened.append(f) or open_hf(f))
    name_map._places.cache_clear()
    argv = ["--checkpoint", str(folder), "--token-ids", "1,2", "--max-new-tokens", "1", "--fp8"]
    assert infer.main(argv) == 0
    assert len(opened) == 1
    assert name_map._places.cache_info().misses == 1
    assert capsys.readouterr().out


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(folder):
    with pytest.raises(UserError, match="n_routed_experts"):
        loading.load(folder, mesh=ParallelConfig(local=3))
    with pytest.raises(UserError, match="no such folder"):
        loading.load(folder / "nothing")
    with pytest.raises(UserError, match=r"--step 3: .* is no run"):
        loading.load(folder, step="3")
