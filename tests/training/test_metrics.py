"""metrics.jsonl is one whole history whatever happens; statistics match their definitions."""

import errno
import io
import json
import logging
import os
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from dsv3_jax.analysis.hardware import peak_bf16_flops
from dsv3_jax.config import Config
from dsv3_jax.training import metrics
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.metrics import MetricsLog
from dsv3_jax.training.run_log import keep_log, set_up_logging
from dsv3_jax.training.sinks import open_sinks


def lines_of(run_dir) -> list[dict]:
    """The records of a run, where each line must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_steps(run_dir, steps, resumed_from=None, **kwargs):
    with MetricsLog(run_dir, steps=60, resumed_from=resumed_from) as log:
        for step in steps:
            log.log(step, {"loss": 5.0 - step / 100, **kwargs})


def test_a_line_a_step_on_disk_at_once(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run", steps=600)
    log.log(10, {"loss": 2.5, "ce": 2.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.5})
    assert lines_of(tmp_path / "run") == [
        {"step": 10, "loss": 2.5, "ce": 2.25, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.5}
    ]
    out = capsys.readouterr().out
    assert out == "step 10/600 loss 2.5000 ce 2.2500 lr 1.00e-03 grad_norm 0.500 tok/s 1,234\n"
    time.sleep(0.01)
    log.log(20, {"loss": 2.0, "val_loss": 2.1, "val_bits_per_byte": 3.03, "mfu": None})
    assert "step 20/600 loss 2.0000 val_loss 2.1000 val_bits_per_byte 3.0300 eta 0:0" in (
        capsys.readouterr().out
    )
    log.record(20, {"seconds": {"step": 1.0}})
    assert capsys.readouterr().out == ""
    assert [r["step"] for r in lines_of(tmp_path / "run")] == [10, 20, 20]
    log.close()
    log.close()


def test_what_is_not_finite_becomes_null(tmp_path, capsys):
    values = {
        "loss": float("nan"),
        "grad_norm": np.float32(np.inf),
        "lr": np.array(0.5, ml_dtypes.bfloat16),
        "count": np.int64(3),
        "nested": {"bias": np.array([[1.0, -np.inf]], np.float32), "list": [float("nan"), 1]},
        "skipped": True,
        "mfu": None,
    }
    with MetricsLog(tmp_path, steps=10) as log:
        log.log(np.int32(1), values)
    assert lines_of(tmp_path) == [
        {
            "step": 1,
            "loss": None,
            "grad_norm": None,
            "lr": 0.5,
            "count": 3,
            "nested": {"bias": [[1.0, None]], "list": [None, 1]},
            "skipped": True,
            "mfu": None,
        }
    ]
    assert "loss nan grad_norm" not in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b'{"step":50,"loss":4.', b"\0" * 30, b'{"step":50}', b"[1]\n"])
def test_a_torn_last_line_is_dropped_on_resume(tmp_path, torn):
    write_steps(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write_steps(tmp_path, [30], resumed_from=20)
    assert [r["step"] for r in lines_of(tmp_path)] == [10, 20, 30]


def test_resume_cuts_what_will_be_written_anew(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40], history="first")
    write_steps(tmp_path, [30, 40, 50], resumed_from=20, history="second")
    records = lines_of(tmp_path)
    assert [r["step"] for r in records] == [10, 20, 30, 40, 50]
    assert [r["history"] for r in records] == ["first"] * 2 + ["second"] * 3


def test_a_new_run_keeps_the_metrics_of_an_older_one(tmp_path):
    for run in range(3):
        write_steps(tmp_path, [10 + run])
    assert [r["step"] for r in lines_of(tmp_path)] == [12]
    old = [json.loads((tmp_path / f"metrics.old-{n}.jsonl").read_text()) for n in (1, 2)]
    assert [r["step"] for r in old] == [10, 11]


def test_other_processes_write_nothing(tmp_path, capsys):
    with MetricsLog(tmp_path / "run", steps=10, primary=False) as log:
        log.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_an_unwritable_run_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        MetricsLog(tmp_path / "file", steps=1)


def test_tensorboard_mirrors_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(run_dir=str(tmp_path), tensorboard=True)
    with MetricsLog(tmp_path, steps=10, sinks=open_sinks(config, None)) as log:
        log.log(1, {"loss": 1.5, "expert_load": [[0.5, 0.5]], "mfu": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"expert_load" not in content


class FakeWandb:
    """What is used of wandb, keeping the calls."""

    def __init__(self):
        self.calls, self.id = [], "made-1"

    def init(self, **options):
        self.calls.append(("init", options["mode"], options["id"], options["config"]["seed"]))
        return self

    def log(self, numbers, step):
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append("finish")


def test_wandb_gets_the_numbers_and_a_resumed_run_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(run_dir=str(tmp_path), wandb="offline", seed=7)
    for resumed_from in (None, 1):
        sinks = open_sinks(config, resumed_from)
        with MetricsLog(tmp_path, steps=10, resumed_from=resumed_from, sinks=sinks) as log:
            log.log(2, {"loss": 1.5, "expert_load": [[0.5, 0.5]]})
            log.record(3, {"seconds": {"step": 1.0}})
    of_one = [(2, {"loss": 1.5}), "finish"]
    first, second = (("init", "offline", id, 7) for id in (None, "made-1"))
    assert fake.calls == [first, *of_one, second, *of_one]


def test_a_sink_without_its_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"dsv3_jax\[wandb\]"):
        open_sinks(Config(run_dir=str(tmp_path), wandb="offline"), None)
    assert open_sinks(Config(run_dir=str(tmp_path)), None) == []


@pytest.mark.slow
def test_wandb_writes_a_run_offline(tmp_path):
    pytest.importorskip("wandb", reason="needs: pip install 'dsv3_jax[wandb]'")
    config = Config(run_dir=str(tmp_path), wandb="offline")
    with MetricsLog(tmp_path, steps=10, sinks=open_sinks(config, None)) as log:
        log.log(1, {"loss": 1.5})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # a process of wandb's own writes it, also after the run's end
    while b"loss" not in file.read_bytes():
        assert time.monotonic() < end, "nothing of the run was written"
        time.sleep(0.1)


def test_log_txt_gets_messages_and_progress(tmp_path, capsys):
    set_up_logging(tmp_path)
    try:
        logging.getLogger("dsv3_jax.training.checkpoint").warning("step 5 is damaged")
        logging.getLogger("absl").info("forty lines a save")
        logging.getLogger("absl").error("a page of traceback")
        with MetricsLog(tmp_path, steps=10) as log:
            log.log(1, {"loss": 1.5})
    finally:
        set_up_logging(None)
    text = (tmp_path / "log.txt").read_text()
    assert "WARNING dsv3_jax.training.checkpoint: step 5 is damaged" in text
    assert "step 1/10 loss 1.5000" in text
    assert "forty" not in text
    assert "a page of traceback" in text
    out = capsys.readouterr().out
    assert out == "warning: step 5 is damaged\nstep 1/10 loss 1.5000\n"


def test_what_is_said_before_the_folder_is_known_reaches_log_txt_later(tmp_path, capsys):
    set_up_logging()
    try:
        logging.getLogger("dsv3_jax").info("before")
        assert not (tmp_path / "run").exists()
        keep_log(tmp_path / "run")
        logging.getLogger("dsv3_jax").info("after")
    finally:
        set_up_logging(None)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["before", "after"]
    assert capsys.readouterr().out == "before\nafter\n"


def test_a_full_disk_is_said_once_by_the_log(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    set_up_logging(tmp_path)
    try:
        for line in ("one", "two"):
            logging.getLogger("dsv3_jax").info(line)
    finally:
        set_up_logging(None)
    said = capsys.readouterr().err
    assert said.count("log.txt cannot be written: No space left on device") == 1
    assert "Traceback" not in said


def test_a_full_disk_is_said_with_the_size_wanted(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsLog(tmp_path, steps=9) as log:
        monkeypatch.setattr(os, "fsync", full)
        said = r"No space left on device; a line of 22 bytes is wanted: .*metrics.jsonl"
        with pytest.raises(OSError, match=said):
            log.record(3, {"loss": 1.5})


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_progress_line_keeps_the_eta(width):
    now = [0.0]
    console = Console(file=io.StringIO(), width=width, color_system=None)
    progress = Progress(*metrics._columns(), console=console, expand=True, get_time=lambda: now[0])
    task = progress.add_task("", total=1234567)
    for completed in (100, 1100, 2100):
        numbers = "loss 2.3456 lr 2.20e-04 tok/s 1,234,567"
        progress.update(task, completed=completed, description=numbers)
        now[0] += 1
    console.print(progress.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert len(line) <= width
    assert line.startswith("step 2100/1234567 ") and line.endswith(" eta 20:33"), line


# Statistics


def test_the_clock_books_every_second_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 1  # before any phase
    with clock("step"):
        now[0] += 10
        with clock("checkpoint"):
            now[0] += 2
        now[0] += 5
    with pytest.raises(KeyError), clock("eval"):
        now[0] += 3
        raise KeyError("a failed evaluation is booked too")
    with clock("step"):
        now[0] += 4
        running = clock.seconds()
    seconds = clock.seconds()
    expected = {"step": 19.0, "checkpoint": 2.0, "eval": 3.0, "other": 1.0}
    assert seconds == running == {**dict.fromkeys(Clock.PHASES, 0.0), **expected}
    with pytest.raises(ValueError, match="coffee"), clock("coffee"):
        pass


@pytest.mark.misuse
def test_expert_statistics():
    load = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 6]])
    bias = np.array([[0.0, 0.001, -0.002, 0.0]] * 4, np.float32)
    stats = metrics.expert_stats(load, bias)
    none = [None] * 4
    assert stats["expert_load"] == [[0.25] * 4, [1, 0, 0, 0], none, [0.0833, 0.167, 0.25, 0.5]]
    assert stats["max_vio"] == [0.0, 3.0, None, 1.0]
    assert stats["dead_experts"] == [0, 3, 4, 0]
    assert stats["bias_range"] == [[-0.002, 0.001]] * 4
    assert "bias_range" not in metrics.expert_stats(load)
    with pytest.raises(ValueError, match=r"\(4,\).*\[layers, experts\]"):
        metrics.expert_stats(load[0])


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peaks_are_known_or_none(kind, tflops):
    assert peak_bf16_flops(kind) == (tflops and pytest.approx(tflops * 1e12))
