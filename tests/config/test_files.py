"""Files from strangers: what is refused, in one line, and what is made of the rest."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dsv3_jax.config import UserError, config_from_dict
from dsv3_jax.config import files as careful
from dsv3_jax.config.files import build, file_inside, parse_json, read_json, shown

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Inner:
    count: int
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    inners: tuple[Inner, ...] = ()
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    flag: bool = False
    several: int | tuple[int, ...] | None = None


GOOD = {"name": "x", "inner": {"count": 3}}


def test_a_dataclass_is_made_of_its_own_json():
    made = Outer("x", Inner(3, 1.5), (Inner(1), Inner(2)), {"a": 1}, "b", 7, True)
    text = json.dumps(dataclasses.asdict(made)).encode()
    assert build(Outer, parse_json(text, "x"), "x") == made
    for several in (1, (1, 2), ()):
        text = json.dumps(dataclasses.asdict(Outer("x", Inner(3), several=several))).encode()
        assert build(Outer, parse_json(text, "x"), "x").several == several
    assert build(Outer, GOOD, "x") == Outer("x", Inner(3))
    assert build(Outer, GOOD | {"inner": {"count": 3.0, "rate": 1}}, "x").inner == Inner(3, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 3}, "name=3 is not a text"),
        ({"inner": None}, "inner: None is not an object"),
        ({"inner": {}}, r"inner\.count is missing"),
        ({"inner": {"count": True}}, r"inner\.count=True is not an integer"),
        ({"inner": {"count": 1 << 63}}, "is not an integer of 64 bits"),
        ({"inner": {"count": 2.5}}, r"count=2\.5 is not an integer"),
        ({"inner": {"count": 1, "rate": "1"}}, "rate='1' is not a finite number"),
        ({"inner": {"count": 1, "rate": 10**39}}, "is not a finite number"),
        ({"inners": {"count": 1}}, "inners=.* is not a list"),
        ({"inners": [{"count": 1}, 2]}, r"inners\[1\]: 2 is not an object"),
        ({"table": [1]}, r"table=\[1\] is not an object"),
        ({"table": {"k": "v"}}, r"table\.k='v' is not an integer"),
        ({"kind": "c"}, "kind='c' is not 'a' or 'b'"),
        ({"kind": ["a"]}, "kind=.* is not 'a' or 'b'"),
        ({"maybe": "1"}, "maybe='1' is not an integer"),
        ({"several": "1"}, "several='1' is not a list"),
        ({"several": [1, "2"]}, r"several\[1\]='2' is not an integer"),
        ({"flag": 1}, "flag=1 is not true or false"),
        ({"more": 1}, "unknown field more"),
    ],
)
def test_what_an_annotation_does_not_allow_is_refused_by_its_path(change, message):
    with pytest.raises(UserError, match=f"^x: .*{message}") as error:
        build(Outer, GOOD | change, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "Expecting value"),
        (b"[]", "no JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a":1,"a":2}', "'a' appears twice"),
        (b'{"a":{"b":1,"b":2}}', "'b' appears twice"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":-Infinity}', "-Infinity is not a number"),
        (b'{"a":1e999}', "1e999 is too large"),
        (b'{"a":1' + b"0" * 50 + b"}", "an integer of 51 digits"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 64"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a":' + b'{"b":' * 5000, "."),
        (rb'{"a":"\ud800"}', "half a surrogate pair"),
        (rb'{"\udc00":1}', "half a surrogate pair"),
        (b'{"a":[' + b"1," * 2000 + b"1]}", "more than 1000 values"),
    ],
)
def test_json_that_no_program_of_ours_would_write_is_refused(raw, message):
    with pytest.raises(UserError, match=f"^place: .*{message}") as error:
        parse_json(raw, "place", max_values=1000 if b"1,1,1" in raw else careful.MAX_VALUES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_whole_surrogate_pairs_and_long_integers_are_read():
    assert parse_json(rb'{"a":"\ud83d\ude00","b":' + b"1" * 40 + b"}", "x") == {
        "a": "\N{GRINNING FACE}",
        "b": int("1" * 40),
    }


def test_a_file_is_read_up_to_its_bound_and_only_when_it_is_one(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}')
    assert read_json(tmp_path / "x", 8) == {"a": 1}
    with pytest.raises(UserError, match="8 bytes exceed the 7 allowed"):
        read_json(tmp_path / "x", 7)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            read_json(path, 7)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "..", "", "a\\b", "a\0b", "x" * 5000, "\ud800", 3]
)
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"file|cannot be the name"):
        file_inside(tmp_path / "folder", name)


def test_links_are_followed_within_a_folder_only(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/x").write_text("x")
    (folder / "inside").symlink_to("sub/x")
    (folder / "circle").symlink_to("circle")
    (folder / "out").symlink_to("/etc/hostname")
    assert file_inside(folder, "inside").read_text() == "x"
    assert file_inside(folder, "sub/x").read_text() == "x"
    for name in ("circle", "out", "sub", "missing"):
        with pytest.raises(UserError):
            file_inside(folder, name)


def test_a_value_is_shown_in_one_short_line():
    for value in ("a\nb" * 10_000, [[["x"] * 100] * 100] * 100, {"k" * 100: 1}, b"\0" * 1000):
        assert len(shown(value)) < 200 and "\n" not in shown(value)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers=1000000000 exceeds 1024"),
        ({"n_routed_experts": 1 << 40}, "model.n_routed_experts=.* exceeds 4096"),
        ({"hidden_size": "7168"}, "model.hidden_size='7168' is not an integer"),
        ({"rope_scaling": []}, r"model.rope_scaling: \[\] is not an object"),
        ({"rope_scaling": {"type": "linear"}}, "model.rope_scaling.type='linear' is not 'yarn'"),
        ({"dtype": "float8"}, "model.dtype='float8' is not 'bfloat16' or 'float32'"),
        ([], r"model: \[\] is not an object"),
    ],
)
def test_a_run_s_configuration_is_checked_when_it_is_read_back(model, message):
    with pytest.raises(UserError, match=f"^place: {message}"):
        config_from_dict({"model": model}, "place")


HOSTILE = """
import re, sys, time
from pathlib import Path
from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_json
from dsv3_jax.interop.safetensors import read_header
def most(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = most()
start = time.process_time()
for _ in range(10_000_000): pass
unit = time.process_time() - start  # a quarter of a second on a core that nothing else slows
start = time.process_time()
try:
    read_header(sys.argv[1]) if sys.argv[1].endswith("safetensors") else read_json(
        Path(sys.argv[1]), 32 << 20)
except UserError as error:
    print(str(error)[:200])
after = most()
print((after - before) >> 10, after >> 10, (time.process_time() - start) / unit)
"""


@pytest.mark.slow
def test_a_file_of_50_mb_takes_neither_memory_nor_time(tmp_path):
    """1.8 GB and 37 s, when it was parsed first and looked at then. 20 units are about 5 s."""
    lists = b'{"a":[' + b"[]," * (31 << 20 >> 2) + b"[]]}"
    texts = {
        "long.safetensors": b'{"a":[' + b"[]," * (50 << 20 >> 2) + b"[]]}",
        "lists.safetensors": lists,
        "spaces.safetensors": b"{" + b" " * (31 << 20) + b"}",
        "name.safetensors": b'{"' + b"x" * (31 << 20) + b'":1}',
        "empty.safetensors": b"{"
        + b",".join(
            b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1 << 18)
        )
        + b"}",
        "lists.json": lists,
        "strings.json": b'{"a":"' + "\N{GRINNING FACE}".encode() * (7 << 20) + b'"}',
    }
    for name, text in texts.items():
        header = len(text).to_bytes(8, "little") if name.endswith("safetensors") else b""
        (tmp_path / name).write_bytes(header + text)
        command = [sys.executable, "-c", HOSTILE, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        grown, most, units = map(float, done.stdout.splitlines()[-1].split())
        assert most < 300 and units < 20, f"{name}: {done.stdout}, grew by {grown} MiB"
        (tmp_path / name).unlink()
