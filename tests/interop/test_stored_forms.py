"""Numbers stored in other forms than V3's: scales, mixed stacks, experts in one tensor, NaN."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.interop import importing
from dsv3_jax.interop.checkpoint import from_variables, open_checkpoint, open_hf
from dsv3_jax.interop.digests import verify_imported
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.safetensors import load_file, save_file
from dsv3_jax.interop.stored import common_dtype, count_non_finite
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, dequantize, quantize

SCALES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
KV_B = "model.layers.{}.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}."
FIRST_EXPERT = [EXPERT.format(0) + f"{part}_proj.weight" for part in ("gate", "up", "down")]


def exported(folder):
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def without_scales(tensors, names):
    """The tensors with these FP8 weights in BF16, as a publisher leaves some out of quantising."""
    made = {n: t for n, t in tensors.items() if n.removesuffix("_scale_inv") not in names}
    rng = np.random.default_rng(9)
    for name in names:
        made[name] = rng.normal(size=tensors[name].shape).astype(ml_dtypes.bfloat16)
    return made


def round_trip(folder, tmp_path):
    """What is exported of the folder, and of an import of it, which must be the same."""
    ours = import_hf(folder, tmp_path / "ours")
    assert verify_imported(ours) == []
    direct = exported(export_hf(open_hf(folder), tmp_path / "direct"))
    assert_same_bytes(direct, exported(export_hf(open_checkpoint(ours), tmp_path / "out")))
    return direct


@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_any_dtype_are_read_exactly_and_kept(make_hf, tmp_path, kind):
    folder, _, tensors = make_hf("fp8", shards=1)
    narrow = {
        n: np.exp2(np.ceil(np.log2(t))).astype(SCALES[kind]) if n.endswith("_inv") else t
        for n, t in tensors.items()
    }
    save_file(narrow, folder / "model.safetensors")
    wide = {n: t.astype(np.float32) if n.endswith("_inv") else t for n, t in narrow.items()}
    (folder / "wide").mkdir()
    save_file(wide, folder / "wide/model.safetensors")
    (folder / "wide/config.json").write_bytes((folder / "config.json").read_bytes())
    for dtype in ("stored", "bf16"):
        found, expected = load_hf(folder, dtype=dtype)[1], load_hf(folder / "wide", dtype=dtype)[1]
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert_same_bytes(round_trip(folder, tmp_path), narrow)
    says = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert says.get("scale_fmt") == ("ue8m0" if kind == "F8_E8M0" else None)


def test_every_power_of_two_of_a_byte_is_one_of_f32():
    codes = np.arange(255, dtype=np.uint8).view(SCALES["F8_E8M0"])
    expected = np.ldexp(np.float64(1), np.arange(255) - 127)
    np.testing.assert_array_equal(codes.astype(np.float32).astype(np.float64), expected)


def test_a_stack_of_fp8_and_bf16_experts_keeps_its_bytes(make_hf, tmp_path, caplog):
    folder, _, tensors = make_hf("fp8", shards=1)
    mixed = without_scales(tensors, FIRST_EXPERT)
    save_file(mixed, folder / "model.safetensors")
    assert_same_bytes(round_trip(folder, tmp_path), mixed)
    plain = load_hf(folder, dtype="bf16")[1]
    for source in (folder, tmp_path / "ours"):
        caplog.clear()
        experts = load_hf(source)[1]["params"]["moe_layers"]["mlp"]["experts"]
        assert "experts.gate_up_proj: stored as 2 BF16, 22 F8_E4M3, held as BF16" in caplog.text
        for name, leaf in experts.items():
            expected = plain["params"]["moe_layers"]["mlp"]["experts"][name]
            assert leaf.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))
    np.testing.assert_array_equal(experts["down_proj"][0, 0], mixed[FIRST_EXPERT[2]])


def test_held_in_fp8_a_mixed_stack_keeps_what_is_fp8_and_quantises_the_rest(make_hf):
    folder, config, tensors = make_hf("fp8", shards=1)
    mixed = without_scales(tensors, FIRST_EXPERT)
    save_file(mixed, folder / "model.safetensors")
    variables = to_fp8_weights(load_hf(folder, dtype="fp8")[1], config)
    down = variables["params"]["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert isinstance(down, BlockScaled)
    name = EXPERT.format(1) + "down_proj.weight"
    assert np.asarray(down.values[0, 1]).tobytes() == tensors[name].tobytes()
    np.testing.assert_array_equal(down.scales[0, 1], tensors[name + "_scale_inv"])
    made = quantize(mixed[FIRST_EXPERT[2]].astype(np.float32), PER_BLOCK)
    assert np.asarray(down.values[0, 0]).tobytes() == np.asarray(made.values).tobytes()
    np.testing.assert_array_equal(down.scales[0, 0], made.scales)


def test_stacks_of_bf16_and_f32_are_held_in_f32(make_hf, tmp_path):
    folder, _, tensors = make_hf("bf16", shards=1)
    name = "model.layers.1.mlp.gate.weight"
    wide = tensors[name].astype(np.float32) + np.float32(1e-6)
    save_file(tensors | {name: wide}, folder / "model.safetensors")
    gate = load_hf(folder)[1]["params"]["moe_layers"]["mlp"]["gate"]
    assert gate.dtype == np.float32
    np.testing.assert_array_equal(gate[0], wide)
    assert_same_bytes(round_trip(folder, tmp_path), tensors | {name: wide})


def test_a_common_dtype_rounds_nothing_but_what_fp8_stands_for():
    assert common_dtype({"F8_E4M3"}) == "F8_E4M3"
    assert common_dtype({"F8_E4M3", "BF16"}) == "BF16"
    assert common_dtype({"BF16", "F32"}) == common_dtype({"F8_E4M3", "F32"}) == "F32"


@pytest.mark.parametrize("names, listed", [([KV_B.format(i) for i in range(4)], 5), ([], 0)])
def test_export_names_the_modules_that_are_not_fp8(make_hf, tmp_path, names, listed):
    folder, _, tensors = make_hf("fp8", shards=1)
    save_file(without_scales(tensors, names), folder / "model.safetensors")
    for number, source in enumerate((folder, import_hf(folder, tmp_path / "ours"))):
        out = export_hf(open_checkpoint(source), tmp_path / f"out{number}")
        says = json.loads((out / "config.json").read_text())["quantization_config"]
        kept = says.get("modules_to_not_convert", [])
        assert len(kept) == listed
        if listed:
            assert kept == ["lm_head", *(name.removesuffix(".weight") for name in names)]
    # Converted to one form there is nothing to name.
    for dtype in ("bf16", "fp8"):
        values = json.loads(
            (export_hf(open_hf(folder), tmp_path / dtype, dtype) / "config.json").read_text()
        )
        assert "modules_to_not_convert" not in values.get("quantization_config", {})


def test_variables_held_in_fp8_in_part_are_exported_with_their_names(make_hf, tmp_path):
    folder, config, _ = make_hf("fp8")
    variables = load_hf(folder)[1]
    attention = variables["params"]["moe_layers"]["self_attn"]
    attention["o_proj"] = dequantize(attention["o_proj"], ml_dtypes.bfloat16).reshape(
        2, config.hidden_size, config.num_attention_heads, config.v_head_dim
    )
    out = export_hf(from_variables(variables, config), tmp_path / "out")
    says = json.loads((out / "config.json").read_text())["quantization_config"]
    assert says["modules_to_not_convert"] == [
        "lm_head",
        *(f"model.layers.{i}.self_attn.o_proj" for i in (1, 2)),
    ]


def fused(tensors, config, layers, fp8=False):
    """The experts of these layers in one tensor a kind, as transformers 5 holds them."""
    made = dict(tensors)
    for layer in layers:
        at = f"model.layers.{layer}.mlp.experts."

        def stack(part, end, at=at):
            names = [f"{at}{e}.{part}_proj.weight{end}" for e in range(config.n_routed_experts)]
            return np.stack([made.pop(name) for name in names])

        for end in ("", "_scale_inv") if fp8 else ("",):
            pair = np.concatenate([stack("gate", end), stack("up", end)], axis=1)
            made[f"{at}gate_up_proj{end}"] = pair
            made[f"{at}down_proj{end}"] = stack("down", end)
    return made


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_experts_in_one_tensor_are_those_taken_apart(make_hf, tmp_path, dtype):
    folder, config, tensors = make_hf(dtype, shards=1, moe_intermediate_size=128)
    save_file(fused(tensors, config, (1, 3), dtype == "fp8"), folder / "model.safetensors")
    assert_same_bytes(round_trip(folder, tmp_path), tensors)


def test_wrongly_fused_experts_are_named(make_hf):
    folder, config, tensors = make_hf("fp8", shards=1)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    together = fused(tensors, config, (1,), fp8=True)
    down = together["model.layers.1.mlp.experts.down_proj"]
    save_file(together, folder / "model.safetensors")  # 40 rows each: blocks lie across the two
    with pytest.raises(UserError, match=f"{name}_scale_inv has blocks that lie across gate and up"):
        open_hf(folder)
    plain = {n: t for n, t in together.items() if not n.startswith(name)}
    for change, message in (
        ({name: down}, f"{name} has shape .* instead of"),
        ({EXPERT.format(0) + "down_proj.weight": down[0]}, "is stored twice, alone and in"),
    ):
        save_file(plain | change, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            open_hf(folder)


BAD = {
    "a NaN": ("bf16", "model.norm.weight", np.nan),
    "an infinite expert": ("f32", EXPERT.format(2) + "up_proj.weight", -np.inf),
    "an FP8 NaN": ("fp8", EXPERT.format(2) + "up_proj.weight", np.nan),
    "a scale": ("fp8", EXPERT.format(2) + "up_proj.weight_scale_inv", np.inf),
    "a router bias": ("bf16", "model.layers.1.mlp.gate.e_score_correction_bias", np.nan),
}


@pytest.mark.parametrize("case", BAD)
def test_numbers_that_are_not_finite_are_named_and_refused_unless_asked_for(
    make_hf, tmp_path, case, caplog
):
    dtype, name, value = BAD[case]
    folder, _, tensors = make_hf(dtype, shards=1)
    bad = tensors[name].copy()
    bad.reshape(-1)[-1] = value
    save_file(tensors | {name: bad}, folder / "model.safetensors")
    for target in ("stored", "f32"):
        told = name.removesuffix("_scale_inv") if target == "f32" else name
        with pytest.raises(UserError, match=rf"NaN or infinite.*: {told} \(.*--allow-non-finite"):
            import_hf(folder, tmp_path / "ours", target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    ours = import_hf(folder, tmp_path / "ours", allow_non_finite=True)
    assert f"NaN or infinite numbers in {name} (1)" in caplog.text
    assert_same_bytes(
        exported(export_hf(open_checkpoint(ours), tmp_path / "out")), exported(folder) | {name: bad}
    )


def killed(*_):
    raise KeyboardInterrupt


def test_every_tensor_that_is_not_finite_is_named_also_after_a_kill(make_hf, tmp_path, monkeypatch):
    folder, _, tensors = make_hf("bf16", shards=1)
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(3)]
    ruined = {name: np.full_like(tensors[name], np.nan) for name in names}
    save_file(tensors | ruined, folder / "model.safetensors")
    with monkeypatch.context() as patched:  # ended when all is copied; no error is handled
        patched.setattr(importing, "carry_along", killed)
        with pytest.raises(KeyboardInterrupt):
            import_hf(folder, tmp_path / "ours", allow_non_finite=True)
    assert (tmp_path / ".ours.partial/progress.jsonl").exists()
    with pytest.raises(UserError, match="3 tensors hold NaN or infinite") as error:
        import_hf(folder, tmp_path / "ours")
    assert all(f"{name} (160)" in str(error.value) for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_loading_and_exporting_tell_of_numbers_that_are_not_finite(make_hf, tmp_path, caplog):
    folder, _, tensors = make_hf("bf16", shards=1)
    name = "model.layers.2.input_layernorm.weight"
    save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, folder / "model.safetensors")
    for call in (lambda: load_hf(folder), lambda: export_hf(open_hf(folder), tmp_path / "out")):
        caplog.clear()
        call()
        assert caplog.text.count(f"NaN or infinite numbers in {name} (160)") == 1


def test_counting_agrees_with_isfinite_for_every_code():
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu):
        codes = np.arange(256, dtype=np.uint8).view(dtype)
        expected = np.count_nonzero(~np.isfinite(codes.astype(np.float32)))
        assert count_non_finite(codes) == expected > 0
    for dtype in (ml_dtypes.bfloat16, np.float16):
        codes = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        expected = np.count_nonzero(~np.isfinite(codes.astype(np.float32)))
        assert count_non_finite(codes) == expected > 0
    assert count_non_finite(np.array([0.0, np.inf, -np.inf, np.nan], np.float32)) == 3
