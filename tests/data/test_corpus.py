"""prepare and open_corpus: whole corpora, the cache, and what a user can do wrong."""

import errno
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import Config, DataConfig, UserError
from dsv3_jax.data import corpus as corpus_module
from dsv3_jax.data import shards as shards_module
from dsv3_jax.data.corpus import damage_of_prepared, default_cache_dir, open_corpus, prepare
from dsv3_jax.data.shards import DamagedShards, ShardWriter
from dsv3_jax.data.supervised import prepare_supervised
from dsv3_jax.data.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from dsv3_jax.loading import find_tokenizer
from dsv3_jax.training.run_folder import RunFolder
from tests.data import test_tiktoken_model

OPTIONS = {"val_fraction": 0.2, "fim_rate": 0.1, "seed": 0}
DATA = DataConfig(val_fraction=0.2, fim_rate=0.1)
# On one core with other work on the machine; alone it takes 0.6 s.
STDLIB_SECONDS = 6


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"document {i}: größe {i * i}\n" * (i + 1))
    return folder


def tokens_of(shards):
    return shards.slice(0, len(shards))


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_prepare_counts_documents_bytes_and_tokens(text_folder, tmp_path):
    summary = prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    train, val = summary.train, summary.val
    assert train.documents + val.documents == 60 and min(train.documents, val.documents) > 0
    assert train.text_bytes + val.text_bytes == sum(p.stat().st_size for p in text_folder.iterdir())
    assert val.tokens == val.text_bytes + 2 * val.documents  # bos and eos
    fim = (train.tokens - train.text_bytes - 2 * train.documents) / 3
    assert fim == int(fim) > 0
    assert f"train: {train.documents} documents" in str(summary)


def test_a_prepared_folder_opens_as_it_is(text_folder, tmp_path, caplog):
    prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    data = replace(DATA, path=str(tmp_path / "out"))
    corpus = open_corpus(data, seed=99, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and not caplog.records
    direct = open_corpus(replace(DATA, path=str(text_folder)), 0, tmp_path / "cache")
    assert corpus.train.index.sha256 == direct.train.index.sha256
    assert corpus.val.index.sha256 == direct.val.index.sha256
    open_corpus(replace(data, fim_rate=0.5), seed=0)
    assert "prepared with fim_rate=0.1, which stays" in caplog.text


def test_preparing_twice_gives_the_same_bytes_and_another_seed_another_fim(text_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {**OPTIONS, "seed": seed}
        prepare([text_folder], tmp_path / name, ByteTokenizer(), **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    val, train = (content(tmp_path / "c" / side) for side in ("val", "train"))
    assert val == content(tmp_path / "a" / "val") and train != content(tmp_path / "a" / "train")


def test_a_single_text_file_is_split_at_its_end(tmp_path):
    (tmp_path / "one.txt").write_text("".join(map(chr, range(0x21, 0x7F))) * 10)
    data = DataConfig(path=str(tmp_path / "one.txt"), val_fraction=0.25, fim_rate=0)
    corpus = open_corpus(data, 0, tmp_path / "cache")
    sides = [corpus.tokenizer.decode(tokens_of(s)) for s in (corpus.train, corpus.val)]
    assert "".join(sides) == (tmp_path / "one.txt").read_text()
    assert len(sides[1]) == 940 // 4


def test_a_trained_tokenizer_travels_with_the_folder(text_folder, tmp_path):
    texts = [p.read_text() for p in sorted(text_folder.iterdir())]
    bpe = train_tokenizer(texts, 300, tmp_path / "t.json")
    prepare([text_folder], tmp_path / "out", bpe, **{**OPTIONS, "fim_rate": 0})
    data = DataConfig(path=str(tmp_path / "out"), tokenizer=str(tmp_path / "out"))
    corpus = open_corpus(data, 0)
    assert corpus.tokenizer.fingerprint == bpe.fingerprint
    first = np.split(tokens_of(corpus.train), [corpus.train.index.tokens // 2])[0]
    assert corpus.tokenizer.decode(first).startswith("document 0")
    with pytest.raises(
        UserError, match=r"prepared with tokenizer t\.json.*use data\.tokenizer=.*out"
    ):
        open_corpus(replace(data, tokenizer="byte"), 0)


def test_the_cache_is_used_and_its_key_sees_every_change(text_folder, tmp_path):
    cache = tmp_path / "cache"
    data = replace(DATA, path=str(text_folder))

    def folders():
        return {p.name for p in cache.iterdir() if p.is_dir()}

    open_corpus(data, 0, cache)
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*.bin")}
    open_corpus(data, 0, cache)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.bin")} == stamps
    for changed, seed in ((data, 1), (replace(data, fim_rate=0.2), 0)):
        before = folders()
        open_corpus(changed, seed, cache)
        assert len(folders() - before) == 1
    before = folders()
    (text_folder / "00.txt").write_text("another text")
    corpus = open_corpus(data, 0, cache)
    assert len(folders() - before) == 1
    decoded = corpus.tokenizer.decode([*tokens_of(corpus.train), *tokens_of(corpus.val)])
    assert "another text" in decoded


@pytest.mark.parametrize("damage", ["flip", "truncate", "index", "missing", "empty"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(text_folder, tmp_path, caplog, damage):
    data = replace(DATA, path=str(text_folder))
    open_corpus(data, 0, tmp_path / "cache")
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    before = content(folder)
    path = folder / "val" / "tokens-00000.bin"
    raw = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "truncate":
        path.write_bytes(raw[:-2])
    elif damage == "index":
        (folder / "train" / "index.json").write_text("{")
    elif damage == "missing":
        path.unlink()
    else:
        for file in content(folder):
            (folder / file).unlink()
    open_corpus(data, 0, tmp_path / "cache")
    assert "rebuilding the token cache" in caplog.text
    assert content(folder) == before
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the corpus and its lock


def flip(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def test_prepared_data_with_one_flipped_bit_are_refused_by_name(text_folder, tmp_path):
    bpe = train_tokenizer([p.read_text() for p in text_folder.iterdir()], 300, tmp_path / "t.json")
    prepare([text_folder], tmp_path / "out", bpe, **OPTIONS)
    data = replace(DATA, path=str(tmp_path / "out"), tokenizer=str(tmp_path / "out"))
    expected = tokens_of(open_corpus(data, 0).train).tolist()
    for name, message in (
        ("train/tokens-00000.bin", r"train/tokens-00000\.bin does not hold what was written"),
        ("val/tokens-00000.bin", r"val/tokens-00000\.bin does not hold what was written"),
        ("tokenizer.json", r"tokenizer\.json"),
    ):
        path = tmp_path / "out" / name
        for bit in (0, 7):
            flip(path, 100, bit)
            with pytest.raises(DamagedShards if "bin" in name else UserError, match=message):
                open_corpus(data, 0)
            flip(path, 100, bit)
    assert tokens_of(open_corpus(data, 0).train).tolist() == expected


def test_sizes_alone_are_looked_at_when_asked(text_folder, tmp_path):
    prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    flip(tmp_path / "out/train/tokens-00000.bin", 100)
    data = replace(DATA, path=str(tmp_path / "out"), verify="sizes")
    open_corpus(data, 0)
    for verify in ("auto", "all"):
        with pytest.raises(DamagedShards, match="does not hold"):
            open_corpus(replace(data, verify=verify), 0)


def test_large_prepared_data_say_how_much_was_verified(text_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shards_module.ShardWriter.__init__, "__defaults__", (500, False))
    # Of files of 1,000 bytes, taken at random, among them a last one that is shorter: always two.
    monkeypatch.setattr(corpus_module, "VERIFY_BYTES", 1001)
    prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    data = replace(DATA, path=str(tmp_path / "out"))
    corpus = open_corpus(data, 0)
    assert f"out/train: 2 of {len(corpus.train.index.shards)} files were hashed" in caplog.text
    caplog.clear()
    open_corpus(replace(data, verify="all"), 0)
    assert not caplog.records


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 260}, "vocab_size=260, but its tokenizer has 261 ids"),
        ({"tokenizer_sha256": "0" * 64}, "prepared with tokenizer byte .sha256 000000000000"),
        ({"tokenizer": "\x1b[31m"}, None),
        ({"shards": [], "documents": 0}, None),
    ],
)
def test_an_index_that_lies_about_its_tokenizer_is_refused(text_folder, tmp_path, change, message):
    prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    path = tmp_path / "out/val/index.json"
    # Without the seal, as folders of before there was one.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": None} | change))
    data = replace(DATA, path=str(tmp_path / "out"))
    if message is None:
        open_corpus(data, 0)
        return
    with pytest.raises(UserError, match=message):
        open_corpus(data, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "seal", "no seal"])
def test_a_damaged_cached_tokenizer_is_trained_again_with_a_line(
    text_folder, tmp_path, caplog, damage
):
    data = replace(DATA, path=str(text_folder), tokenizer="bpe:300")
    expected = open_corpus(data, 0, tmp_path / "cache").tokenizer.fingerprint
    (path,) = (tmp_path / "cache").glob("bpe-*.json")
    seal = path.with_suffix(".sha256")
    if damage == "flip":
        flip(path, path.read_bytes().index(b"merges") + 30)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "seal":
        seal.write_text("0")
    else:
        seal.unlink()
    assert open_corpus(data, 0, tmp_path / "cache").tokenizer.fingerprint == expected
    assert "training the cached tokenizer again" in caplog.text
    caplog.clear()
    assert open_corpus(data, 0, tmp_path / "cache").tokenizer.fingerprint == expected
    assert not caplog.records


def test_processes_that_build_at_once_share_one_whole_cache(text_folder, tmp_path):
    code = (
        "import sys, logging; logging.basicConfig(level=logging.INFO)\n"
        "from dsv3_jax.config import DataConfig\n"
        "from dsv3_jax.data.corpus import open_corpus\n"
        "data = DataConfig(path=sys.argv[1], val_fraction=0.2)\n"
        "print(open_corpus(data, 0, sys.argv[2]).train.index.sha256)\n"
    )
    command = [sys.executable, "-c", code, str(text_folder), str(tmp_path / "cache")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = [p.communicate() for p in [subprocess.Popen(command, **pipes) for _ in range(3)]]
    expected = open_corpus(replace(DATA, path=str(text_folder)), 0, tmp_path / "c")
    assert [out.strip() for out, _ in done] == [expected.train.index.sha256] * 3
    assert sum("tokenising" in errors for _, errors in done) == 1


def test_an_interrupted_build_leaves_nothing(text_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module.ShardWriter, "close", fail)
    full = r"No space left on device: the tokens of [0-9,]+ bytes of files take up to .*out"
    with pytest.raises(OSError, match=full):
        prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(OSError, match=full):
        inputs = ([tmp_path / "pairs.jsonl"], tmp_path / "out")
        prepare_supervised(*inputs, ByteTokenizer(), None, val_fraction=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "texts"]


def test_the_standard_library_is_ready_within_seconds(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    begin = time.process_time()
    corpus = open_corpus(DataConfig(), 0, tmp_path)
    assert time.process_time() - begin < STDLIB_SECONDS
    assert len(corpus.train) > 5_000_000 and len(corpus.val) > 20_000
    assert "tokenising stdlib" in caplog.text
    text = corpus.tokenizer.decode(corpus.train.slice(0, 200_000))
    assert "import" in text and "\ufffd" not in text


def test_the_default_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "dsv3_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "dsv3_jax"


def test_places_that_cannot_be_written_are_named(text_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        prepare([text_folder], tmp_path / "file" / "out", ByteTokenizer(), **OPTIONS)
    with pytest.raises(UserError, match=r"cannot use the token cache .*file.*XDG_CACHE_HOME"):
        open_corpus(replace(DATA, path=str(text_folder)), 0, tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="is not an empty folder"):
        prepare([text_folder], text_folder, ByteTokenizer(), **OPTIONS)
    with pytest.raises(UserError, match="is not an empty folder"):
        prepare([text_folder], tmp_path / "file", ByteTokenizer(), **OPTIONS)
    (tmp_path / "empty").mkdir()
    assert prepare([text_folder], tmp_path / "empty", ByteTokenizer(), **OPTIONS).train.documents


def test_a_full_disk_names_the_place_and_the_size_wanted(text_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    data = replace(DATA, path=str(text_folder))
    size = sum(path.stat().st_size for path in text_folder.rglob("*.*"))
    with pytest.raises(OSError, match=rf"take up to {2 * size:,} .*cache/corpus-") as error:
        open_corpus(data, 0, tmp_path / "cache")
    assert error.value.errno == errno.ENOSPC
    assert not [path for path in (tmp_path / "cache").iterdir() if "partial" in path.name]


def test_a_tiktoken_model_travels_with_the_folder_and_the_run(text_folder, tmp_path):
    (tmp_path / "kimi").mkdir()
    tokenizer = load_tokenizer(test_tiktoken_model.write(tmp_path / "kimi"))
    options = OPTIONS | {"fim_rate": 0.0}
    prepare([text_folder], tmp_path / "out", tokenizer, **options)
    data = replace(DATA, fim_rate=0.0, path=str(tmp_path / "out"), tokenizer=str(tmp_path / "out"))
    assert open_corpus(data, 0).tokenizer.fingerprint == tokenizer.fingerprint
    assert damage_of_prepared(tmp_path / "out") == []
    with RunFolder(tmp_path / "run") as folder:
        folder.claim(Config(), tokenizer, new=True)
    assert find_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint
    (tmp_path / "out/tiktoken.model").unlink()
    assert "tokenizer.json is missing" in damage_of_prepared(tmp_path / "out")[0]


def test_an_empty_or_binary_corpus_is_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(UserError, match="corpus is empty: no text in 0 files"):
        prepare([folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    (folder / "a.txt").write_text("")
    (folder / "b.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"empty: .* 2 files \(1 x a NUL byte, 1 x empty document"):
        prepare([folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    with pytest.raises(UserError, match=r"b\.bin: a NUL byte at byte 0"):
        open_corpus(replace(DATA, path=str(folder / "b.bin")), 0, tmp_path / "cache")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        open_corpus(replace(DATA, path=str(tmp_path / "nowhere")), 0, tmp_path / "cache")
    with pytest.raises(UserError, match=r"val_fraction=0 must lie.*fim_rate=2 must lie"):
        prepare([folder], tmp_path / "o", ByteTokenizer(), val_fraction=0, fim_rate=2, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_prepared_folder_that_lost_a_part_is_not_taken_for_text(text_folder, tmp_path):
    prepare([text_folder], tmp_path / "out", ByteTokenizer(), **OPTIONS)
    recipe = tmp_path / "out" / "recipe.json"
    assert json.loads(recipe.read_text())["split_by"] == "document"
    recipe.unlink()
    data = replace(DATA, path=str(tmp_path / "out"))
    with pytest.raises(DamagedShards, match=r"recipe\.json: missing or damaged"):
        open_corpus(data, 0, tmp_path / "cache")
    recipe.write_text("{}")
    (tmp_path / "out" / "val" / "index.json").unlink()
    with pytest.raises(DamagedShards, match=r"val: no index\.json"):
        open_corpus(data, 0, tmp_path / "cache")
