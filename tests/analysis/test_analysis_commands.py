"""The commands as a user calls them: tables, JSON, PNG, exit codes, one message for a mistake."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax.analysis import commands, reproduce, what_if
from dsv3_jax.analysis.commands import (
    COMMANDS,
    EstimateOptions,
    MeshOptions,
    PlanOptions,
    ReproduceOptions,
    WhatIfOptions,
)
from dsv3_jax.analysis.model_cost import training_flops_per_token
from dsv3_jax.analysis.output import table
from dsv3_jax.analysis.scenarios import SimulateOptions
from dsv3_jax.analysis.study import plot_study
from dsv3_jax.config import UserError, load_config

CONFIG = """
from dsv3_jax.config import Config, ModelConfig, TrainConfig

def get_config():
    model = ModelConfig(vocab_size=512, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
                        q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
                        v_head_dim=16, intermediate_size=128, moe_intermediate_size=32,
                        first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4,
                        n_group=4, topk_group=2)
    return Config(model=model, train=TrainConfig(batch_size=64, micro_batch_size=8, seq_len=128))
"""
PNG = b"\x89PNG"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def run(name, options):
    kind, function = COMMANDS[name]
    assert isinstance(options, kind)
    return function(options)


def test_estimate_prints_writes_and_draws(config, tmp_path, capsys):
    options = EstimateOptions(
        config=config,
        hardware="h200",
        mesh=MeshOptions(pipe=2, local=4),
        schedule="zb1p",
        price_per_hour=3.0,
        json=tmp_path / "deep" / "out.json",
        plot=tmp_path / "out.png",
    )
    assert run("estimate", options) == 0
    printed = capsys.readouterr().out
    for word in (
        "training step",
        "MFU",
        "TPOT",
        "KV cache a token",
        "8 devices",
        "pipeline bubble",
    ):
        assert word in printed
    saved = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert saved["config"]["mesh"]["pipe"] == 2 and saved["training"]["devices"] == 8
    # 7 values: 6 layers of 40 latent values in BF16.
    assert saved["decoding"]["kv_bytes_per_token"] == 6 * 40 * 2
    assert saved["training"]["dollars_per_million_tokens"] > 0
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)


def test_mtp_s_share_of_mfu_is_said(config, tmp_path, capsys):
    """A run's metrics count MTP's FLOPs, the paper does not: 25.1 and 39.6 % of the H200 slice."""
    run("estimate", EstimateOptions(config=config))
    printed = capsys.readouterr().out
    assert "MTP left out, as in the paper" in printed and "as train.py logs it" in printed
    alone, counted = (
        float(re.search(rf"^{name} +([0-9.]+) ", printed, re.MULTILINE)[1])
        for name in ("MFU", "MFU, MTP counted")
    )
    flops = functools.partial(training_flops_per_token, load_config(config).model, 128)
    assert counted / alone == pytest.approx(flops(mtp=True) / flops(), rel=1e-2)
    without = tmp_path / "without.py"
    without.write_text(CONFIG.replace("topk_group=2", "topk_group=2, num_nextn_predict_layers=0"))
    run("estimate", EstimateOptions(config=without))
    printed = capsys.readouterr().out
    assert "MTP counted" not in printed and "MFU" in printed


@pytest.mark.parametrize("name", ["estimate", "plan"])
def test_adapters_which_no_figure_knows_are_said(name, config, capsys):
    text = config.read_text().replace("Config, ModelConfig", "Config, LoraConfig, ModelConfig")
    config.write_text(
        text.replace("Config(model=", "Config(init_from='base', lora=LoraConfig(rank=4), model=")
    )
    more = {"devices": 4} if name == "plan" else {}
    run(name, COMMANDS[name][0](config=config, **more))
    assert "lora.rank=4 is not modelled" in capsys.readouterr().out


def test_estimate_calibrates_on_a_measurement(config, tmp_path):
    base = EstimateOptions(config=config, json=tmp_path / "a.json")
    run("estimate", base)
    rate = json.loads((tmp_path / "a.json").read_text())["training"]["tokens_per_second"]
    run("estimate", dataclasses.replace(base, measured_tokens_per_second=rate / 3))
    again = json.loads((tmp_path / "a.json").read_text())
    assert again["training"]["tokens_per_second"] == pytest.approx(rate / 3, rel=1e-4)
    assert again["efficiency"]["source"] == "this measurement"


def test_fp8_weights_are_counted_in_both_orientations(config, tmp_path):
    saved = []
    for preset in (None, "fp8_paper"):
        run(
            "estimate",
            EstimateOptions(config=config, quant_preset=preset, json=tmp_path / "e.json"),
        )
        saved.append(json.loads((tmp_path / "e.json").read_text())["training"]["memory"]["weights"])
    assert saved[1] == saved[0]  # two bytes a number, as in BF16


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hardware="h20"), "unknown accelerator 'h20': did you mean h200"),
        (dict(schedule="dualpip"), "unknown schedule 'dualpip': did you mean dualpipe"),
        (dict(mesh=MeshOptions(node=3)), "micro-batch of 8 sequences must be a multiple"),
        (
            dict(mesh=MeshOptions(tensor=3)),
            "heads=4 must be a multiple of mesh.tensor=3",
        ),
        (
            dict(quant_preset="fp8"),
            "unknown quant preset 'fp8': did you mean fp8_head or fp8_paper",
        ),
        (dict(decode_batch=0), "batch=0"),
        (dict(measured_tokens_per_second=-1.0), "must be positive"),
        (dict(price_per_hour=-2.0), "price_per_hour=-2.0 must be a positive number"),
    ],
)
def test_estimate_refuses_mistakes_with_one_message(config, change, message):
    with pytest.raises(UserError, match=message):
        run("estimate", EstimateOptions(config=config, **change))


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        run("estimate", EstimateOptions(config=tmp_path / "nowhere.py"))


@pytest.mark.parametrize("goal", ["training", "tpot"])
def test_plan_shows_the_best_five_with_bottlenecks(config, tmp_path, capsys, goal):
    options = PlanOptions(
        config=config,
        devices=16,
        goal=goal,
        batch=64,
        json=tmp_path / "p.json",
        plot=tmp_path / "p.png",
    )
    assert run("plan", options) == 0
    assert "bottleneck" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "p.json").read_text())["search"]["plans"]) == 5
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("scenario", ["all-to-all", "experts", "ring", "kv-transfer"])
@pytest.mark.parametrize("routing", ["ecmp", "adaptive"])
def test_simulate_runs_every_scenario(scenario, routing, tmp_path, capsys):
    options = SimulateOptions(
        scenario=scenario,
        nodes=8,
        radix=8,
        routing=routing,
        tokens=16,
        prefill_nodes=2,
        requests=40,
        json=tmp_path / "s.json",
        plot=tmp_path / "s.png",
    )
    assert run("simulate", options) == 0
    assert "busiest link" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["summary"]["endpoints"] == 64
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)


def test_simulate_reads_recorded_choices_and_dead_parts(tmp_path, capsys):
    choices = np.random.default_rng(0).integers(0, 256, (32, 5, 8))
    np.save(tmp_path / "choices.npy", choices)
    options = SimulateOptions(
        scenario="experts",
        nodes=4,
        radix=4,
        choices=tmp_path / "choices.npy",
        dead_planes=(1,),
        dead_cables=("0:0:1",),
    )
    assert run("simulate", options) == 0
    assert "endpoints" in capsys.readouterr().out


def test_simulate_prices_topologies(tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text('{"switch": 1e6, "link": 0, "endpoint_link": 0, "source": "mine"}')
    assert run("simulate", SimulateOptions(scenario="topologies", prices=prices)) == 0
    printed = capsys.readouterr().out
    assert "96.00" in printed and "prices: mine" in printed and "32,928" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(radix=63), "radix=63 must be even: use 64"),
        (dict(scenario="topologies", radix=63), "radix=63"),
        (dict(nic_gbytes=-50.0), "nic_bandwidth=-50"),
        (dict(megabytes=0.0), "megabytes=0.0 must be positive"),
        (dict(dead_cables=("1-2-3",)), "must be plane:leaf:cable"),
        (dict(scenario="ring", ring_size=5), "ring_size=5"),
        (dict(forwarding="none"), "not connected to each other"),
        (dict(scenario="experts", nodes=3), "do not spread evenly"),
    ],
)
def test_simulate_refuses_mistakes_with_one_message(change, message):
    with pytest.raises(UserError, match=message):
        run("simulate", SimulateOptions(**change))


def test_simulate_refuses_a_file_that_holds_no_choices(tmp_path):
    path = tmp_path / "choices.npy"
    np.save(path, np.zeros((2, 3)))
    with pytest.raises(UserError, match="integers of"):
        run("simulate", SimulateOptions(scenario="experts", nodes=4, choices=path))


def test_reproduce_exits_non_zero_when_a_value_is_off(monkeypatch, tmp_path, capsys):
    good = reproduce.Row("ISCA table 1", "kept", 2.0, 2.0, 0.0)
    bad = reproduce.Row("ISCA table 1", "lost", 2.0, 2.1, 0.01)
    monkeypatch.setattr(reproduce, "rows", lambda: [good])
    assert (
        run("reproduce", ReproduceOptions(json=tmp_path / "r.json", plot=tmp_path / "r.png")) == 0
    )
    monkeypatch.setattr(reproduce, "rows", lambda: [good, bad])
    assert run("reproduce", ReproduceOptions()) == 1
    printed = capsys.readouterr().out
    assert "off: ISCA table 1, lost: 2.1 for 2" in printed and "Qwen-72B" in printed
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


@functools.cache
def study_of(name):
    """Each study once: two of them take a second."""
    return what_if.STUDIES[name]()


@pytest.mark.parametrize("name", what_if.STUDIES)
def test_every_study_has_rows_panels_and_a_plot(name, tmp_path):
    study = study_of(name)
    assert study.name == name and study.recommendations
    assert all(len(row) == len(study.headers) for row in study.rows)
    assert all(
        len(values) == len(panel.x) and np.isfinite(values).all()
        for panel in study.panels
        for values in panel.series.values()
    )
    assert plot_study(study, tmp_path / "a.png").read_bytes().startswith(PNG)


def test_studies_agree_with_what_is_known():
    # TR section 3.3.2: promotion every 128 keeps the error small, none at all makes it grow.
    errors = [row[1] for row in study_of("native_accumulation").rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 5 * errors[4]
    # Losing n of 8 planes costs at least 8 / (8 - n), and not much more.
    for _, planes, ideal, _ in study_of("planes_lost").rows:
        assert ideal * (1 - 1e-6) <= planes <= 1.03 * ideal
    # Seven exchange flows share a NIC's arrivals with k cache streams.
    for k, share, _, _ in study_of("traffic_priority").rows:
        assert share == pytest.approx(7 / (7 + k))


def test_what_if_draws_one_png_a_study(tmp_path, capsys):
    options = WhatIfOptions("logfmt_in_network", tmp_path / "plots", tmp_path / "w.json")
    assert run("what-if", options) == 0
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["logfmt_in_network.png"]
    assert json.loads((tmp_path / "w.json").read_text())[0]["name"] == "logfmt_in_network"
    with pytest.raises(UserError, match="unknown study 'logfmt': did you mean logfmt_in_network"):
        run("what-if", WhatIfOptions("logfmt"))


def test_tables_align_and_mark_thousands():
    text = table(["name", "n"], [["a", 1234567], ["long", 5]])
    assert text.splitlines() == [
        "name          n",
        "----  ---------",
        "a     1,234,567",
        "long          5",
    ]


def test_analysis_imports_neither_jax_nor_matplotlib():
    code = (
        "import sys, dsv3_jax.analysis.commands as c; assert c.COMMANDS;"
        "assert not {'jax', 'jaxlib', 'flax', 'matplotlib'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert commands.COMMANDS is COMMANDS
