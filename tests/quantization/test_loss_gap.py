"""The loss gap of FP8 training: its measure, a short run of it, and formats on trained experts."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis.loss_gap import (
    gaps_of,
    last_quarter,
    plot_loss_gap,
    read_losses,
    relative_gap,
    smooth,
)
from dsv3_jax.config import QuantConfig, UserError, load_config
from examples import combine_formats, fp8_loss_gap

# 100 steps of a 0.1M-parameter model: two runs that round differently part by some 0.1 % by chance.
# A recipe with a wrong scale or a forgotten product is off by several.
SHORT_RUN = 1.0

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=272, hidden_size=64, num_hidden_layers=2, max_position_embeddings=64,
            bos_token_id=256, eos_token_id=257, num_attention_heads=2, q_lora_rank=32,
            kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
            rope_scaling=None, intermediate_size=128, moe_intermediate_size=64,
            first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=2, num_nextn_predict_layers=0, initializer_range=0.08,
        ),
        data=DataConfig(path={path!r}, val_fraction=0.1),
        train=TrainConfig(batch_size=8, seq_len=48),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        schedule=ScheduleConfig(warmup_steps=10, batch_start_ratio=1.0, bias_update_speed=0.01),
    )
"""


def test_smoothing_starts_at_the_first_loss_and_forgets_a_tenth_a_step():
    np.testing.assert_allclose(smooth([5.0, 5.0, 5.0]), 5.0)
    np.testing.assert_allclose(smooth([1.0, 0.0, 0.0]), [1.0, 0.9, 0.81])


def test_the_gap_is_relative_and_over_the_last_quarter():
    baseline = [4.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(relative_gap([1.01 * x for x in baseline], baseline), 1.0)
    assert last_quarter(np.array([9.0, 9, 9, 9, 9, 9, 2, 4])) == 3.0
    losses = {"bf16": {0: baseline, 1: baseline}, "fp8_paper": {0: [0.99 * x for x in baseline]}}
    assert gaps_of(losses, "fp8_paper") == {0: pytest.approx(-1.0)}


def test_a_run_that_has_only_begun_is_left_out(tmp_path):
    (tmp_path / "bf16-seed0.jsonl").write_text("")  # opened by another process, nothing written
    (tmp_path / "fp8_paper-seed0.jsonl").write_text('{"config": {}}\n{"step": 2, "ce": [3, 2]}\n')
    assert read_losses(tmp_path) == {"fp8_paper": {0: [3, 2]}}


def test_presets_that_cannot_be_compared_yet_are_named(tmp_path, capsys):
    """Calls that share a folder: one has only BF16 so far, one a seed that BF16 lacks."""
    line = '{"config": {}}\n{"step": 2, "ce": [3, 2]}\n'
    (tmp_path / "bf16-seed0.jsonl").write_text(line)
    fp8_loss_gap.report(tmp_path)
    assert capsys.readouterr().out.startswith("wrote ")
    (tmp_path / "fp8_paper-seed1.jsonl").write_text(line)
    fp8_loss_gap.report(tmp_path)
    assert "fp8_paper: no seed that bf16 has run" in capsys.readouterr().out


def test_a_run_without_a_baseline_is_refused(tmp_path):
    with pytest.raises(UserError, match="no bf16"):
        plot_loss_gap({"fp8_paper": {0: [1.0]}})
    with pytest.raises(UserError, match="no PRESET"):
        read_losses(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of both runs, the options that made them, the trainers with their last states)."""
    root = tmp_path_factory.mktemp("loss_gap")
    path, folder = root / "small.py", root / "out"
    path.write_text(CONFIG.format(path=str(Path(__file__).parent)))
    folder.mkdir()
    config = load_config(path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        trainers = {}
        for preset in ("bf16", "fp8_paper"):
            run = dataclasses.replace(config, quant=QuantConfig(preset))
            trainers[preset] = fp8_loss_gap.Trainer(run)
            trainers[preset].run(0, folder, every=40)
        yield folder, ["--config", str(path), "--seeds", "0", "--steps", "100"], trainers


@pytest.mark.slow
def test_fp8_training_stays_near_bf16(runs):
    """The short form of what docs/numerics.md shows over 400 steps of three seeds."""
    folder = runs[0]
    losses = read_losses(folder)
    assert [len(losses[preset][0]) for preset in ("bf16", "fp8_paper")] == [100, 100]
    assert losses["bf16"][0] != losses["fp8_paper"][0]
    assert np.mean(losses["bf16"][0][-10:]) < 0.8 * losses["bf16"][0][0], "it has learned"
    gap = gaps_of(losses, "fp8_paper")[0]
    assert abs(gap) < SHORT_RUN, gap


@pytest.mark.slow
def test_a_complete_run_is_not_repeated_and_one_of_another_config_is(runs, monkeypatch, capsys):
    folder, options, _ = runs
    done = {path: path.read_text() for path in folder.glob("*.jsonl")}
    called = []

    def losses(self, seed):
        called.append(self.config.train.seq_len)
        return iter([1.0] * self.config.train.steps)

    monkeypatch.setattr(fp8_loss_gap.Trainer, "losses", losses)
    monkeypatch.setattr(sys, "argv", ["fp8_loss_gap.py", *options, "--out", str(folder)])
    fp8_loss_gap.main()
    assert "fp8_paper: " in capsys.readouterr().out
    assert not called and {path: path.read_text() for path in done} == done
    assert (folder / "loss_gap.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seq-len", "47", "--presets", "bf16"])
    fp8_loss_gap.main()
    assert called == [47]
    (folder / "bf16-seed0.jsonl").write_text(done[folder / "bf16-seed0.jsonl"])


@pytest.mark.slow
def test_the_figure_has_a_line_a_run(runs):
    figure = plot_loss_gap(read_losses(runs[0]))
    left, right = figure.axes
    assert len(left.lines) == 2
    assert len(right.lines) == 3  # zero, the seed, and the mean


def test_the_figure_shows_a_gap_of_any_size():
    figure = plot_loss_gap({"bf16": {0: [2.0, 2.0]}, "fp8_paper": {0: [2.0, 3.0]}})
    assert figure.axes[1].get_ylim()[1] > 5.0  # percent, smoothed


@pytest.mark.slow
def test_logfmt_beats_fp8_formats_on_what_trained_experts_send(runs):
    """The order that the paper's section 3.2 found, on outputs of routed experts."""
    trainer = runs[2]["bf16"]
    variables = {"params": trainer.state.params, "router": trainer.state.router}
    model = dataclasses.replace(trainer.config.model, dtype="float32")  # else BF16 is exact
    text = np.frombuffer(Path(__file__).read_bytes()[:192], np.uint8).astype(np.int32)
    (x,) = combine_formats.expert_outputs(variables, jnp.asarray(text.reshape(4, 48)), model)
    error = {
        name: float(jnp.linalg.norm(round_trip(x) - x) / jnp.linalg.norm(x))
        for name, (round_trip, _) in combine_formats.FORMATS.items()
    }
    assert error["LogFMT-8"] < error["E4M3"] < error["E5M2"]
    assert error["BF16"] < error["LogFMT-10"] < 3 * error["BF16"]
