"""Matrices that are read and written a few rows at a time are the same, wherever they lie."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.interop import load as loading
from dsv3_jax.interop.checkpoint import open_checkpoint
from dsv3_jax.interop.load import abstract_leaves, load
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.placement import shardings
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from tests.cases import matrix
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

# More than one block of rows in most matrices.
MESH = {"data": 2, "local": 2}
MODEL = dataclasses.replace(TINY, hidden_size=320, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("hf") / "m", MODEL, hf_tensors(MODEL, "fp8"))
    return open_checkpoint(folder)


@pytest.mark.parametrize("dtype, axes", matrix(["bf16", "fp8"], [MESH, {}]), ids=str)
def test_pieces_make_the_whole(checkpoint, monkeypatch, dtype, axes):
    want = load(checkpoint, dtype=dtype)
    mesh = make_mesh(ParallelConfig(**axes), jax.devices()[: 4 if axes else 1])
    layout = make_layout(mesh, ShardingConfig(state="fsdp"), ExpertParallelConfig())
    places = shardings(abstract_leaves(checkpoint, dtype), layout, stored=True)
    monkeypatch.setattr(loading, "HOST_BYTES", 0)
    monkeypatch.setattr(loading, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(loading, "ON_THE_WAY_BYTES", 100_000)
    read, was = [], loading._rows
    monkeypatch.setattr(loading, "_rows", lambda *a: [read.append(a[1:3]), was(*a)][1])
    found = load(checkpoint, dtype=dtype, shardings=places)
    assert max(map(read.count, read)) > 2  # pieces of one matrix
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, MESH], ids=str)
def test_fp8_made_of_pieces_is_fp8_made_of_the_whole(tmp_path, monkeypatch, caplog, axes):
    """No stack is there in BF16, and numbers that are not finite are told as ever."""
    tensors = hf_tensors(MODEL, "bf16")
    broken = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    broken[5, 7] = np.nan
    checkpoint = open_checkpoint(write_hf(tmp_path / "m", MODEL, tensors))
    want = to_fp8_weights(
        load(checkpoint, dtype="bf16"), dataclasses.replace(MODEL, dtype="bfloat16")
    )
    mesh = make_mesh(ParallelConfig(**axes), jax.devices()[: 4 if axes else 1])
    layout = make_layout(mesh, ShardingConfig(state="fsdp"), ExpertParallelConfig())
    places = shardings(abstract_leaves(checkpoint, "fp8"), layout, stored=True)
    monkeypatch.setattr(loading, "HOST_BYTES", 0)
    monkeypatch.setattr(loading, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1)
    rows, was = [], loading.quantize_rows
    monkeypatch.setattr(loading, "quantize_rows", lambda x, f: [rows.append(len(x)), was(x, f)][1])
    caplog.clear()
    found = load(checkpoint, dtype="fp8", shardings=places)
    assert max(rows) == 128 and "experts.3.down_proj.weight (1)" in caplog.text
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    raw = load(checkpoint, dtype="fp8", shardings=places, as_bytes=True)
    for ours, theirs in zip(jax.tree.leaves(raw), jax.tree.leaves(found), strict=True):
        assert ours.dtype == (np.uint8 if theirs.dtype.itemsize == 1 else theirs.dtype)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
