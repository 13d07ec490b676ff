"""What is predicted of a compiled step from its config, against numbers that XLA's program gave."""

import dataclasses
from pathlib import Path

import pytest

from dsv3_jax.analysis import activations
from dsv3_jax.analysis.activations import layer_bytes
from dsv3_jax.analysis.pending import pending_bytes
from dsv3_jax.analysis.prediction import Prediction, exchange_traffic, predict, step_flops
from dsv3_jax.config import ParallelConfig, PipelineConfig, ShardingConfig, load_config
from dsv3_jax.model import remat

PRESETS = Path(__file__).parents[2] / "configs/scale"
MOONLIGHT = PRESETS / "moonlight_16b_64_h200.py"


def preset(name, **train):
    config = load_config(PRESETS / f"{name}.py")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def test_v3_on_2048_h200s_is_predicted_as_it_compiles():
    """`compile` of this config with micro-batches of one row a device; docs/scale.md."""
    found = predict(preset("deepseek_v3_2048_h200", micro_batch_size=2048))
    assert found.arguments == pytest.approx(2.6668e9, rel=0.001)
    assert found.peak == pytest.approx(17.35 * 2**30, rel=0.05)
    two_rows = predict(preset("deepseek_v3_2048_h200"), "gpu")
    assert two_rows.peak == pytest.approx(27.7 * 2**30, rel=0.05)
    four_rows = predict(preset("deepseek_v3_2048_h200", micro_batch_size=8192))
    assert four_rows.peak == pytest.approx(44.62 * 2**30, rel=0.1)
    assert found.flops == pytest.approx(1.15305e16, rel=0.02)
    assert found.gathers == pytest.approx(447.1e9, rel=0.02)
    assert found.reductions == pytest.approx(916.8e9, rel=0.05)
    # Metadata aside, rows are all that is sent.
    assert found.exchange["node"] == pytest.approx(343.17e9, rel=0.02)
    assert found.exchange["local"] == pytest.approx(686.34e9, rel=0.02)


def test_v3_on_2048_v5p_is_predicted_as_it_compiles():
    """`compile` of this config for v5p:8x16x16; docs/scale.md."""
    found = predict(preset("deepseek_v3_2048_v5p"), "tpu")
    assert found.flops == pytest.approx(12_034e12, rel=0.001)
    assert found.peak == pytest.approx(31.53 * 2**30, rel=0.05)
    assert found.exchange["node"] == pytest.approx(344.0e9, rel=0.002)
    assert found.exchange["local"] == pytest.approx(688.0e9, rel=0.002)
    gpus = predict(preset("deepseek_v3_2048_v5p"), "gpu")
    assert gpus.flops == pytest.approx(12_034e12 - 0.044 * 12_011e12, rel=0.001)


def test_v3_on_256_tpu7x_is_predicted_as_it_compiles():
    config = preset("deepseek_v3_256_tpu7x")
    config = dataclasses.replace(
        config, quant=dataclasses.replace(config.quant, preset="fp8_paper")
    )
    assert predict(config, "tpu-7x").peak == pytest.approx(59.8 * 2**30, rel=0.05)


def test_halves_on_v5p_hold_what_mtp_holds_whole():
    """GiB of `compile` with overlap, padded, in rounds: MTP's module does not go in halves."""
    config = preset("deepseek_v3_2048_v5p")
    halves = dataclasses.replace(
        config.expert_parallel, transport="padded", overlap=True, overflow="rounds"
    )
    in_halves = dataclasses.replace(config, expert_parallel=halves)
    assert predict(in_halves, "tpu").peak == pytest.approx(35.93 * 2**30, rel=0.06)
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    alone, whole = (
        predict(dataclasses.replace(each, model=model), "tpu") for each in (in_halves, config)
    )
    # Of one half's rows the copies for every choice are there at a time.
    copies = (2 * 8 + 4) * 7168 * 8 * 8192
    assert whole.peak - alone.peak == pytest.approx(copies / 2, rel=0.01)


# Moonlight cut to three layers, a row of 4,096 tokens a device, two micro-batches; GiB of `compile`
# for the first two, of the others the live ranges of XLA's dump, filled up to tiles.
LARGE_VOCABULARY = {
    ("h200", "fp8_paper", 1, 8): 7.28,
    ("tpu-v6e", "bf16", 1, 4): 11.60,
    ("tpu-v6e", "bf16", 2, 2): 13.18,
    ("tpu-7x", "bf16", 2, 4): 8.83,
    ("tpu-7x", "bf16", 1, 8): 8.78,
}


@pytest.mark.parametrize("device, recipe, data, local", LARGE_VOCABULARY)
def test_a_large_vocabulary_is_held_where_it_is_worked_on(device, recipe, data, local):
    config = preset(MOONLIGHT.stem, batch_size=2 * data * local, micro_batch_size=data * local)
    config = dataclasses.replace(
        config,
        mesh=ParallelConfig(data=data, local=local),
        model=dataclasses.replace(config.model, num_hidden_layers=3),
        quant=dataclasses.replace(config.quant, preset=recipe),
    )
    compiled = LARGE_VOCABULARY[device, recipe, data, local] * 2**30
    assert predict(config, device).peak == pytest.approx(compiled, rel=0.1)


# What `compile --config configs/h200_slice.py --topology h200:1x1` gave; GB.
ON_ONE_H200 = [
    ("bf16", {}, 66.37),
    ("fp8_paper", {}, 66.57),
    ("bf16", {"batch_size": 2, "micro_batch_size": 2}, 73.54),
    ("fp8_paper", {"batch_size": 2, "micro_batch_size": 2}, 72.25),
    ("bf16", {"batch_size": 4, "micro_batch_size": 4}, 75.75),
    ("fp8_paper", {"remat": "none"}, 63.10),
    ("bf16", {"batch_size": 2, "micro_batch_size": 1}, 81.59),
    ("fp8_paper", {"batch_size": 2, "micro_batch_size": 1}, 80.90),
]


@pytest.mark.parametrize("recipe, train, compiled", ON_ONE_H200)
def test_one_device_holds_copies_until_their_gradients_come(recipe, train, compiled):
    """Of several micro-batches it holds both: sums of gradients, and what products read."""
    config = load_config("h200_slice")
    quant = dataclasses.replace(config.quant, preset=recipe)
    train = dataclasses.replace(config.train, **train)
    found = predict(dataclasses.replace(config, quant=quant, train=train))
    assert found.arguments == pytest.approx(42.78e9, rel=0.001)
    assert found.peak == pytest.approx(compiled * 1e9, rel=0.15)


# Bytes that a dense and a MoE layer keep of a token: residuals of `jax.vjp` of a `Block` under
# `Pass.saving`, traced for an H200, 4,096 tokens of `configs/h200_slice.py` and of Moonlight.
KEPT = {
    ("h200_slice", "bf16", "none"): (599_200, 869_770),
    ("h200_slice", "bf16", "dots"): (79_876, 79_876),
    ("h200_slice", "bf16", "v3"): (139_908, 265_860),
    ("h200_slice", "fp8_paper", "none"): (268_768, 541_826),
    ("h200_slice", "fp8_paper", "dots"): (14_340, 14_340),
    ("h200_slice", "fp8_paper", "v3"): (139_908, 265_860),
    ("moonlight", "bf16", "none"): (213_720, 317_536),
    ("moonlight", "bf16", "dots"): (12_292, 12_292),
    ("moonlight", "bf16", "v3"): (27_844, 116_932),
    ("moonlight", "fp8_paper", "none"): (61_584, 142_032),
    ("moonlight", "fp8_paper", "dots"): (4_100, 4_100),
    ("moonlight", "fp8_paper", "v3"): (27_844, 116_932),
}


def test_a_product_is_as_wide_as_the_policy_of_remat_has_it():
    assert activations.WIDE == remat.WIDE


@pytest.mark.parametrize("name, recipe, remat", KEPT)
def test_a_layer_keeps_what_its_trace_keeps(name, recipe, remat):
    config = load_config("h200_slice") if name == "h200_slice" else load_config(MOONLIGHT)
    train = dataclasses.replace(config.train, remat=remat, batch_size=1, micro_batch_size=1)
    quant = dataclasses.replace(config.quant, preset=recipe)
    config = dataclasses.replace(config, mesh=ParallelConfig(data=1), train=train, quant=quant)
    for moe, traced in enumerate(KEPT[name, recipe, remat]):
        assert layer_bytes(config, bool(moe)) == pytest.approx(traced, rel=0.03)


# Bytes that a token's I leaves for its W in a dense and a MoE layer, traced likewise: Moonlight
# over data 8, and V3 over local 8, which exchanges tokens. The last two take backward passes whole.
PENDING = {
    ("moonlight", "bf16", "none", "zb1p"): (77_952, 122_240),
    ("moonlight", "bf16", "full", "zb1p"): (127_104, 192_896),
    ("moonlight", "bf16", "v3", "zb1p"): (123_008, 156_088),
    ("moonlight", "fp8_paper", "none", "zb1p"): (36_532, 63_588),
    ("moonlight", "fp8_paper", "full", "zb1p"): (68_676, 118_436),
    ("moonlight", "fp8_paper", "v3", "zb1p"): (65_972, 96_780),
    ("v3", "bf16", "none", "zb1p"): (254_080, 392_320),
    ("v3", "bf16", "full", "zb1p"): (360_576, 613_568),
    ("v3", "bf16", "v3", "zb1p"): (327_808, 624_932),
    ("v3", "fp8_paper", "none", "zb1p"): (115_204, 215_652),
    ("v3", "fp8_paper", "full", "zb1p"): (201_348, 386_948),
    ("v3", "fp8_paper", "v3", "zb1p"): (182_980, 354_244),
    ("v3", "bf16", "full", "1f1b"): (294_016, 162_944),
    ("v3", "fp8_paper", "none", "1f1b"): (1_024, 15_360),
}


@pytest.mark.parametrize("name, recipe, remat, schedule", PENDING)
def test_what_waits_for_the_weights_gradients_is_what_its_trace_leaves(
    name, recipe, remat, schedule
):
    config = load_config(MOONLIGHT if name == "moonlight" else "deepseek_v3")
    mesh = ParallelConfig(data=8) if name == "moonlight" else ParallelConfig(local=8)
    train = dataclasses.replace(
        config.train, remat=remat, batch_size=8, micro_batch_size=8, seq_len=4096
    )
    quant = dataclasses.replace(config.quant, preset=recipe)
    expert = dataclasses.replace(config.expert_parallel, capacity_factor=1.0)
    config = dataclasses.replace(
        config, mesh=mesh, train=train, quant=quant, expert_parallel=expert
    )
    for moe, traced in enumerate(PENDING[name, recipe, remat, schedule]):
        found = pending_bytes(config, schedule, bool(moe))
        assert found == pytest.approx(traced, rel=0.03)


def test_zero1_gathers_once_what_products_read_and_f32_where_it_has_no_tiles():
    def found(**mesh):
        config = preset("deepseek_v3_2048_h200", micro_batch_size=2048)
        mesh = dataclasses.replace(config.mesh, **mesh)
        return predict(
            dataclasses.replace(config, mesh=mesh, sharding=ShardingConfig(state="zero1"))
        )

    fsdp = predict(preset("deepseek_v3_2048_h200", micro_batch_size=2048))
    one_byte, four_bytes = found(), found(tensor=2, data=16)
    # What `compile` gives for it; docs/scale.md.
    assert one_byte.gathers == pytest.approx(29.80e9, rel=0.001)
    assert one_byte.reductions == pytest.approx(913.5e9, rel=0.05)
    assert one_byte.peak == pytest.approx(70.40 * 2**30, rel=0.05)
    # FSDP gathers layers twice in each of 8 micro-batches.
    assert fsdp.gathers / 16 < one_byte.gathers < fsdp.gathers / 14
    assert one_byte.reductions == fsdp.reductions
    assert four_bytes.gathers > 2 * one_byte.gathers  # of parts half as large


def moonlight(schedule, micro_batch_size, remat="full", **mesh):
    config = preset("moonlight_16b_64_h200", micro_batch_size=micro_batch_size, remat=remat)
    return dataclasses.replace(
        config,
        mesh=ParallelConfig(**mesh),
        sharding=ShardingConfig(state="zero1"),
        pipeline=PipelineConfig(schedule=schedule),
    )


# What `compile` gave for a device, the mean of the ranks: GiB; TFLOP; GB.
PIPELINES = {
    "V3, pipe 16": (
        preset("deepseek_v3_2048_h200_pipelined"),
        Prediction(
            2.485, 43.46, 10_863, {"node": 321.7, "local": 643.4}, 23.80, 786.2, 86.32, 2.834
        ),
    ),
    "Moonlight, pipe 8": (
        moonlight("zb1p", 8, pipe=8, data=8),
        Prediction(2.791, 49.36, 3_402, {}, 11.12, 1_784.6, 26.005, 2.120),
    ),
    "Moonlight, pipe 2": (
        moonlight("dualpipev", 32, pipe=2, data=2, node=2, local=8),
        Prediction(
            2.788, 28.14, 2_960, {"node": 49.35, "local": 259.1}, 6.327, 315.7, 6.459, 1.190
        ),
    ),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_is_predicted_as_it_compiles(case):
    config, compiled = PIPELINES[case]
    found = predict(config, "gpu")
    assert found.arguments / 2**30 == pytest.approx(compiled.arguments, rel=0.002)
    assert found.peak / 2**30 == pytest.approx(compiled.peak, rel=0.05)
    assert found.flops / 1e12 == pytest.approx(compiled.flops, rel=0.01)
    assert {axes: n / 1e9 for axes, n in found.exchange.items()} == pytest.approx(
        compiled.exchange, rel=0.01
    )
    for name in ("gathers", "hand_overs", "stages"):
        assert getattr(found, name) / 1e9 == pytest.approx(getattr(compiled, name), rel=0.002)
    assert found.reductions / 1e9 == pytest.approx(compiled.reductions, rel=0.025)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_pipeline_adds_up_gradients_of_both_halves_at_once(overlap):
    """GB of V3's paper run with two rows a device, as both programs compile."""
    config = preset("deepseek_v3_2048_h200_pipelined")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, micro_batch_size=256),
        expert_parallel=dataclasses.replace(
            config.expert_parallel, transport="padded", overlap=overlap
        ),
    )
    assert predict(config, "gpu").reductions / 1e9 == pytest.approx(393.3, rel=0.025)


# Moonlight over pipe 8 x data 8, ZB1P, ZeRO-1, micro-batches of a row a device: GB, compiled.
KEPT_BY_STAGES = {
    ("bf16", "none"): 90.79,
    ("bf16", "dots"): 54.35,
    ("bf16", "v3"): 63.61,
    ("fp8_paper", "none"): 53.22,
    ("fp8_paper", "dots"): 41.33,
    ("fp8_paper", "v3"): 53.97,
}


@pytest.mark.parametrize("recipe, remat", KEPT_BY_STAGES)
def test_what_stages_keep_is_predicted_as_it_compiles(recipe, remat):
    config = moonlight("zb1p", 8, remat, pipe=8, data=8)
    config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, preset=recipe))
    compiled = KEPT_BY_STAGES[recipe, remat] * 1e9
    assert predict(config, "gpu").peak == pytest.approx(compiled, rel=0.1)


def test_a_pipeline_whose_program_was_not_compared_is_not_predicted():
    config = preset("deepseek_v3_2048_h200_pipelined")
    assert predict(dataclasses.replace(config, sharding=ShardingConfig(state="fsdp"))) is None
    mesh = ParallelConfig(pipe=16, data=1, node=8, local=8, tensor=2)
    assert predict(dataclasses.replace(config, mesh=mesh)) is None


def test_tpus_other_than_7x_do_not_scatter_beside_work():
    """A head's gradient then waits for nobody, unless MTP's layers come first."""
    config = load_config(MOONLIGHT)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batch_size=64, seq_len=4096)
    )
    waits = {d: activations.waiting_for_head(config, d, False) for d in ("h200", "tpu-7x")}
    assert waits == dict.fromkeys(waits, 2 * 4096 * 163_840)
    assert activations.waiting_for_head(config, "tpu-v5p", False) == 0
    assert activations.waiting_for_head(config, "tpu-v5p", True) == waits["h200"]


def test_half_the_rows_of_a_micro_batch_change_what_is_gathered_and_not_what_is_computed():
    one, two = (predict(preset("deepseek_v3_2048_h200", micro_batch_size=m)) for m in (2048, 4096))
    assert one.gathers == pytest.approx(2 * two.gathers)
    assert one.flops == pytest.approx(two.flops, rel=0.02)  # fewer rows fill up groups
    assert one.exchange == pytest.approx(two.exchange)
    assert one.peak < two.peak


def test_rematerialisation_and_the_wire_are_counted():
    config = preset("deepseek_v3_2048_h200")
    kept = preset("deepseek_v3_2048_h200", remat="none")
    assert step_flops(kept) < 0.8 * step_flops(config)
    assert exchange_traffic(kept)["node"] < exchange_traffic(config)["node"]
    alone = dataclasses.replace(config, mesh=ParallelConfig(data=2048))
    assert exchange_traffic(alone) == {}
