"""metrics.jsonl of strangers: a line is a record in the form that a run gives it, or it is none."""

import json
import os

import pytest

from dsv3_jax.config import UserError, records
from dsv3_jax.config.records import read_records, records_in

GOOD = {
    "step": 3,
    "loss": 2.5,
    "ce": None,
    "expert_load": [[0.25, 0.75], [None, None]],
    "max_vio": [0.5, None],
    "seconds": {"step": 1.5, "other": 0},
    "surprise": {"a": ["b"]},
}


def write(tmp_path, *lines):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    return tmp_path / "metrics.jsonl"


def line(**changes):
    return json.dumps(GOOD | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "bad",
    [
        b"\n",
        b"[1]\n",
        b'{"step": 3}',  # no end
        b'{"loss": 1.0}\n',
        b'{"step": 3, "loss": 1e999}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        b'{"step": 3, "x": [' + b"0," * (1 << 20) + b"0]}\n",
        line(step=-1),
        line(step=True),
        line(step=1 << 62),
        line(loss="2.5"),
        line(loss=10**50),
        line(tokens=[1]),
        line(expert_load=[0.5, 0.5]),
        line(expert_load=[[0.5], [0.5, 0.5]]),
        line(expert_load=[["0.5"]]),
        line(max_vio=0.5),
        line(seconds=[1.0]),
        line(seconds={"$x": 1.0}),
        line(seconds={"step": "1"}),
    ],
)
def test_what_no_run_writes_is_no_record(tmp_path, bad):
    path = write(tmp_path, line(), bad, line(step=4)) if bad.endswith(b"\n") else None
    if path is None:
        path = write(tmp_path, line(), line(step=4), bad)
    found, torn = read_records(path)
    assert found == [GOOD, GOOD | {"step": 4}] and torn == 1


def test_lines_are_bounded_before_they_are_read_and_only_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: a line of more than 1000 bytes"):
        read_records(write(tmp_path, line(), line(x="x" * 1000)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_records(tmp_path / "pipe")


def test_loads_that_belong_to_no_step_are_read_when_asked(tmp_path):
    path = write(tmp_path, b'{"expert_load": [[1.0]]}\n')
    assert read_records(path) == ([], 1)
    ((_, record),) = records_in(path, of_steps=False)
    assert record == {"expert_load": [[1.0]]}
