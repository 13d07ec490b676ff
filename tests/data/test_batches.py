"""Rows are a pure function of (seed, row number); every token is predicted once an epoch."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.data.batches import Rows, prefetch, shuffled, val_batches
from dsv3_jax.data.mixture import batch_part
from dsv3_jax.data.shards import ShardWriter, TokenShards
from dsv3_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
ROW = 5


def make_shards(folder, tokens, tokens_per_shard=64):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 2**20  # so that a test can number its tokens
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, tokenizer, tokens_per_shard)
    writer.add(np.asarray(tokens, np.int32), text_bytes=0)
    writer.close()
    return TokenShards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """999 tokens, each its own position: 249 windows of 5 and 2 tokens left over."""
    return make_shards(tmp_path_factory.mktemp("s"), range(999))


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_token_is_predicted_exactly_once_an_epoch(shards, epoch):
    rows = Rows(shards, ROW, seed=3)
    assert rows.num_windows == 249
    tokens = rows.rows(epoch * 249, 249)
    assert tokens.shape == (249, ROW) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 1:], tokens[:, :-1] + 1)
    assert sorted(tokens[:, 1:].ravel()) == list(range(1, 997))


def test_a_row_does_not_depend_on_how_it_is_asked_for(shards):
    rows = Rows(shards, ROW, seed=3)
    whole = rows.rows(200, 150)  # across the border of an epoch
    for i in (0, 48, 49, 50, 149):
        np.testing.assert_array_equal(Rows(shards, ROW, seed=3).rows(200 + i, 1)[0], whole[i])
    which = [149, 3, 3, 48]
    np.testing.assert_array_equal(rows.host_rows(200, which), whole[which])
    assert rows.host_rows(0, []).shape == (0, ROW)
    far = 249 * 10**12 + 5  # no arithmetic wraps on a long run
    np.testing.assert_array_equal(rows.rows(far, 2)[1], rows.rows(far + 1, 1)[0])


@pytest.mark.parametrize("count", [24, 14])
def test_parts_of_a_batch_are_read_alone_and_make_up_the_batch(shards, count, monkeypatch):
    """Three micro-batches of 8 rows over four hosts and two pieces of the sequence."""
    rows, shape = Rows(shards, ROW, seed=3), (3, 8, ROW)
    whole = np.zeros(shape, np.int32)
    whole.reshape(-1, ROW)[:count] = rows.rows(200, count)
    read = []
    host_rows = rows.host_rows
    monkeypatch.setattr(rows, "host_rows", lambda f, w: read.append(list(w)) or host_rows(f, w))
    for b in range(0, 8, 2):
        for t in (slice(0, 3), slice(3, None)):
            part = (slice(None), slice(b, b + 2), t)
            np.testing.assert_array_equal(batch_part(rows, 200, count, shape, part), whole[part])
        assert read.pop() == read.pop() == [a * 8 + b + i for a in range(3) for i in (0, 1)
                                            if a * 8 + b + i < count]  # fmt: skip


def test_epochs_and_seeds_differ(shards):
    first, second = (Rows(shards, ROW, seed=3).rows(e * 249, 249) for e in (0, 1))
    other = Rows(shards, ROW, seed=4).rows(0, 249)
    for a, b in ((first, second), (first, other), (second, other)):
        # A random order puts about one window of 249 in its old place.
        assert (a[:, 0] == b[:, 0]).sum() < 10


def test_rows_are_the_same_in_another_process(shards):
    code = (
        "import sys; from dsv3_jax.data.batches import Rows; "
        "from dsv3_jax.data.shards import TokenShards; "
        "print(Rows(TokenShards(sys.argv[1]), 5, 3).rows(240, 20).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shards.folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(Rows(shards, ROW, 3).rows(240, 20).tolist())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.integers(-(2**63), 2**64), st.integers(0, 2**40))
def test_the_shuffle_is_a_bijection(size, seed, epoch):
    places = np.arange(size)
    images = shuffled(places, size, seed, np.full(size, epoch))
    assert sorted(images) == list(range(size))


def test_the_shuffle_is_spread_evenly():
    # Over 20,000 epochs of 5 windows each (place, window) pair comes 4,000 times; sigma is 57.
    epochs = np.arange(20_000)
    for place in range(5):
        images = shuffled(np.full(20_000, place), 5, 0, epochs)
        assert np.abs(np.bincount(images, minlength=5) - 4000).max() < 5 * 57
    # Neighbours do not stay together.
    images = shuffled(np.arange(10_000), 10_000, 0, np.zeros(10_000, np.int64))
    assert (np.abs(np.diff(images)) == 1).sum() < 20
    assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.05


def test_validation_batches_are_fixed_distinct_rows_in_order(shards):
    batches = val_batches(shards, ROW, 4, 3, TOKENIZER)
    tokens = np.concatenate([b.rows for b in batches])
    assert tokens.shape == (12, ROW)
    starts = tokens[:, 0] // (ROW - 1)
    np.testing.assert_array_equal(starts, [i * 249 // 12 for i in range(12)])
    everything = val_batches(shards, ROW, 4, 1000, TOKENIZER)
    assert len(everything) == 62  # whole batches only
    assert len({row[0] for b in everything for row in b.rows}) == 248


def test_validation_bytes_are_those_of_the_predicted_tokens(tmp_path):
    ids = [256, *"größe".encode(), 257, 256, *b"abc", 257]
    (batch,) = val_batches(make_shards(tmp_path / "s", ids), len(ids), 1, 5, TOKENIZER)
    assert batch.text_bytes == len("größeabc".encode())
    (batch,) = val_batches(make_shards(tmp_path / "t", ids[1:]), len(ids) - 1, 1, 5, TOKENIZER)
    assert batch.text_bytes == len("größeabc".encode()) - 1  # the first byte is only read


def test_a_small_validation_split_repeats_its_rows_and_says_so(tmp_path, caplog):
    shards = make_shards(tmp_path / "s", range(13))
    (batch,) = val_batches(shards, ROW, 8, 5, TOKENIZER)
    assert batch.rows[:, 0].tolist() == [0, 4, 8, 0, 4, 8, 0, 4]
    assert "3 rows: they repeat to fill a batch of 8" in caplog.text


def test_too_few_tokens_for_a_row_are_refused(tmp_path):
    shards = make_shards(tmp_path / "train", range(4))
    with pytest.raises(UserError, match=r"train: 4 tokens are too few for one row of 5"):
        Rows(shards, ROW, 0)
    with pytest.raises(UserError, match="too few for one row"):
        val_batches(shards, ROW, 1, 1, TOKENIZER)
    assert Rows(shards, 4, 0).rows(0, 2).tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="nothing to predict"):
        Rows(shards, 1, 0)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_gives_every_item_in_order_and_ends():
    with prefetch(lambda: iter(range(100)), depth=3) as items:
        assert list(items) == list(range(100))
        assert next(items, "end") == "end"
    assert not prefetch_threads()


def test_prefetch_runs_ahead_by_its_depth_only():
    made = []
    with prefetch(lambda: (made.append(i) or i for i in range(100)), depth=2) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2, 3]  # taken, two ready, one in the worker's hand
    assert not prefetch_threads()


def test_prefetch_raises_the_workers_exception_after_its_items():
    def items():
        yield 1
        raise KeyError("in the worker")

    with prefetch(items) as found:
        assert next(found) == 1
        for _ in range(2):
            with pytest.raises(KeyError, match="in the worker"):
                next(found)
    assert not prefetch_threads()


def test_prefetch_closes_when_the_consumer_fails():
    with pytest.raises(ZeroDivisionError), prefetch(lambda: iter(int, 1)) as items:
        next(items)
        1 / 0  # noqa: B018
    assert not prefetch_threads()
