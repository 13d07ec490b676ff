"""The report: plots that exist, hold what was measured, and clear refusals."""

import json
import math

import numpy as np
import pytest

from dsv3_jax.analysis import report
from dsv3_jax.config import UserError

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.figure")
pytest.importorskip("matplotlib.image")
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(run_dir, num_lines=12, num_layers=3, **extra):
    rng = np.random.default_rng(0)
    lines = []
    for step in range(10, 10 * num_lines + 1, 10):
        ce = 5 * math.exp(-step / 60) + 1
        load = rng.dirichlet(np.ones(7), num_layers)
        record = {"step": step, "loss": ce + 0.5, "ce": ce, "lr": 1e-3, "batch_size": step}
        record |= {"expert_load": load.tolist(), **extra}
        if step % 40 == 0:
            record |= {"val_loss": ce + 0.1, "val_bits_per_byte": (ce + 0.1) / math.log(2)}
        lines.append(json.dumps(record))
    lines.append(json.dumps({"step": 10 * num_lines, "seconds": {"step": 30.5, "compile": 9}}))
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run_dir


def draw(plot, run_dir):
    """The Figure that one plot draws, to look into."""
    figure = matplotlib.figure.Figure()
    assert plot(figure, report.read_metrics(run_dir), run_dir, "run")
    return figure


def test_every_plot_is_written(tmp_path):
    written = report.write_report(make_run(tmp_path / "run"))
    names = ["loss", "learning_rate", "expert_load", "time"]
    assert written == [tmp_path / "run" / "plots" / f"{name}.png" for name in names]
    for path in written:
        assert path.read_bytes().startswith(PNG)
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 300 and image.shape[1] > 800
        assert image[..., :3].std() > 0.02, "blank"


def test_one_line_or_lost_numbers_still_make_plots(tmp_path):
    run = make_run(tmp_path, num_lines=1)
    assert len(report.write_report(run)) == 4
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":20,"loss":null,"lr":0.1,"expert_load":[[null,null],[0.5,0.5]]}\n')
        file.write('{"step":30,"loss":2')
    assert len(report.write_report(run)) == 4


def test_only_what_was_measured_is_plotted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"loss":2.0}\n{"step":2,"loss":1.5}\n')
    assert [p.name for p in report.write_report(tmp_path)] == ["loss.png"]


def test_loss_plot_lines_up_bits_per_byte(tmp_path):
    (axes,) = draw(report._plot_loss, make_run(tmp_path)).axes
    (right,) = axes.child_axes
    low, high = axes.get_ylim()
    assert right.get_ylabel() == "validation bits per byte"
    forward, _ = right._functions
    assert forward(high) == pytest.approx(high / math.log(2))
    assert axes.get_ylabel() == "nats per token"
    assert low < 1.5 and high > 5.5


def test_heatmap_shows_load_relative_to_balance(tmp_path):
    run = make_run(tmp_path, num_layers=4)
    model = {"first_k_dense_replace": 2, "num_hidden_layers": 5}
    (run / "config.json").write_text(json.dumps({"model": model}))
    panels = draw(report._plot_expert_load, run).axes[:4]
    titles = [axes.get_title("left") or axes.get_title() for axes in panels]
    assert [t.split(":")[0] for t in titles] == ["layer 2", "layer 3", "layer 4", "MTP 1"]
    records = [r for r in report.read_metrics(run) if "expert_load" in r]
    for layer, axes in enumerate(panels):
        (mesh,) = axes.collections
        shown = np.asarray(mesh.get_array()).reshape(7, len(records))
        expected = np.array([r["expert_load"][layer] for r in records]).T * 7
        np.testing.assert_allclose(shown, expected)
        assert mesh.get_clim() == (0.0, 2.0), "balanced, 1, has the centre colour"
        last = max(records[-1]["expert_load"][layer]) * 7 - 1
        assert f"MaxVio {last:.2f}" in titles[layer]


def test_long_runs_and_deep_models_are_thinned():
    steps, values = report._thinned(np.arange(1000), np.arange(1000.0)[:, None])
    assert len(steps) == len(values) == 250
    assert values.mean() == 499.5
    assert report._grid(1) == (1, 1)
    assert report._grid(4) == (2, 2)
    assert report._grid(58) == (6, 10)


def test_time_of_every_start_is_added(tmp_path):
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":130,"seconds":{"step":69.5,"eval":1}}\n')
    (axes,) = draw(report._plot_time, run).axes
    lengths = {
        label.get_text(): bar.get_width()
        for label, bar in zip(axes.get_yticklabels(), axes.patches)
    }
    assert lengths == {"eval": 1.0, "compile": 9.0, "step": 100.0}
    assert "110.0 s in all" in axes.get_title("left") + axes.get_title()


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        report.write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"lo')
    with pytest.raises(UserError, match="holds no metrics yet"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"loss":null}\n')
    with pytest.raises(UserError, match="holds no loss"):
        report.write_report(tmp_path)
    assert not (tmp_path / "plots").exists()
