"""Shards: what was written is read back across files, and damage is named."""

import json

import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.data.shards import (
    INDEX_FILE,
    DamagedShards,
    ShardWriter,
    TokenShards,
    atomic_folder,
    check_vocab,
)
from dsv3_jax.data.tokenizer import ByteTokenizer


def write(folder, documents, tokens_per_shard=7, vocab_size=261):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, tokenizer, tokens_per_shard)
    for ids in documents:
        writer.add(np.asarray(ids, np.int32), text_bytes=len(ids))
    return writer.close()


@pytest.fixture
def folder(tmp_path):
    """20 tokens in files of 7, 7 and 6."""
    write(tmp_path / "shards", [range(5), range(5, 17), [], range(17, 20)])
    return tmp_path / "shards"


def edit_index(folder, **changes):
    values = json.loads((folder / INDEX_FILE).read_text())
    shard = {k: changes.pop(k) for k in ("file", "tokens") if k in changes}
    values["shards"][0].update(shard)
    (folder / INDEX_FILE).write_text(json.dumps({**values, **changes}))


def test_slices_cross_the_borders_of_files(folder):
    shards = TokenShards(folder)
    assert len(shards) == shards.index.tokens == 20
    assert [s.tokens for s in shards.index.shards] == [7, 7, 6]
    assert (shards.index.documents, shards.index.text_bytes) == (4, 20)
    assert shards.num_bytes == 40
    for start in range(21):
        for stop in range(start, 21):
            found = shards.slice(start, stop)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, np.arange(start, stop))


@pytest.mark.parametrize("start, stop", [(-1, 3), (5, 4), (15, 21)])
def test_a_slice_beyond_the_tokens_is_refused(folder, start, stop):
    with pytest.raises(ValueError, match="not within the 20"):
        TokenShards(folder).slice(start, stop)


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_the_smallest_dtype_that_fits_is_used(tmp_path, vocab_size, dtype):
    index = write(tmp_path / "s", [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert index.dtype == dtype
    assert TokenShards(tmp_path / "s").slice(1, 2) == vocab_size - 1


def test_where_files_are_cut_does_not_change_the_stream(tmp_path):
    documents = [np.arange(i, i + 9) for i in range(11)]
    streams = []
    for size in (1, 4, 1000):
        write(tmp_path / str(size), documents, tokens_per_shard=size)
        shards = TokenShards(tmp_path / str(size))
        streams.append(shards.slice(0, len(shards)).tolist())
    assert streams[0] == streams[1] == streams[2] == np.concatenate(documents).tolist()


def test_a_flipped_bit_is_found_by_verify(folder):
    path = folder / "tokens-00001.bin"
    TokenShards(folder).verify()
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedShards, match=r"tokens-00001\.bin does not hold what was written"):
        TokenShards(folder).verify()


def test_of_a_large_corpus_some_files_are_verified_and_others_the_next_time(folder):
    raw = bytearray((folder / "tokens-00001.bin").read_bytes())
    raw[3] ^= 1
    (folder / "tokens-00001.bin").write_bytes(raw)
    found = set()
    for _ in range(200):
        try:
            found.add(TokenShards(folder).verify(max_bytes=14))
        except DamagedShards:
            found.add("damaged")
    assert found == {1, 2, "damaged"}  # files of 14, 14 and 12 bytes: one of 14, or 12 and 14
    assert TokenShards(folder).verify(max_bytes=0) == 0


def test_an_id_beyond_the_vocabulary_is_refused_where_it_enters(folder):
    path = folder / "tokens-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 0x80  # 8 becomes 32776
    path.write_bytes(raw)
    shards = TokenShards(folder)
    assert shards.slice(0, 8).tolist() == list(range(8))
    with pytest.raises(DamagedShards, match=r"tokens-00001\.bin holds the id 32776.* has 261"):
        shards.slice(5, 12)


def test_a_linked_file_from_elsewhere_is_not_read(folder, tmp_path):
    (folder / "tokens-00000.bin").rename(tmp_path / "elsewhere")
    (folder / "tokens-00000.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside its folder"):
        TokenShards(folder)


def test_a_truncated_or_missing_file_is_named(folder):
    path = folder / "tokens-00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedShards, match=r"tokens-00002\.bin has 11 bytes, not 12"):
        TokenShards(folder)
    path.unlink()
    with pytest.raises(DamagedShards, match=r"tokens-00002\.bin is missing"):
        TokenShards(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 99}, "format 99; this version reads 1"),
        ({"dtype": "float64"}, "dtype='float64' is not 'uint16' or 'uint32'"),
        ({"file": "../tokens-00000.bin"}, "not a bare file name"),
        ({"tokens": -7}, "not a count"),
        ({"tokens": 7.5}, r"shards\[0\]\.tokens=7\.5 is not an integer"),
        ({"tokens": 1 << 63}, r"shards\[0\]\.tokens=9223372036854775808 is not an integer of 64"),
        ({"vocab_size": "261"}, "vocab_size='261' is not an integer"),
        ({"vocab_size": 1 << 40}, "vocab_size=1099511627776 is not in"),
        ({"file": "tokens-00001.bin"}, "a file is listed twice"),
        ({"file": "a\0b"}, "not a bare file name"),
        ({"file": "é" * 200}, "not a bare file name"),
        ({"shards": 3}, "shards=3 is not a list"),
        ({"surprise": 1}, "not a shard index"),
    ],
)
def test_an_index_that_we_would_not_write_is_refused(folder, changes, message):
    edit_index(folder, **changes)
    with pytest.raises(UserError, match=message):
        TokenShards(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "[" * 100_000])
def test_a_damaged_index_is_named(folder, content):
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(DamagedShards, match=r"index\.json: not a shard index"):
        TokenShards(folder)


def test_a_folder_without_an_index_is_no_shard_folder(tmp_path):
    with pytest.raises(DamagedShards, match=r"no index\.json"):
        TokenShards(tmp_path)


def test_a_model_with_too_small_a_vocabulary_is_refused(folder):
    index = TokenShards(folder).index
    check_vocab(261, index.vocab_size, index.tokenizer)
    with pytest.raises(UserError, match=r"byte.*261 ids.*model\.vocab_size=260.*=261 or more"):
        check_vocab(260, index.vocab_size, index.tokenizer)


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_folder(tmp_path / "a" / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["out", "whole"]


@pytest.mark.parametrize("changes", [{"documents": 2}, {"text_bytes": 1 << 40}, {"tokenizer": "x"}])
def test_counts_that_no_file_shows_are_sealed(folder, changes):
    edit_index(folder, **changes)
    with pytest.raises(DamagedShards, match="does not hold what was written"):
        TokenShards(folder)
    edit_index(folder, seal=None)  # as folders of before
    assert TokenShards(folder).index.seal is None


def test_more_documents_than_tokens_are_refused(folder):
    edit_index(folder, documents=1 << 50)
    with pytest.raises(
        DamagedShards, match=r"documents=1125899906842624, but there are \d+ tokens"
    ):
        TokenShards(folder)
