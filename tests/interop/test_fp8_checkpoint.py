"""Published FP8 weights held as they are stored, and tokens from them."""

import jax
import numpy as np
import pytest

import infer
from dsv3_jax import loading
from dsv3_jax.interop.checkpoint import open_hf
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.load import load_hf, stores_fp8
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.quantization.block_scaled import BlockScaled


def blocks_of(variables):
    nodes = jax.tree_util.tree_leaves_with_path(
        variables, is_leaf=lambda node: isinstance(node, BlockScaled)
    )
    return {
        jax.tree_util.keystr(path): node for path, node in nodes if isinstance(node, BlockScaled)
    }


@pytest.mark.slow
def test_weights_held_here_are_those_of_an_fp8_export(make_hf, tmp_path):
    folder, _, _ = make_hf("f32")
    exported = export_hf(open_hf(folder), tmp_path / "out", "fp8")
    config, plain = load_hf(folder, dtype="f32")
    held = blocks_of(to_fp8_weights(plain, config))
    stored = blocks_of(load_hf(exported)[1])
    assert held.keys() == stored.keys() and len(held) > 20
    for path, expected in stored.items():
        assert held[path].tile == expected.tile
        np.testing.assert_array_equal(held[path].values, expected.values, err_msg=path)
        # The export divides by 448, the device multiplies by 1 / 448: one unit in the last place.
        np.testing.assert_allclose(held[path].scales, expected.scales, rtol=1.2e-7, err_msg=path)


@pytest.mark.slow
def test_infer_keeps_a_published_fp8_checkpoint_in_fp8(make_hf, capsys):
    folder, _, tensors = make_hf("fp8")
    assert stores_fp8(open_hf(folder))
    blocks = blocks_of(loading.load(folder, fp8=True).variables)
    values = blocks["['params']['moe_layers']['self_attn']['o_proj']"].values
    np.testing.assert_array_equal(values[1], tensors["model.layers.2.self_attn.o_proj.weight"])

    argv = ["--checkpoint", str(folder), "--max-new-tokens", "3", "--temperature", "0"]
    assert infer.main([*argv, "--token-ids", "1,2", "--fp8"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.strip().split(",")) <= 3
    assert "FP8 with scales; 1." in shown.err


def test_a_bf16_folder_is_quantised_when_held(make_hf):
    folder, _, _ = make_hf("bf16")
    assert not stores_fp8(open_hf(folder))
    assert not blocks_of(loading.load(folder).variables)
    assert blocks_of(loading.load(folder, fp8=True).variables)
