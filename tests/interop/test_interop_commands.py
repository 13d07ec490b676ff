"""The commands behind `import-hf`, `export-hf` and `logits`, and the one table of names."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.interop import commands
from dsv3_jax.interop.checkpoint import open_checkpoint
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.name_map import leaves, num_places, places
from dsv3_jax.model.transformer import init_variables
from tests.fixtures.interop.tiny import TINY


def no_run(folder, step):
    raise AssertionError(f"{folder} is not a run")


def test_v3_has_the_published_counts():
    config = ModelConfig()
    table = places(config)
    assert len(table) == num_places(config)
    # Of the released checkpoint map: parameters stored, those in FP8, and scale tensors.
    assert sum(math.prod(place.shape) for place in table.values()) == 684_489_845_504
    assert sum(math.prod(place.shape) for place in table.values() if place.fp8) == 680_571_043_840
    assert sum(place.fp8 for place in table.values()) == 45_808


def test_every_leaf_of_the_model_has_its_place():
    config = dataclasses.replace(TINY, num_nextn_predict_layers=2)
    abstract = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    expected = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    assert {path: leaf.lead + leaf.dims for path, leaf in leaves(config).items()} == expected


def test_import_export_and_logits_from_each_kind_of_folder(make_hf, tmp_path, capsys):
    folder, config, _ = make_hf("f32", num_hidden_layers=2, num_nextn_predict_layers=0)
    ours, exported = tmp_path / "ours", tmp_path / "out"
    commands.run_import(commands.ImportOptions(folder, ours))
    commands.run_export(commands.ExportOptions(ours, exported), no_run)
    assert "GB/s" in capsys.readouterr().out
    np.save(tmp_path / "ids.npy", np.arange(7))
    found = []
    for source in (folder, ours, exported):
        out = tmp_path / "logits.npz"
        commands.run_logits(commands.LogitsOptions(source, tmp_path / "ids.npy", out), no_run)
        found.append(dict(np.load(out)))
    assert found[0]["logits"].shape == (1, 7, config.vocab_size)
    assert found[0]["hidden"].shape == (3, 1, 7, config.hidden_size)
    assert found[0]["experts"].shape == found[0]["weights"].shape == (1, 1, 7, 2)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, array in found[0].items():
            np.testing.assert_array_equal(array, other[name])


def test_export_of_a_run_takes_its_variables_and_tokenizer(make_hf, tmp_path):
    folder, _, _ = make_hf("f32")
    config, variables = load_hf(folder)
    (tmp_path / "run").mkdir()
    train_tokenizer(["a b"], 261, tmp_path / "bpe.json")
    options = commands.ExportOptions(tmp_path / "run", tmp_path / "out", dtype="bf16", step="7")

    def open_run(run, step):
        assert (run, step) == (tmp_path / "run", "7")
        return commands.OpenedRun(config, lambda: variables, tmp_path / "bpe.json")

    commands.run_export(options, open_run)
    assert (
        load_tokenizer(tmp_path / "out").vocab_size
        == load_tokenizer(tmp_path / "bpe.json").vocab_size
    )
    found = open_checkpoint(tmp_path / "out")
    assert found.config == dataclasses.replace(config, dtype="bfloat16")


@pytest.mark.parametrize("dst", [".", "..", "../hf"])
def test_what_is_read_is_not_written_over(make_hf, dst):
    folder, _, _ = make_hf("f32")
    before = sorted(path.name for path in folder.iterdir())
    for command in ("import-hf", "export-hf"):
        with pytest.raises(UserError, match="is, or holds, what is read"):
            cli.main([command, str(folder), str(folder / dst), "--overwrite"])
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("dst", ["run", "run/checkpoints", "run/checkpoints/12"])
def test_checkpoints_are_not_written_over(make_hf, tmp_path, dst):
    folder, _, _ = make_hf("f32")
    step = tmp_path / "run/checkpoints/12"
    step.mkdir(parents=True)
    (step / "MANIFEST.json").write_text("{}")
    for command in ("import-hf", "export-hf"):
        with pytest.raises(UserError, match="holds a run's checkpoints"):
            cli.main([command, str(folder), str(tmp_path / dst), "--overwrite"])
    assert (step / "MANIFEST.json").exists()
    with pytest.raises(UserError, match="is a run: export-hf"):
        cli.main(["import-hf", str(tmp_path / "run"), str(tmp_path / "out")])


BAD_TOKENS = {
    "floats": (np.zeros(3), "integers"),
    "three dims": (np.zeros((1, 2, 3), np.int32), r"\[T\] or \[B, T\]"),
    "none": (np.zeros(0, np.int32), r"\[T\] or \[B, T\]"),
    "beyond the vocabulary": (np.array([67]), "vocab_size is 67"),
    "negative": (np.array([-1]), "vocab_size is 67"),
    "too long": (np.zeros(513, np.int64), "exceed max_position_embeddings=512"),
    "pickled": (np.array([{"a": 1}], dtype=object), "allow_pickle"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_token_files_are_refused(make_hf, tmp_path, case):
    folder, _, _ = make_hf("bf16", shards=1)
    tokens, message = BAD_TOKENS[case]
    np.save(tmp_path / "ids.npy", tokens, allow_pickle=True)
    options = commands.LogitsOptions(folder, tmp_path / "ids.npy", tmp_path / "out.npz")
    with pytest.raises(UserError, match=message):
        commands.run_logits(options, no_run)
    assert not (tmp_path / "out.npz").exists()


def test_missing_folders_and_token_files_are_refused(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16", shards=1)
    for options in (
        commands.LogitsOptions(tmp_path / "none", tmp_path / "ids.npy", tmp_path / "out.npz"),
        commands.LogitsOptions(folder, tmp_path / "ids.npy", tmp_path / "out.npz"),
    ):
        with pytest.raises(UserError, match=r"No such file|no such folder"):
            commands.run_logits(options, no_run)
