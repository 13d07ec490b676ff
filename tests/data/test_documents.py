"""Readers: each format gives its documents, each bad input one message that names the place."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.data.documents import find_files, read_documents, read_records, stdlib_files
from dsv3_jax.data.parquet import parquet_columns, parquet_rows

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["first\nline", "größe 🙂", "third\r\n"]


def read(*paths, text_field="text", skipped=None):
    return list(read_documents(find_files(paths), text_field, skipped))


def write_jsonl(path, texts=DOCUMENTS, field="text"):
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


def write_parquet(path, texts=DOCUMENTS):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def test_every_format_gives_the_same_documents(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(write_jsonl(tmp_path / name)) == DOCUMENTS
    assert read(write_parquet(tmp_path / "a.parquet")) == DOCUMENTS
    (tmp_path / "a.txt").write_bytes(DOCUMENTS[2].encode())
    assert read(tmp_path / "a.txt") == DOCUMENTS[2:]


def test_another_text_field_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", field="content")
    assert read(path, text_field="content") == DOCUMENTS


def test_a_folder_is_read_in_sorted_order_and_says_what_it_skipped(tmp_path):
    for name, content in {
        "b/z.md": b"two",
        "a.py": b"one",
        "c.txt": b"",
        "d.bin": b"x\0y",
        "e.latin1": b"gr\xf6\xdfe",
        ".git/config": b"hidden",
        ".secret": b"hidden",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing")
    write_jsonl(tmp_path / "f.jsonl", ["three"])
    skipped = Counter()
    assert read(tmp_path, skipped=skipped) == ["one", "three", "two"]
    assert skipped == {
        "empty document": 1,
        "a NUL byte": 1,
        "bytes that are not UTF-8": 1,
        "hidden file or folder": 2,
        "not a regular file": 1,
    }


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83db"}')
    assert read(tmp_path / "a.jsonl") == ["a\ufffdb"]


def test_the_standard_library_is_its_source_without_tests():
    files = [file.path for file in stdlib_files().files]
    names = {"/".join(path.parts[-2:]) for path in files}
    assert {"json/decoder.py", "asyncio/tasks.py"} <= names
    folders = {part for path in files for part in path.parts}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert files == [file.path for file in stdlib_files().files]
    # 11.6 MB on Python 3.12, 12.1 MB on 3.11; another layout would show.
    assert 5e6 < sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"ab\0c", "a NUL byte at byte 2"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r":3: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', r":2: a list, not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r":1: no text in field 'text'.*'body'"),
        ("a.jsonl", b'{"text": null}\n', r":1: no text in field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r":1: not UTF-8"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r":1: not JSON"),
        (
            "a.jsonl",
            b'{"text": [' + b"[]," * 2**20 + b"[]]}",
            r":1: not JSON: more than 1,048,576 v",
        ),
        ("a.jsonl.gz", b"not gzip", "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "damaged gzip file"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)/{re.escape(name)}.*{message}"):
        read(tmp_path / name)


def test_a_parquet_column_whose_name_is_no_text_is_refused(tmp_path):
    table = pyarrow.table({"text": ["x"], "NAMENAME": ["y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw.replace(b"NAMENAME", b"\xecAMENAME"))
    for look in (read, lambda path: list(parquet_rows(path)), parquet_columns):
        with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file: .*utf-8"):
            look(tmp_path / "a.parquet")


def test_parquet_names_a_missing_column_and_a_row_without_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x", None])
    with pytest.raises(UserError, match="row 2: 'text' is NoneType"):
        read(path)
    with pytest.raises(UserError, match=r"no text in field 'body'.*'id', 'text'"):
        read(path, text_field="body")


MEASURED = """
import re, sys
from pathlib import Path
from dsv3_jax.config import UserError
from dsv3_jax.data.documents import find_files, read_documents
def most(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
import numpy, pyarrow.parquet, pyarrow.compute
before = most()
try:
    print(sum(len(text) for text in read_documents(find_files(sys.argv[1:]))))
except UserError as error:
    print(error)
print(most() - before >> 10)
"""


def measured(path):
    """(what reading the documents of a file says, MiB of memory that it took)."""
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    *said, most = done.stdout.splitlines()
    return "\n".join(said), int(most)


@pytest.mark.slow
def test_a_line_of_600_mib_in_a_small_file_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(600):
            file.write(bytes(1 << 20).replace(b"\0", b"a"))
        file.write(b'"}\n')
    said, most = measured(path)
    assert "bomb.jsonl.gz:1: a line of more than 67,108,864 bytes" in said and most < 150


def test_many_commas_in_a_text_are_no_values(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ['",{[\\' * (1 << 20)])
    assert read(path) == ['",{[\\' * (1 << 20)]


@pytest.mark.slow
def test_parquet_that_would_swell_is_refused_or_read_in_little_memory(tmp_path):
    long = "x" * (8 << 20)
    told = {
        # one dictionary entry, repeated by rows of a byte or two: read row by row
        "repeated": ([long] * 64, f"{64 << 23}"),
        # a page that compresses a thousandfold
        "swollen": (["y" * (200 << 20)], "row group 0 would swell from"),
        "row": (["".join(map(str, range(12_000_000)))], "row 1: more than 67,108,864 bytes"),
    }
    for name, (texts, expected) in told.items():
        path = tmp_path / f"{name}.parquet"
        table = pyarrow.table({"text": texts})
        options = {"compression": "zstd", "use_dictionary": name == "repeated"}
        pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=1 << 30, **options)
        said, most = measured(path)
        assert expected in said and most < 300, (name, said[:300], most)


def test_conversations_repeated_by_a_dictionary_are_bounded(tmp_path):
    messages = [{"role": "user", "content": "z" * (1 << 20)}] * 65
    table = pyarrow.table({"messages": [[{"role": "user", "content": "short"}], messages]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = read_records(find_files([tmp_path / "a.parquet"]))
    assert next(records)[1] == {"messages": [{"role": "user", "content": "short"}]}
    with pytest.raises(UserError, match="row 2: more than 67,108,864 bytes"):
        next(records)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        read(tmp_path / "nowhere")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3_jax\[parquet\]'"):
        read(path)
