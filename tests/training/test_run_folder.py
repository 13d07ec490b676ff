"""One run in a folder at a time; an older run's files are kept under other names."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import Config, UserError
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.training.run_folder import RunFolder, write_whole

HOLD = """
import sys
from dsv3_jax.training.run_folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use .*process {holder.pid} on .*--run-dir"):
            RunFolder(tmp_path / "run").__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunFolder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == [], "the lock goes with the run"


def test_a_folder_that_cannot_be_used_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"--run-dir {path} cannot be used: "):
            RunFolder(path).__enter__()
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_of_other_things_is_not_taken_for_a_run(tmp_path):
    for name in ("LICENSE", "config.json", "train.py"):
        (tmp_path / name).write_text("of a project")
    with pytest.raises(UserError, match=r"--run-dir .* holds no run, but config.json, LICENSE"):
        RunFolder(tmp_path).__enter__()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LICENSE", "config.json", "train.py"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone/away")
    with pytest.raises(OSError, match="cannot be used: it is a link to nowhere"):
        RunFolder(tmp_path / "nowhere").__enter__()


def test_a_new_run_keeps_an_older_one_s_files(tmp_path):
    others = ("vocab.json", "LICENSE", "tokenization_kimi.py")  # of the weights it began with
    for name in ("config.json", "tokenizer.json", *others):
        (tmp_path / name).write_text("older")
    (tmp_path / "metrics.old-1.jsonl").write_text("")
    (tmp_path / "metrics.jsonl").write_text("older")
    with RunFolder(tmp_path) as folder:
        folder.claim(Config(), ByteTokenizer(), new=True)
    for name in ("config.old-2.json", "tokenizer.old-2.json", "metrics.old-2.jsonl"):
        assert (tmp_path / name).read_text() == "older"
    for name in ("tokenizer.json", *others):
        assert not (tmp_path / name).exists(), "bytes have no file"
    assert '"seed"' in (tmp_path / "config.json").read_text()


def test_a_resumed_run_leaves_files_that_are_right(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.claim(Config(), ByteTokenizer(), new=True)
        before = (tmp_path / "config.json").stat()
        folder.claim(Config(), ByteTokenizer(), new=False)
        assert (tmp_path / "config.json").stat().st_mtime_ns == before.st_mtime_ns
        folder.claim(Config(seed=1), ByteTokenizer(), new=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    assert '"seed": 1' in (tmp_path / "config.json").read_text()


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_bytes(b"older")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; 5 bytes are wanted.*config.json"):
        write_whole(path, b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert path.read_bytes() == b"older"
