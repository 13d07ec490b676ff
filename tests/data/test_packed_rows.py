"""Whole documents in rows: every one once an epoch, nothing but a long one cut, targets kept."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.data.packed_rows import PADDING, PackedRows, pack
from dsv3_jax.data.shards import DamagedShards, ShardWriter, TokenShards
from dsv3_jax.data.tokenizer import ByteTokenizer

LENGTHS = (5, 9, 3, 12, 7, 2, 9, 30, 4)
PAD = 257


@pytest.fixture
def shards(tmp_path) -> TokenShards:
    """Documents of LENGTHS tokens, numbered in their first token; every second token a target."""
    writer = ShardWriter(tmp_path, ByteTokenizer(), tokens_per_shard=16, supervised=True)
    for number, length in enumerate(LENGTHS):
        ids = np.arange(length, dtype=np.int32)
        ids[0] = number + 100
        writer.add(ids, length, targets=ids % 2 == 1)
    writer.close()
    return TokenShards(tmp_path)


@hypothesis.given(st.lists(st.integers(1, 32), max_size=80))
def test_every_document_lies_in_one_row_that_holds_it(lengths):
    rows = pack(lengths, 32)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= 32 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 32) + 1 + len([n for n in lengths if n > 16])


def test_an_epoch_shows_every_document_whole_once(shards):
    rows = PackedRows(shards, 12, seed=3, pad_id=PAD)
    seen = []
    for epoch in range(2):
        batch = rows.host_rows(epoch * rows.num_windows, range(rows.num_windows))
        found = []
        for tokens, targets, segments in zip(*batch):
            for segment in range(1, segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                ids, number = tokens[places], tokens[places[0]] - 100
                assert np.array_equal(ids[1:], np.arange(1, LENGTHS[number]))
                assert np.array_equal(targets[places][1:], ids[1:] % 2 == 1)
                assert not targets[places[0]]  # nothing in the row predicts it
                found.append(int(number))
            assert (tokens[segments == PADDING] == PAD).all()
            assert not targets[segments == PADDING].any()
        assert sorted(found) == [n for n, length in enumerate(LENGTHS) if length <= 12]
        seen.append(found)
    assert seen[0] != seen[1]


def test_a_row_is_a_function_of_its_number(shards):
    rows, again = (PackedRows(shards, 12, seed=3, pad_id=PAD) for _ in range(2))
    whole = rows.host_rows(5, range(6))
    for number in range(6):
        for part, other in zip(whole, again.host_rows(5 + number, [0])):
            assert np.array_equal(part[number], other[0])
    other_seed = PackedRows(shards, 12, seed=4, pad_id=PAD).host_rows(5, range(6))
    assert not np.array_equal(whole.tokens, other_seed.tokens)


def test_long_documents_are_cut_or_dropped_as_asked(shards, caplog):
    caplog.set_level("INFO")
    cut = PackedRows(shards, 12, seed=0, pad_id=PAD, long="cut")
    rows = cut.host_rows(0, range(cut.num_windows))
    assert (rows.tokens == 107).any()  # the document of 30 tokens
    assert "1 longer ones cut" in caplog.text
    assert not (PackedRows(shards, 12, 0, pad_id=PAD).host_rows(0, range(9)).tokens == 107).any()
    assert "1 longer ones dropped" in caplog.text
    with pytest.raises(ValueError, match="leaves nothing to predict"):
        PackedRows(shards, 1, 0, pad_id=PAD)


def test_rows_shorter_than_every_document_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, ByteTokenizer(), supervised=True)
    writer.add(np.arange(9, dtype=np.int32), 9, targets=np.ones(9, bool))
    writer.close()
    with pytest.raises(UserError, match=r"row of 7 tokens .the shortest has 9.*long_documents=cut"):
        PackedRows(TokenShards(tmp_path), 8, 0, pad_id=PAD)


def test_damaged_supervision_is_named(tmp_path, shards):
    assert shards.verify() == len(shards.index.shards)
    bits = tmp_path / "targets.bin"
    whole = bits.read_bytes()
    bits.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DamagedShards, match=r"targets.bin does not hold"):
        TokenShards(tmp_path).verify()
    bits.write_bytes(whole[:-1])
    with pytest.raises(DamagedShards, match=r"targets.bin has 10 bytes, not 11"):
        TokenShards(tmp_path)
    bits.write_bytes(whole)
    (tmp_path / "documents.bin").write_bytes(b"\x01\0\0\0" * len(LENGTHS))
    with pytest.raises(DamagedShards, match=r"documents.bin sums up to 9 tokens, not 81"):
        TokenShards(tmp_path)
    (tmp_path / "documents.bin").write_bytes(bytes(4 * len(LENGTHS)))
    with pytest.raises(DamagedShards, match=r"documents.bin has a document without tokens"):
        TokenShards(tmp_path)


def test_supervision_from_elsewhere_is_not_read(tmp_path, shards):
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    (tmp_path / "targets.bin").rename(elsewhere)
    (tmp_path / "targets.bin").symlink_to(elsewhere)
    with pytest.raises(DamagedShards, match="outside its folder: it is not followed"):
        TokenShards(tmp_path)


def test_supervised_and_plain_corpora_differ(tmp_path, shards):
    plain = tmp_path / "plain"
    plain.mkdir()
    writer = ShardWriter(plain, ByteTokenizer(), tokens_per_shard=16)
    for document, start in enumerate(shards.document_starts[:-1]):
        writer.add(shards.slice(int(start), int(start) + LENGTHS[document]), LENGTHS[document])
    index = writer.close()
    assert [s.sha256 for s in index.shards] == [s.sha256 for s in shards.index.shards]
    assert index.sha256 != shards.index.sha256
    assert TokenShards(plain).targets(3, 7).all() and not TokenShards(plain).is_supervised
