"""The safetensors codec: what it writes comes back, the library agrees, bad headers are named."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.interop import safetensors as codec

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.linspace(-448, 448, 7).astype(ml_dtypes.float8_e4m3fn),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    codec.save_file(TENSORS, tmp_path / "x", {"format": "pt"})
    found = codec.load_file(tmp_path / "x")
    assert {n: (t.dtype, t.shape, t.tobytes()) for n, t in found.items()} == {
        n: (t.dtype, t.shape, t.tobytes()) for n, t in TENSORS.items()
    }
    assert codec.read_header(tmp_path / "x")[1] == {"format": "pt"}


def test_tensors_are_aligned_to_their_item_size(tmp_path):
    codec.save_file(TENSORS, tmp_path / "x")
    tensors, _ = codec.read_header(tmp_path / "x")
    assert all(t.start % codec.DTYPES[t.dtype].itemsize == 0 for t in tensors.values())


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {n: t for n, t in TENSORS.items() if t.dtype == np.float32}
    codec.save_file(plain, tmp_path / "ours", {"format": "pt"})
    library.save_file(plain, tmp_path / "theirs", {"format": "pt"})
    for found in (library.load_file(tmp_path / "ours"), codec.load_file(tmp_path / "theirs")):
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            np.testing.assert_array_equal(found[name], tensor)


def test_the_library_agrees_on_bf16_and_float8_bytes(tmp_path):
    library = pytest.importorskip("safetensors")
    codec.save_file(TENSORS, tmp_path / "x")
    found = dict(library.deserialize((tmp_path / "x").read_bytes()))
    for name, tensor in TENSORS.items():
        assert bytes(found[name]["data"]) == tensor.tobytes()
        assert found[name]["dtype"] == codec.DTYPE_NAMES[tensor.dtype]


def test_rows_and_parts_are_read_alone(tmp_path):
    stack = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    codec.save_file({"stack": stack}, tmp_path / "x")
    tensor = codec.read_header(tmp_path / "x")[0]["stack"]
    np.testing.assert_array_equal(tensor.read(1, 3), stack[1:3])
    np.testing.assert_array_equal(tensor.at(2, (2, 4)).read(1, 2), stack[2, 1:2])


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    codec.save_file({"a": np.ones(1000, np.float32)}, tmp_path / "x")
    tensor = codec.read_header(tmp_path / "x")[0]["a"]
    with open(tmp_path / "x", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match="ends before"):
        tensor.read()


TWICE = b'{"a":%s,"a":%s}' % (2 * (json.dumps(entry([1], 0, 4)).encode(),))
BAD = {
    "empty file": (b"", "no safetensors"),
    "header longer than the file": (raw({}, length=1 << 40), "exceed the file"),
    "header too large": (b"LARGE", "exceed"),
    "not json": (raw(b"{nope"), "x: "),
    "not an object": (raw(b"[1]"), "does not start"),
    "deep nesting": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "x: "),
    "a name twice": (raw(TWICE, b"1234"), "'a' appears twice"),
    "unknown dtype": (raw({"a": entry([1], 0, 4, "F4")}, b"1234"), "'a' has dtype"),
    "negative size": (raw({"a": entry([-1], 0, 4)}, b"1234"), "'a' has an impossible shape"),
    "boolean size": (raw({"a": entry([True], 0, 4)}, b"1234"), "'a' has an impossible shape"),
    "size beyond 64 bits": (raw({"a": entry([1 << 70], 0, 4)}, b"1234"), "impossible shape"),
    "size and offsets differ": (raw({"a": entry([2], 0, 4)}, b"1234"), "'a' is F32"),
    "product overflows": (raw({"a": entry([1 << 40, 1 << 40], 0, 4)}, b"1234"), "'a' is F32"),
    "backwards": (raw({"a": entry([1], 4, 0)}, b"1234"), "'a' is F32"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)), "'b' overlaps"),
    "gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "'b' leaves a gap"),
    "cut off": (raw({"a": entry([2], 0, 8)}, b"1234"), "cut off"),
    "trailing bytes": (raw({"a": entry([1], 0, 4)}, b"12345"), "after the last"),
    "extra key": (raw({"a": entry([1], 0, 4) | {"x": 1}}, b"1234"), "'a' must have"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "NaN": (raw(b'{"a":NaN}'), "'a' must have"),
    "half a surrogate pair": (raw(b'{"\\ud800":1}'), "is no name of a tensor"),
    "terminal escape": (raw({"\x1b[31m": entry([1], 0, 4)}, b"1234"), r"'\\x1b.*is no name"),
    "key twice in an entry": (raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "'dtype' appears twice"),
    "metadata twice": (
        raw(b'{"__metadata__":{},"__metadata__":{}}'),
        "metadata__' appears twice",
    ),
    "comma at the end": (raw(b'{"a":{},}'), "no JSON object"),
    "two objects": (raw(b"{}{}"), "no JSON object"),
    "long entry": (raw({"a": entry([1] * (1 << 19), 0, 4)}, b"1234"), "longer than 983040"),
    "many dims": (raw({"a": entry([1] * 17, 0, 4)}, b"1234"), "impossible shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_refused_by_name(tmp_path, monkeypatch, case):
    data, message = BAD[case]
    if data == b"LARGE":
        monkeypatch.setattr(codec, "MAX_HEADER_BYTES", 100)
        data = raw({"a" * 200: entry([1], 0, 4)}, b"1234")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        codec.read_header(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "MAX_TENSORS", 3)
    (tmp_path / "x").write_bytes(raw({str(i): entry([0], 0, 0) for i in range(3)}))
    assert len(codec.read_header(tmp_path / "x")[0]) == 3
    (tmp_path / "x").write_bytes(raw({str(i): entry([0], 0, 0) for i in range(4)}))
    with pytest.raises(UserError, match="more than 3 tensors"):
        codec.read_header(tmp_path / "x")


def _header_or_user_error(path):
    try:
        tensors, _ = codec.read_header(path)
    except UserError:
        return
    for tensor in tensors.values():
        assert tensor.read().nbytes == tensor.nbytes


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_never_worse(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged"
    codec.save_file(TENSORS, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _header_or_user_error(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*codec.DTYPES, "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 50), min_size=2, max_size=2) | json_values,
    },
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), entries | json_values, max_size=4), st.binary(max_size=64)
)
def test_any_json_header_is_read_or_refused(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(raw(header, data))
    _header_or_user_error(path)
