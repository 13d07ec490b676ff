"""Mixtures of corpora: how often each comes, and that a row depends on its number alone."""

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, UserError
from dsv3_jax.data.corpus import Corpus, Part, open_corpus
from dsv3_jax.data.mixture import BLOCK, MixedRows, batch_part, open_rows, val_rows
from dsv3_jax.data.mixture_weights import split_path
from dsv3_jax.data.packed_rows import SupervisedRows
from dsv3_jax.data.shards import ShardWriter, TokenShards
from dsv3_jax.data.tokenizer import ByteTokenizer

TOKENIZER, ROW = ByteTokenizer(), 9


def shards(folder, documents, supervised):
    for side in ("train", "val"):
        (folder / side).mkdir(parents=True)
        writer = ShardWriter(folder / side, TOKENIZER, supervised=supervised)
        for document in documents:
            ids = np.array(document, np.int32)
            writer.add(ids, len(ids), np.arange(len(ids)) > 1 if supervised else None)
        writer.close()
    return Part(TokenShards(folder / "train"), TokenShards(folder / "val"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    text = shards(folder / "text", [[256, *range(40), 257]] * 4, False)
    chat = shards(folder / "chat", [[256, 100 + n, 200, 257] for n in range(7)], True)
    return text, chat


def test_each_corpus_comes_as_often_as_its_weight(parts):
    text, chat = parts
    corpus = Corpus((text._replace(weight=0.3), chat._replace(weight=0.7)), TOKENIZER)
    mixed = open_rows(corpus, ROW, 5, DataConfig())
    assert isinstance(mixed, MixedRows)
    streams, own = mixed.which_stream(np.arange(3 * BLOCK))
    for number, weight in ((0, 0.3), (1, 0.7)):
        assert abs((streams == number).mean() - weight) < 1 / BLOCK
        # Every row of a corpus comes once, and none is left out.
        mine = np.sort(own[streams == number])
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
    half = (streams[: BLOCK // 2] == 0).mean()
    assert abs(half - 0.3) < 0.03  # they lie mixed, not one after the other
    assert (streams[:BLOCK] != streams[BLOCK : 2 * BLOCK]).any()


def test_a_row_is_a_function_of_its_number(parts):
    text, chat = parts
    corpus = Corpus((text._replace(weight=0.5), chat._replace(weight=0.5)), TOKENIZER)
    rows = open_rows(corpus, ROW, 5, DataConfig())
    far = BLOCK * 1000 + 17
    whole = rows.host_rows(far, range(12))
    assert isinstance(whole, SupervisedRows)
    for number in range(12):
        alone = rows.host_rows(far + number, [0])
        for ours, theirs in zip(alone, whole):
            np.testing.assert_array_equal(ours[0], theirs[number])
    streams, own = rows.which_stream(np.arange(far, far + 12))
    direct = open_rows(Corpus((text,), TOKENIZER), ROW, 5, DataConfig())
    first = int(np.flatnonzero(streams == 0)[0])
    np.testing.assert_array_equal(whole.tokens[first], direct.host_rows(int(own[first]), [0])[0])
    assert whole.targets[first, 1:].all() and not whole.targets[:, 0].any()
    other = open_rows(corpus, ROW, 6, DataConfig()).host_rows(far, range(12))
    assert (other.tokens != whole.tokens).any()


def test_a_batch_is_filled_up_with_rows_that_do_not_count(parts):
    rows = open_rows(Corpus((parts[1],), TOKENIZER), ROW, 0, DataConfig())
    batch = batch_part(rows, 3, 5, (2, 4, ROW), (slice(None), slice(None), slice(None)))
    assert batch.targets.reshape(8, ROW)[:5].any(1).all()
    assert not batch.targets.reshape(8, ROW)[5:].any() and not batch.segments[1, 1:].any()
    batches = val_rows(Corpus((parts[1],), TOKENIZER), ROW, 3, 10, DataConfig())
    counted = sum(int(batch.rows.targets[:, 1:].sum()) for batch in batches)
    assert counted == sum(batch.tokens for batch in batches) == 7 * 2
    assert sum(batch.text_bytes for batch in batches) == 7  # eos stands for none


def test_documents_of_text_are_told_apart_where_asked(parts):
    text, chat = parts
    corpus = Corpus((text._replace(weight=0.5), chat._replace(weight=0.5)), TOKENIZER)
    rows = open_rows(corpus, 60, 0, DataConfig(mask_documents=True))
    streams, _ = rows.which_stream(np.arange(20))
    made = rows.host_rows(0, np.flatnonzero(streams == 0).tolist())
    begins = np.diff(made.segments, axis=1) == 1
    assert (begins == (made.tokens[:, 1:] == 256)).all() and begins.any()


@pytest.mark.parametrize(
    "path, words",
    [
        ("a:0,b:0", "sum up to zero"),
        ("a:-1,b:2", "not negative"),
        ("a:1,b:1e9", "less than"),
        ("a:0.5,a:0.5", "named twice"),
        ("a:1e,b:2", "weights are numbers"),
        ("a:inf", None),
    ],
)
def test_weights_that_cannot_be(path, words):
    if words is None:
        assert split_path(path) == [(path, 1.0)]  # a file of that name
        return
    with pytest.raises(UserError, match=words):
        split_path(path)


def test_paths_are_read(tmp_path):
    assert split_path("stdlib") == [("stdlib", 1.0)]
    assert split_path("/a/b:3,c:1") == [("/a/b", 0.75), ("c", 0.25)]
    for name, text in (("a", "some words "), ("b", "other words ")):
        (tmp_path / f"{name}.txt").write_text(text * 40)
    path = f"{tmp_path}/a.txt:1,{tmp_path}/b.txt:3"
    data = DataConfig(path=path, val_fraction=0.2, fim_rate=0.0)
    corpus = open_corpus(data, 0, tmp_path / "cache")
    assert [part.weight for part in corpus.parts] == [0.25, 0.75]
    single = open_corpus(DataConfig(path=f"{tmp_path}/a.txt", val_fraction=0.2, fim_rate=0.0), 0,
                         tmp_path / "cache")  # fmt: skip
    assert corpus.sha256("train") != single.sha256("train")
    assert isinstance(open_rows(corpus, ROW, 0, data).host_rows(0, range(4)), np.ndarray)
