"""One flipped bit anywhere is named: by `verify`, by an export, and before loading when asked."""

import json
import random
import shutil

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.config import Config, RunError, UserError, to_json
from dsv3_jax.data.corpus import prepare
from dsv3_jax.data.tokenizer import ByteTokenizer, train_tokenizer
from dsv3_jax.interop.checkpoint import open_checkpoint
from dsv3_jax.interop.digests import verify_imported
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.import_manifest import MANIFEST
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.safetensors import load_file, save_file
from dsv3_jax.training.manifest import damage, write_manifest
from dsv3_jax.training.saved import newest_valid
from dsv3_jax.verifying import verify


def flip(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


@pytest.fixture
def imported(make_hf, tmp_path):
    """An import of FP8 weights with their scales."""
    return import_hf(make_hf("fp8")[0], tmp_path / "ours")


@pytest.fixture
def run_dir(tmp_path):
    """Two steps of a run, as far as their manifests know."""
    for step in ("4", "8"):
        folder = tmp_path / "run/checkpoints" / step
        (folder / "state/d").mkdir(parents=True)
        (folder / "state/d/0").write_bytes(bytes(1000))
        (folder / "meta").write_text("{}")
        write_manifest(folder)
    (tmp_path / "run/config.json").write_text(to_json(Config()))
    return tmp_path / "run"


@pytest.fixture
def prepared(tmp_path):
    """Prepared data with a tokenizer of their own."""
    (tmp_path / "texts").mkdir()
    texts = [f"document {i}: größe {i * i}\n" * (i + 1) for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    bpe = train_tokenizer(texts, 300, tmp_path / "t.json")
    options = {"val_fraction": 0.2, "fim_rate": 0.1, "seed": 0}
    prepare([tmp_path / "texts"], tmp_path / "data", bpe, **options)
    return tmp_path / "data"


def test_whole_folders_are_whole(make_hf, imported, run_dir, prepared):
    assert verify(imported) == ("an import", [])
    assert verify(make_hf("bf16", name="published")[0]) == ("a Hugging Face folder", [])
    assert verify(run_dir) == ("a run", [])
    assert verify(run_dir / "checkpoints") == ("a run", [])
    assert verify(prepared) == ("prepared data", [])
    assert verify(prepared / "train") == ("token shards", [])


def test_every_flipped_bit_of_an_import_is_found_and_not_exported(imported, tmp_path):
    """Of 20 flips, 19 were loaded and exported."""
    random.seed(0)
    files = sorted((imported / "weights").iterdir())
    for number in range(20):
        path = random.choice(files)
        size = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        byte, bit = random.randrange(header, size), random.randrange(8)
        flip(path, byte, bit)
        ((kind, damaged), names) = verify(imported), verify_imported(imported)
        assert kind == "an import" and len(damaged) == len(names) == 1
        with pytest.raises(RunError, match=names[0].replace(".", r"\.") + " does not match its"):
            dtype = ("stored", "bf16", "f32")[number % 3]
            export_hf(open_checkpoint(imported), tmp_path / "out", dtype)
        assert not (tmp_path / "out").exists()
        flip(path, byte, bit)
    assert verify(imported).damaged == []
    export_hf(open_checkpoint(imported), tmp_path / "out")


def test_every_flipped_bit_beside_an_import_s_weights_is_found(make_hf, tmp_path):
    folder = make_hf("bf16")[0]
    (folder / "tokenizer.json").write_text('{"a tokenizer": "as far as an import knows"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    imported = import_hf(folder, tmp_path / "ours")
    random.seed(0)
    for name in ("tokenizer.json", "generation_config.json", "config.json", MANIFEST) * 5:
        path = imported / name
        byte, bit = random.randrange(path.stat().st_size), random.randrange(8)
        flip(path, byte, bit)
        assert len(verify(imported).damaged) == 1, (name, byte, bit)
        with pytest.raises((RunError, UserError), match=name.replace(".", r"\.")):
            export_hf(open_checkpoint(imported), tmp_path / "out")
        flip(path, byte, bit)
    assert verify(imported).damaged == []
    (imported / "tokenizer.json").unlink()
    assert verify_imported(imported) == ["tokenizer.json"]


def test_a_digest_that_is_not_there_proves_nothing(imported, tmp_path):
    path = imported / MANIFEST
    values = json.loads(path.read_text()) | {"seal": None}
    del values["sha256"]["lm_head.weight"]
    path.write_text(json.dumps(values))
    assert verify_imported(imported) == ["lm_head.weight"]
    with pytest.raises(RunError, match=r"lm_head\.weight does not match"):
        export_hf(open_checkpoint(imported), tmp_path / "out")


def test_published_weights_that_are_not_finite_or_not_whole_are_named(make_hf):
    folder, _, tensors = make_hf("bf16", shards=1)
    path = folder / "model.safetensors"
    ruined = load_file(path)["model.norm.weight"].copy()
    ruined[3:5] = np.array([np.nan, np.inf], ml_dtypes.bfloat16)
    save_file(tensors | {"model.norm.weight": ruined}, path)
    (problem,) = verify(folder).damaged
    assert problem.endswith("model.norm.weight: 2 numbers are NaN or infinite")
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = verify(folder).damaged
    assert "it is cut off" in problem


def test_every_damaged_step_of_a_run_is_named(run_dir):
    flip(run_dir / "checkpoints/4/state/d/0", 500)
    (run_dir / "checkpoints/8/meta").unlink()
    damaged = verify(run_dir).damaged
    assert [line.split("/checkpoints/")[1] for line in damaged] == [
        "4: state/d/0 does not match its sha256",
        "8: meta is missing",
    ]
    (run_dir / "config.json").write_text('{"model": {"num_hidden_layers": 1000000000}}')
    assert "num_hidden_layers=1000000000 exceeds 1024" in verify(run_dir).damaged[-1]
    shutil.rmtree(run_dir / "checkpoints/4")
    shutil.rmtree(run_dir / "checkpoints/8")
    assert "holds no step" in verify(run_dir).damaged[0]


def test_a_file_that_no_manifest_lists_is_named_and_does_not_stop_a_resume(run_dir, capsys):
    """Orbax reads each process_N of array_metadatas that lies there."""
    step = run_dir / "checkpoints/4"
    (step / "state/array_metadatas").mkdir()
    (step / "state/array_metadatas/process_1").write_text("{}")
    (step / "link").symlink_to("/nowhere")
    assert [line.split("/checkpoints/")[1] for line in verify(run_dir).damaged] == [
        "4: link is not in its MANIFEST.json",
        "4: state/array_metadatas/process_1 is not in its MANIFEST.json",
    ]
    assert cli.main(["verify", str(run_dir)]) == 1
    assert capsys.readouterr().out.count("damaged: ") == 2
    assert newest_valid(run_dir / "checkpoints") == 8 and damage(step) is None
    for i in range(20):
        (step / f"{i}").touch()
    assert verify(run_dir).damaged[-1].endswith("/4: and 10 more files")


@pytest.mark.parametrize(
    "files", [{"../../config.json": 1}, {"/etc/hostname": 1}, {"a\0": 1}, {}, {"state": 1}]
)
def test_a_manifest_that_leads_elsewhere_is_damage(run_dir, files):
    record = {"size": 1, "sha256": "0"}
    path = run_dir / "checkpoints/4/MANIFEST.json"
    path.write_text(json.dumps({"format": 1, "files": dict.fromkeys(files, record)}))
    assert len(verify(run_dir).damaged) == 1


def test_a_manifest_of_a_device_does_not_hang(run_dir):
    folder = run_dir / "checkpoints/4"
    (folder / "meta").unlink()
    (folder / "meta").symlink_to("/dev/zero")
    assert "outside its folder" in verify(run_dir).damaged[0]


def test_every_damaged_file_of_prepared_data_is_named(prepared):
    flip(prepared / "train/tokens-00000.bin", 10)
    flip(prepared / "val/tokens-00000.bin", 10)
    flip(prepared / "tokenizer.json", 10)
    (prepared / "recipe.json").unlink()
    found = "\n".join(verify(prepared).damaged)
    for name in ("train/tokens-00000.bin", "val/tokens-00000.bin", "recipe.json", "tokenizer.json"):
        assert f"/{name}" in found
    (prepared / "tokenizer.json").unlink()
    (prepared / "val/index.json").write_text("{")
    found = "\n".join(verify(prepared).damaged)
    assert "tokenizer.json is missing" in found and "val/index.json: not a shard index" in found


def test_data_of_the_byte_tokenizer_need_no_file_of_it(prepared, tmp_path):
    options = {"val_fraction": 0.2, "fim_rate": 0.1, "seed": 0}
    prepare([tmp_path / "texts"], tmp_path / "bytes", ByteTokenizer(), **options)
    assert verify(tmp_path / "bytes") == ("prepared data", [])


def test_the_command_says_what_is_damaged_and_exits_with_1(run_dir, capsys):
    assert cli.main(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir} is a run: whole\n"
    flip(run_dir / "checkpoints/4/state/d/0", 500)
    (run_dir / "checkpoints/8").rename(run_dir / "checkpoints/7\x1b[31m")
    assert cli.main(["verify", str(run_dir)]) == 1
    out = capsys.readouterr().out
    assert "damaged: " in out and "state/d/0 does not match its sha256" in out and "\x1b" not in out
    for folder in (run_dir / "nothing", run_dir / "checkpoints/4/state"):
        with pytest.raises(UserError):
            cli.main(["verify", str(folder)])
