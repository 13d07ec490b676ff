"""Import, export and load: every byte comes back, in every form."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop import load as load_module
from dsv3_jax.interop.checkpoint import from_variables, open_checkpoint, open_hf
from dsv3_jax.interop.digests import verify_imported
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.load import load, load_hf
from dsv3_jax.interop.safetensors import load_file, read_header, save_file
from dsv3_jax.interop.stream import dequantize_rows
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, dequantize

VARIANTS = {
    "v3": {},
    "no_q_compression": {"q_lora_rank": None, "n_shared_experts": 1, "rope_scaling": None},
    "no_mtp_one_group": {"num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1},
    "v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
    },
    "no_shared_all_moe": {"n_shared_experts": 0, "first_k_dense_replace": 0},
    "two_mtp": {"num_nextn_predict_layers": 2},
}


def all_tensors(folder):
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", ["f32", "bf16", "fp8"])
def test_import_then_export_reproduces_every_byte(make_hf, tmp_path, dtype):
    folder, _, tensors = make_hf(dtype)
    imported = open_checkpoint(import_hf(folder, tmp_path / "ours"))
    exported = export_hf(imported, tmp_path / "out", shard_bytes=100_000)
    assert_same_bytes(all_tensors(exported), tensors)
    assert verify_imported(tmp_path / "ours") == []
    assert json.loads((exported / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert (exported / "tokenizer.json").exists() and not list(exported.glob("*.py"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_then_export_reproduces_every_byte(make_hf, tmp_path, variant):
    folder, config, tensors = make_hf("fp8", **VARIANTS[variant])
    found, variables = load_hf(folder)
    assert found == dataclasses.replace(config, dtype="bfloat16")
    exported = export_hf(from_variables(variables, config), tmp_path / "out")
    assert_same_bytes(all_tensors(exported), tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_variables_have_the_models_own_tree(make_hf, variant):
    folder, config, _ = make_hf("bf16", **VARIANTS[variant], shards=1)
    _, variables = load_hf(folder, dtype="f32")
    expected = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    assert described == expected


def test_each_matrix_lands_at_its_layer_expert_and_half(make_hf):
    folder, config, tensors = make_hf("f32")
    _, variables = load_hf(folder)
    params, moe = variables["params"], variables["params"]["moe_layers"]
    at = "model.layers.2."
    gate_up = moe["mlp"]["experts"]["gate_up_proj"]
    for half, name in enumerate(("gate_proj", "up_proj")):
        np.testing.assert_array_equal(
            gate_up[1, 4, half], tensors[f"{at}mlp.experts.4.{name}.weight"]
        )
    q_b = tensors[at + "self_attn.q_b_proj.weight"].reshape(config.num_attention_heads, -1, 48)
    np.testing.assert_array_equal(moe["self_attn"]["q_b_proj"][1], q_b)
    np.testing.assert_array_equal(
        variables["router"]["mtp_0"]["block"]["mlp"]["e_score_correction_bias"],
        tensors["model.layers.3.mlp.gate.e_score_correction_bias"],
    )
    np.testing.assert_array_equal(
        params["mtp_0"]["norm"], tensors["model.layers.3.shared_head.norm.weight"]
    )


def test_fp8_stays_block_scaled_and_dequantises_with_partial_blocks(make_hf):
    folder, _, tensors = make_hf("fp8")
    _, stored = load_hf(folder)
    _, plain = load_hf(folder, dtype="f32")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    kept = stored["params"]["moe_layers"]["self_attn"]["kv_a_proj_with_mqa"]
    assert isinstance(kept, BlockScaled) and kept.tile == PER_BLOCK
    assert kept.values.shape == (2, 144, 160) and kept.scales.shape == (2, 2, 2)
    whole = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, 0), 128, 1)[:144, :160]
    expected = tensors[name].astype(np.float32) * whole
    found = plain["params"]["moe_layers"]["self_attn"]["kv_a_proj_with_mqa"][0]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(dequantize(kept, np.float32)[0], expected)
    for dtype, name in ((np.float32, "F32"), (ml_dtypes.bfloat16, "BF16")):
        on_host = dequantize_rows(np.asarray(kept.values[0]), np.asarray(kept.scales[0]), name)
        assert on_host.tobytes() == np.asarray(dequantize(kept, dtype)[0]).tobytes()


def test_fp8_export_quantises_what_v3_published_in_fp8(make_hf, tmp_path):
    folder, _, tensors = make_hf("f32")
    exported = all_tensors(export_hf(open_hf(folder), tmp_path / "out", "fp8"))
    reference = make_hf("fp8", name="layout")[2]
    assert {n: (t.dtype, t.shape) for n, t in exported.items()} == {
        n: (t.dtype, t.shape) for n, t in reference.items()
    }
    name = "model.layers.0.mlp.down_proj.weight"
    scales = exported[name + "_scale_inv"]
    back = (
        exported[name].astype(np.float32) * np.repeat(np.repeat(scales, 128, 0), 128, 1)[:160, :144]
    )
    # E4M3 has 3 mantissa bits: half a step is 1/16 of a normal number; 2^-10 of the block's 448
    # covers the subnormals.
    limit = np.maximum(np.abs(tensors[name]) / 16, scales.max() * 2**-10)
    assert (np.abs(back - tensors[name]) <= limit * (1 + 1e-6)).all()


def test_ue8m0_scales_stay_powers_of_two(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16", scale_fmt="ue8m0")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
    }
    (folder / "config.json").write_text(json.dumps(values))
    out = export_hf(open_hf(folder), tmp_path / "out", "fp8")
    scales = [t for n, t in all_tensors(out).items() if n.endswith("_scale_inv")]
    assert all((np.frexp(t)[0] == 0.5).all() for t in scales)
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    )


@pytest.mark.parametrize("dtype,expected", [("bf16", "BF16"), ("f32", "F32")])
def test_export_dtypes_and_the_config_that_says_so(make_hf, tmp_path, dtype, expected):
    folder, _, _ = make_hf("fp8")
    out = export_hf(open_hf(folder), tmp_path / "out", dtype)
    dtypes = {
        n: t.dtype for file in out.glob("*.safetensors") for n, t in read_header(file)[0].items()
    }
    assert {d for n, d in dtypes.items() if not n.endswith("correction_bias")} == {expected}
    assert {d for n, d in dtypes.items() if n.endswith("correction_bias")} == {"F32"}
    values = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in values
    assert values["torch_dtype"] == {"bf16": "bfloat16", "f32": "float32"}[dtype]
    for file in out.glob("*.safetensors"):
        assert read_header(file)[1] == {"format": "pt"}


def test_a_weight_and_its_scales_share_a_shard(make_hf, tmp_path):
    folder, _, _ = make_hf("fp8")
    out = export_hf(open_hf(folder), tmp_path / "out", shard_bytes=110_000)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 5
    for name, file in weight_map.items():
        if name.endswith("_scale_inv"):
            assert weight_map[name.removesuffix("_scale_inv")] == file
    sizes = [f.stat().st_size for f in out.glob("*.safetensors")]
    assert max(sizes) < 110_000 + 20_000  # the header comes on top


def test_import_converts_when_asked(make_hf, tmp_path):
    folder, _, _ = make_hf("fp8")
    plain = load_hf(folder, dtype="bf16")[1]
    imported = load_hf(import_hf(folder, tmp_path / "ours", "bf16"))[1]
    assert jax.tree.structure(plain) == jax.tree.structure(imported)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(imported)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bf16_router_bias_is_widened_in_memory_and_kept_on_disk(make_hf, tmp_path):
    folder, _, tensors = make_hf("bf16", shards=1)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    narrow = {
        n: t.astype(ml_dtypes.bfloat16) if n.endswith("bias") else t for n, t in tensors.items()
    }
    save_file(narrow, folder / "model.safetensors")
    router = load_hf(folder)[1]["router"]["moe_layers"]["mlp"]["e_score_correction_bias"]
    assert router.dtype == np.float32
    np.testing.assert_array_equal(router[0], narrow[bias].astype(np.float32))
    imported = open_checkpoint(import_hf(folder, tmp_path / "ours"))
    assert_same_bytes(all_tensors(export_hf(imported, tmp_path / "out")), narrow)


def test_dropped_mtp_layers_are_noticed_and_the_rest_loads(make_hf, caplog):
    folder, _, tensors = make_hf("bf16", shards=1)
    main = {n: t for n, t in tensors.items() if not n.startswith("model.layers.3.")}
    save_file(main, folder / "model.safetensors")
    found, variables = load_hf(folder)
    assert found.num_nextn_predict_layers == 0 and "mtp_0" not in variables["params"]
    assert "none of its 1 MTP layers" in caplog.text


def test_moonlights_rotary_buffers_are_left_out(make_hf):
    folder, _, tensors = make_hf("bf16", shards=1)
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)
    }
    save_file(tensors | buffers, folder / "model.safetensors")
    assert not any("inv_freq" in name for name in open_hf(folder).tensors)


@pytest.mark.parametrize("host_bytes", [60_000, load_module.HOST_BYTES])
def test_sharded_load_equals_unsharded(make_hf, monkeypatch, host_bytes):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices (tests/conftest.py makes 8)")
    folder, _, _ = make_hf("bf16", n_routed_experts=8, n_group=2)
    _, whole = load_hf(folder)
    monkeypatch.setattr(load_module, "HOST_BYTES", host_bytes)
    mesh = jax.make_mesh((2, 2), ("e", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {
        "gate_up_proj": (None, "e", None, "t"),
        "down_proj": (None, "e", None, "t"),
        "q_a_proj": (None, "t", "e"),
        "o_proj": (None, "t"),
        "embed_tokens": (None, "t"),
    }

    def sharding(path, leaf):
        names = [key.key for key in path]
        axes = spec.get(names[-1], ())
        axes = axes if "shared_experts" not in names and "dense_layers" not in names else ()
        if names[1].startswith("mtp"):
            axes = ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, whole)
    _, sharded = load_hf(folder, shardings=shardings)
    for a, b, s in zip(*map(jax.tree.leaves, (whole, sharded, shardings))):
        assert b.sharding == s
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_sharded_fp8_load_dequantises_partial_blocks_of_rows(make_hf):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices (tests/conftest.py makes 8)")
    folder, _, _ = make_hf("fp8")
    checkpoint = open_hf(folder)
    whole = load(checkpoint, dtype="bf16")
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(path, leaf):
        # kv_a's 144 rows are cut at row 72, in the middle of a 128-block.
        axes = (None, "t") if path[-1].key == "kv_a_proj_with_mqa" and leaf.ndim == 3 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, whole)
    for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(load(checkpoint, dtype="bf16", shardings=shardings))
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
