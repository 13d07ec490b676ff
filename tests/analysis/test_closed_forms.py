"""The papers' counts and back-of-the-envelope numbers, from the closed forms."""

import json

import pytest

from dsv3_jax.analysis import latency, topology
from dsv3_jax.analysis.hardware import ACCELERATORS, accelerator, measure_host
from dsv3_jax.analysis.model_cost import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    LLAMA_3_1_405B,
    QWEN_2_5_72B,
    activated_parameters,
    attention_parameters,
    expected_groups_hit,
    expert_parameters,
    kv_bytes_per_token,
    kv_values_per_token,
    matmul_parameters,
    parameters,
    training_flops_per_token,
)
from dsv3_jax.config import UserError


def test_parameter_counts_equal_the_released_checkpoint():
    count = parameters(DEEPSEEK_V3)
    assert count.main == 671_026_419_200
    assert count.mtp == 11_610_068_224
    assert attention_parameters(DEEPSEEK_V3) == 187_107_328
    assert expert_parameters(DEEPSEEK_V3) == 44_040_192
    assert count.embedding == count.head == 926_679_040
    assert activated_parameters(DEEPSEEK_V3) == pytest.approx(37.55e9, rel=1e-3)
    assert matmul_parameters(DEEPSEEK_V3) == pytest.approx(36.6246e9, rel=1e-5)
    assert parameters(LLAMA_3_1_405B).total == pytest.approx(405.85e9, rel=1e-4)
    assert parameters(DEEPSEEK_V2).total == pytest.approx(235.7e9, rel=1e-3)


def test_kv_cache_bytes_match_paper():
    assert kv_bytes_per_token(DEEPSEEK_V3) == 70_272
    assert kv_bytes_per_token(QWEN_2_5_72B) == 327_680
    assert kv_bytes_per_token(LLAMA_3_1_405B) == 516_096


def test_kv_cache_shrinks_from_mha_over_gqa_to_mla():
    values = [kv_values_per_token(DEEPSEEK_V3, kind) for kind in ("mha", "gqa", "mla", "mqa")]
    assert values == [2 * 128 * 128, 2 * 8 * 128, 576, 256]
    with pytest.raises(ValueError, match="no MLA latent"):
        kv_values_per_token(LLAMA_3_1_405B, "mla")


def test_training_flops_match_paper():
    assert training_flops_per_token(DEEPSEEK_V3) == pytest.approx(250.45e9, rel=1e-4)
    assert training_flops_per_token(DEEPSEEK_V3, causal=False) == pytest.approx(281.15e9, rel=1e-4)
    assert training_flops_per_token(DEEPSEEK_V3, mtp=True) > 1.04 * training_flops_per_token(
        DEEPSEEK_V3
    )


def test_tpot_chain_is_exact_with_seven_thousand():
    slow = latency.decode_ceiling(latency.ep_exchange_seconds(32, 9, 7000, 50e9))
    assert slow.exchange == pytest.approx(120.96e-6, rel=1e-12)
    assert slow.layer == pytest.approx(241.92e-6, rel=1e-12)
    assert slow.tpot == pytest.approx(14.75712e-3, rel=1e-12)
    assert int(slow.tokens_per_second) == 67
    fast = latency.decode_ceiling(latency.ep_exchange_seconds(32, 9, 7000, 900e9))
    assert fast.exchange == pytest.approx(6.72e-6, rel=1e-12)
    assert fast.tpot == pytest.approx(0.81984e-3, rel=1e-12)


def test_message_bytes_match_deepep():
    assert latency.fp8_message_bytes(7168) == 7408
    assert latency.logfmt_message_bytes(7168) == 9184


def test_latency_split_gives_back_both_measurements():
    assert latency.ROCE.over(1) == pytest.approx(3.6e-6)
    assert latency.ROCE.over(3) == pytest.approx(5.6e-6)
    assert latency.INFINIBAND.per_switch == pytest.approx(0.45e-6)


def test_two_micro_batches_run_at_the_pace_of_the_busier_resource():
    assert latency.dual_micro_batch_seconds(3.0, 2.0) == 6.0
    assert latency.dual_micro_batch_seconds(3.0, 5.0) == 10.0


def test_mtp_speedup_spans_the_published_range():
    assert latency.mtp_speedup(0.8) == pytest.approx(1.8)
    assert latency.mtp_speedup(1.0, depth=3) == 4
    with pytest.raises(ValueError, match="acceptance=1"):
        latency.mtp_speedup(1.2)


def test_expected_nodes_match_notes_on_node_limited_routing():
    assert expected_groups_hit(256, 8, 8) == pytest.approx(5.29, abs=0.005)
    assert expected_groups_hit(256, 8, 8, limit=4) == pytest.approx(3.63, abs=0.005)
    with pytest.raises(ValueError, match="multiple"):
        expected_groups_hit(256, 7, 8)


@pytest.mark.parametrize(
    "made, endpoints, switches, links",
    [
        (topology.fat_tree_2(), 2048, 96, 2048),
        (topology.multi_plane_fat_tree(), 16384, 768, 16384),
        (topology.fat_tree_3(), 65536, 5120, 131072),
        (topology.slim_fly(28), 32928, 1568, 32928),
        (topology.dragonfly(groups=511), 261632, 16352, 384272),
        (topology.fitted_fat_tree_2(2048, planes=8), 2048, 8 * 12, 2048),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_topology_sizes_match_table_3(made, endpoints, switches, links):
    assert (made.endpoints, made.switches, made.links) == (endpoints, switches, links)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: topology.fat_tree_2(63), "radix=63.*even.*use 64"),
        (lambda: topology.multi_plane_fat_tree(64, 0), "planes=0"),
        (lambda: topology.slim_fly(30), "q=30.*use 31"),
        (lambda: topology.dragonfly(groups=600), "groups=600"),
        (lambda: topology.fitted_fat_tree_2(5000), "at most 2048"),
        (lambda: topology.PriceBook(-1, 0, 0, "x"), "switch=-1"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_price_book_file_is_read_and_checked(tmp_path):
    book = tmp_path / "prices.json"
    book.write_text(json.dumps(dict(switch=1, link=2, endpoint_link=3, source="mine")))
    assert topology.cost(topology.fat_tree_2(4), topology.load_price_book(book)) == 6 + 16 + 24
    book.write_text('{"swich": 1}')
    with pytest.raises(UserError, match="no field 'swich': did you mean switch"):
        topology.load_price_book(book)


def test_every_accelerator_has_a_source_and_sane_peaks():
    for name, device in ACCELERATORS.items():
        assert device.name == name and len(device.source) > 30
        assert device.bf16_flops <= device.fp8_flops
        assert 1e14 < device.bf16_flops < 1e16 and 1e10 < device.hbm_bytes < 1e12


def test_unknown_accelerator_names_the_nearest():
    with pytest.raises(UserError, match="unknown accelerator 'H2000': did you mean h200"):
        accelerator("H2000")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hbm_bandwidth": -1}, "hbm_bandwidth=-1 must be a positive number"),
        ({"hbm_bandwidth": None}, "hbm_bandwidth=None must be"),
        ({"hbm_bandwith": 1}, "no field 'hbm_bandwith': did you mean hbm_bandwidth"),
        ({"scale_up_efficiency": 1.5}, "at most 1"),
        ("drop scale_up_bandwidth", "missing scale_up_bandwidth"),
        ("not json", "Expecting value"),
    ],
)
def test_accelerator_files_are_checked(tmp_path, change, message):
    values = dict(vars(ACCELERATORS["h100"]))
    path = tmp_path / "mine.json"
    if isinstance(change, dict):
        values.update(change)
    elif change.startswith("drop"):
        del values[change.split()[1]]
    path.write_text("nonsense" if change == "not json" else json.dumps(values))
    with pytest.raises(UserError, match=message):
        accelerator(str(path))


def test_accelerator_file_round_trips(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(vars(ACCELERATORS["h800"])))
    assert accelerator(str(path)) == ACCELERATORS["h800"]


def test_missing_scale_out_is_asked_for():
    with pytest.raises(UserError, match="no sourced scale_out_bandwidth"):
        ACCELERATORS["gb200-nvl72"].bandwidth(scale_out=True)


def test_host_is_measured():
    host = measure_host(size=64, repeats=1)
    assert host.bf16_flops > 1e6 and host.hbm_bytes > 1e8
