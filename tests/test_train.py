"""train.py and infer.py from the outside: what a run leaves, resuming, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import infer
import train
from dsv3_jax import cli, loading
from dsv3_jax.config import load_config
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.training.manifest import steps_in
from dsv3_jax.training.restore import read_meta, restore, state_sha256
from tests.helpers import write_small_run

ROOT = Path(__file__).parent.parent

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=272, hidden_size=32, num_hidden_layers=2, max_position_embeddings=64,
            bos_token_id=256, eos_token_id=257, num_attention_heads=2, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            rope_scaling=None, intermediate_size=32, moe_intermediate_size=16,
            first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, dtype="float32",
        ),
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps=4, batch_size=4, seq_len=24, log_every=1, eval_every=2,
                          eval_batches=2, sample_tokens=8, sample_every=2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("config"), CONFIG)


@pytest.fixture(scope="module")
def finished_run(config_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(["--config", str(config_file), "--run-dir", str(run)]) == 0
    return run


def exit_code(monkeypatch, main, argv) -> int:
    """The exit code of a command line run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(main)
    return stopped.value.code


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_people_rely_on(finished_run):
    assert steps_in(finished_run / "checkpoints") == [2, 4]
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").open()]
    assert [sample["step"] for sample in samples] == [2, 4]
    last = samples[-1]
    assert (
        finished_run / "sample.txt"
    ).read_text() == f"{last['prompt']}\N{BROKEN BAR}{last['text']}"
    for name in ("config.json", "metrics.jsonl", "log.txt", "sample.txt", "plots/loss.png"):
        assert (finished_run / name).stat().st_size > 0, name
    lines = lines_of(finished_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    keys = {"step", "loss", "ce", "mtp", "balance", "lr", "grad_norm", "tokens_per_s"}
    layers = {"expert_load", "max_vio", "bias_range"}
    assert all(keys | layers <= line.keys() for line in lines[:4])
    assert {"val_loss", "val_bits_per_byte"} <= lines[3].keys()
    assert lines[3]["loss"] < lines[0]["loss"]
    assert set(lines[4]["seconds"]) >= {"compile", "step", "eval", "checkpoint"}
    loads = lines[0]["expert_load"]
    assert len(loads) == 2, "the MoE layer and the MTP module"
    assert all(abs(sum(load) - 1) < 0.01 for load in loads)


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_uninterrupted_one_also_without_matplotlib(
    config_file, finished_run, tmp_path, monkeypatch, caplog
):
    run = tmp_path / "resumed"
    argv = ["--config", str(config_file), "--run-dir", str(run)]
    assert train.main(argv) == 0
    newest = run / "checkpoints" / "4"
    newest.rename(tmp_path / "set-aside")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train.main(argv) == 0
    assert "no plots: plots need matplotlib" in caplog.text
    first, second = lines_of(finished_run), lines_of(run)
    for line, again in zip(first[:4], second[:4], strict=True):
        assert line["loss"] == again["loss"]
        assert line["grad_norm"] == again["grad_norm"]
    assert whole_state(config_file, run) == whole_state(config_file, finished_run)


def whole_state(config_file, run) -> str:
    from dsv3_jax.training.state import init_state

    config = load_config(config_file)
    abstract = jax.eval_shape(lambda key: init_state(key, config), jax.random.key(0))
    state, _ = restore(run / "checkpoints", 4, abstract._asdict())
    return state_sha256(state)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_and_the_run_goes_on(config_file, tmp_path):
    run = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file)]
    command += ["--run-dir", str(run), "--train.steps", "100000"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    steps = steps_in(run / "checkpoints")
    # The step it was stopped in is saved, whether or not a regular save was due.
    assert steps[-1] == lines_of(run)[-1]["step"]


@pytest.mark.slow
def test_infer_continues_prompts_of_different_lengths(finished_run, capsys):
    argv = ["--checkpoint", str(finished_run), "--max-new-tokens", "5", "--temperature", "0"]
    assert infer.main([*argv, "--token-ids", "256,84,104", "--token-ids", "256,84"]) == 0
    together = capsys.readouterr().out.split()
    alone = []
    for ids in ("256,84,104", "256,84"):
        assert infer.main([*argv, "--token-ids", ids]) == 0
        alone += capsys.readouterr().out.split()
    assert together == alone
    assert all(0 <= int(token) < 272 for line in alone for token in line.split(","))


@pytest.mark.slow
def test_infer_streams_text_after_the_prompt(finished_run, capsys):
    argv = ["--checkpoint", str(finished_run), "--max-new-tokens", "4", "--prompt", "The quick"]
    assert infer.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("The quick")
    assert infer.main(argv) == 0
    assert capsys.readouterr().out == first, "the same seed writes the same text"


@pytest.mark.slow
@pytest.mark.parametrize("load", ["logged", "prompts"])
def test_infer_with_redundant_experts_says_the_same(load, finished_run, capsys):
    argv = ["--checkpoint", str(finished_run), "--max-new-tokens", "5", "--temperature", "0"]
    argv += ["--token-ids", "256,84,104"]
    assert infer.main(argv) == 0
    want = capsys.readouterr().out
    assert infer.main([*argv, "--redundant-experts", "3", "--expert-load", load]) == 0
    assert capsys.readouterr().out == want


@pytest.mark.slow
def test_infer_with_redundant_experts_on_a_mesh_says_the_same(finished_run, monkeypatch, capsys):
    argv = ["--checkpoint", str(finished_run), "--max-new-tokens", "3", "--temperature", "0"]
    argv += ["--token-ids", "256,84,104"]
    assert infer.main(argv) == 0
    want = capsys.readouterr().out.splitlines()[-1]
    argv += ["--mesh.node", "2", "--mesh.local", "2", "--redundant-experts"]
    assert infer.main([*argv, "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == want
    assert exit_code(monkeypatch, infer.main, [*argv, "3"]) == 2
    assert "do not divide over 4 devices" in capsys.readouterr().err


@pytest.mark.slow
def test_infer_holds_a_run_in_fp8(finished_run, capsys):
    argv = ["--checkpoint", str(finished_run), "--max-new-tokens", "3", "--temperature", "0"]
    assert infer.main([*argv, "--token-ids", "256,84,104", "--fp8"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split(",")) == 3
    assert "MB of them FP8" in shown.err


def test_dry_run_shows_shapes_and_memory_and_trains_nothing(config_file, tmp_path, capsys):
    run = tmp_path / "dry"
    argv = ["--config", str(config_file), "--run-dir", str(run), "--dry-run"]
    assert train.main(argv) == 0
    shown = capsys.readouterr().out
    assert "moe_layers/mlp/experts/gate_up_proj" in shown
    assert "[1, 4, 2, 16, 32]" in shown
    assert "memory per device" in shown
    assert "the model has its tokenizer's ids" in shown
    assert not run.exists()


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_says_so(config_file, tmp_path, monkeypatch, capsys):
    argv = ["--config", config_file, "--run-dir", tmp_path / "run", "--train.steps", 6]
    argv += ["--optimizer.learning-rate", "1e38", "--train.max-nonfinite-steps", 2]
    assert exit_code(monkeypatch, train.main, argv) == 1
    said = capsys.readouterr().err
    assert "2 steps in a row" in said and "checkpoint" in said


BAD_TRAINING = {
    "unknown option": (["--train.stepz", "3"], 2, "--train.steps"),
    "wrong type": (["--train.steps", "three"], 2, "--train.steps"),
    "dimensions": (["--model.n-group", "3", "--model.qk-rope-head-dim", "5"], 2, "use 6"),
    "mesh": (["--mesh.data", "4096", "--train.batch-size", "4096"], 2, "4096 devices"),
    "axis": (["--mesh.tensor", "3"], 2, "multiple of mesh.tensor=3"),
    "pipeline": (["--mesh.pipe", "64"], 2, "under 1f1b needs 64 stages"),
    "vocabulary": (["--model.vocab-size", "258"], 2, "258"),
    "corpus": (["--data.path", "no/such/place"], 2, "no/such/place"),
    "config": (["--config", "no_such_config.py"], 2, "no_such_config.py"),
    "resume": (["--resume", "yesterday"], 2, "yesterday"),
    "checkpoint step": (["--resume", "77"], 2, "77"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_options_get_one_message(case, config_file, tmp_path, monkeypatch, capsys):
    options, code, said = BAD_TRAINING[case]
    argv = ["--config", config_file, "--run-dir", tmp_path / "run", *options]
    assert exit_code(monkeypatch, train.main, argv) == code
    shown = capsys.readouterr()
    assert said in shown.err + shown.out
    assert "Traceback" not in shown.err


def test_all_wrong_dimensions_are_shown_together(config_file, monkeypatch, capsys):
    argv = ["--config", config_file, "--model.n-group", "3", "--train.micro-batch-size", "3"]
    assert exit_code(monkeypatch, train.main, argv) == 2
    shown = capsys.readouterr().err
    assert "n_group=3" in shown and "micro_batch_size=3" in shown


@pytest.mark.parametrize("content", [b"", b"text\0with a zero byte"], ids=["empty", "binary"])
def test_an_unusable_corpus_is_named(content, config_file, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    argv = ["--config", config_file, "--run-dir", tmp_path / "run", "--data.path", corpus]
    assert exit_code(monkeypatch, train.main, argv) == 2
    assert "corpus.txt" in capsys.readouterr().err


def test_an_unwritable_run_directory_is_the_environments_fault(
    config_file, tmp_path, monkeypatch, capsys
):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    argv = ["--config", config_file, "--run-dir", blocked / "run"]
    assert exit_code(monkeypatch, train.main, argv) == 1
    assert f"--run-dir {blocked}/run cannot be used" in capsys.readouterr().err


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run and what is in it."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


ANOTHER_RUN = {
    "architecture": (["--model.hidden-size", "64"], "model.hidden_size: 32 in the checkpoint, 64"),
    "seed": (["--seed", "3"], "seed: 0 in the checkpoint, 3 in this run"),
    "data": (["--data.path", "OTHER"], "data: sha256"),
    "rate": (
        ["--train.steps", "40", "--optimizer.learning-rate", "1"],
        "--schedule.accept-rate-jump",
    ),
}


@pytest.mark.parametrize("difference", ANOTHER_RUN)
def test_another_run_s_folder_is_refused_and_nothing_in_it_is_touched(
    difference, config_file, finished_run, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "other"
    other.mkdir()
    for number in range(12):
        (other / f"{number}.txt").write_text(f"Another text, {number}. " * 90)
    options, said = ANOTHER_RUN[difference]
    options = [word.replace("OTHER", str(other)) for word in options]
    before = contents(finished_run)
    argv = ["--config", config_file, "--run-dir", finished_run, *options]
    assert exit_code(monkeypatch, train.main, argv) == 2
    error = capsys.readouterr().err
    assert said in error and "Nothing was changed" in error
    assert contents(finished_run) == before


@pytest.mark.parametrize("steps", [4, 3])
def test_steps_that_are_done_leave_nothing_to_do(steps, config_file, finished_run, capsys):
    before = contents(finished_run)
    argv = ["--config", str(config_file), "--run-dir", str(finished_run)]
    assert train.main([*argv, "--train.steps", str(steps)]) == 0
    said = capsys.readouterr().out
    assert f"nothing to do: at step 4 of {steps}" in said and "train.steps: 4 -> 3" not in said
    assert contents(finished_run) == before


def test_a_run_cut_before_its_sample_writes_it(config_file, finished_run, tmp_path, capsys):
    run = tmp_path / "cut"
    shutil.copytree(finished_run, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    (run / "sample.txt").unlink()
    assert train.main(["--config", str(config_file), "--run-dir", str(run)]) == 0
    assert (run / "sample.txt").read_text() == (finished_run / "sample.txt").read_text()
    assert "seconds" in lines_of(run)[-1]


@pytest.mark.slow
def test_another_batch_goes_on_behind_the_rows_that_were_read(
    config_file, finished_run, tmp_path, caplog
):
    run = tmp_path / "longer"
    shutil.copytree(finished_run, run)
    options = ["--train.steps", "7", "--train.batch-size", "2", "--schedule.steps", "4"]
    argv = ["--config", str(config_file), "--run-dir", str(run), *options, "--tensorboard"]
    assert train.main(argv) == 0
    assert "train.batch_size: 4 -> 2" in caplog.text and "train.steps: 4 -> 7" in caplog.text
    done = [line for line in lines_of(run) if "tokens" in line]
    tokens = [line["tokens"] for line in done]
    assert tokens == sorted(tokens)
    assert tokens[-1] == tokens[3] + 3 * 2 * 24
    assert len({line["lr"] for line in done[3:]}) <= 2, "the last rate stays"
    _, meta = read_meta(run / "checkpoints")
    rows = read_meta(finished_run / "checkpoints")[1]["position"]["row"] + 6
    assert meta["position"] == {"step": 7, "row": rows, "tokens": tokens[-1]}
    assert any((run / "tensorboard").iterdir())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    finished_run, tmp_path, monkeypatch, capsys, caplog
):
    run = tmp_path / "damaged"
    shutil.copytree(finished_run, run)
    largest = max(
        (p for p in (run / "checkpoints/4/state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)
    options = ["--checkpoint", run, "--token-ids", "256,84", "--max-new-tokens", "2"]
    assert exit_code(monkeypatch, infer.main, options) == 0
    assert "checkpoints/4" in caplog.text and "sha256" in caplog.text
    assert exit_code(monkeypatch, infer.main, [*options, "--step", "4"]) == 1
    assert "sha256" in capsys.readouterr().err


BAD_INFERENCE = {
    "no checkpoint": (["--checkpoint", "nowhere", "--prompt", "x"], 2, "nowhere"),
    "no prompt": ([], 2, "--prompt"),
    "cache": (["--prompt", "x" * 40, "--cache-length", "32"], 2, "cache holds 32"),
    "positions": (["--prompt", "x" * 60], 2, "max_position_embeddings"),
    "ids": (["--token-ids", "1,two"], 2, "1,two"),
    "vocabulary": (["--token-ids", "1,9999"], 2, "9999"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], 2, "temperature"),
    "no devices": (["--prompt", "x", "--devices", "0"], 2, "--devices 0 must be positive"),
    "many places": (["--prompt", "x", "--redundant-experts", "1000000"], 2, "at most"),
    "loads to a folder": (["--prompt", "x", "--save-expert-load", "."], 2, "is a folder"),
    "no run": (["--checkpoint", "docs", "--prompt", "x"], 2, "docs is neither a run nor published"),
    "no tokenizer": (["--prompt", "x", "--tokenizer", ""], 2, "found no tokenizer's file"),
    "no stop": (["--prompt", "x", "--stop", ""], 2, "--stop is empty"),
    "no temperature": (["--prompt", "x", "--temperature", "nan"], 2, "must be finite"),
    "unknown option": (["--promt", "x"], 2, "--prompt"),
    "no loads": (
        ["--prompt", "x", "--redundant-experts", "2", "--expert-load", "nowhere"],
        2,
        "nowhere: no such file",
    ),
}


@pytest.mark.parametrize("case", BAD_INFERENCE)
def test_bad_inference_options_get_one_message(case, finished_run, monkeypatch, capsys):
    options, code, said = BAD_INFERENCE[case]
    assert exit_code(monkeypatch, infer.main, ["--checkpoint", finished_run, *options]) == code
    shown = capsys.readouterr()
    assert said in shown.err + shown.out
    assert "Traceback" not in shown.err


def test_infer_reads_no_optimizer_state(finished_run):
    config = load_config_of(finished_run)
    abstract = jax.eval_shape(lambda key: init_variables(key, config.model), jax.random.key(0))
    variables = loading.load(finished_run).variables
    assert jax.tree.structure(variables) == jax.tree.structure(abstract)


def load_config_of(run: Path):
    from dsv3_jax.config import config_from_dict

    return config_from_dict(json.loads((run / "config.json").read_text()))
