"""A fixture that makes tiny Hugging Face checkpoints."""

import dataclasses

import pytest

from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf


@pytest.fixture
def make_hf(tmp_path):
    """make_hf(dtype, name=..., shards=..., **fields) -> (folder, config, tensors)."""

    def make(dtype: str, name: str = "hf", shards: int = 3, scale_fmt=None, **fields):
        config = dataclasses.replace(TINY, **fields)
        tensors = hf_tensors(config, dtype)
        folder = write_hf(tmp_path / name, config, tensors, shards=shards, scale_fmt=scale_fmt)
        return folder, config, tensors

    return make
