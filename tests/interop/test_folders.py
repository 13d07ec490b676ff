"""Folders as people have them: weights not fetched, in another form, without a tokenizer."""

import json

import numpy as np
import pytest

import infer
from dsv3_jax.config import UserError
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.checkpoint import is_weights_folder, open_checkpoint
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.safetensors import save_file
from dsv3_jax.loading import find_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 688586727753\n"
FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_as_one(make_hf, tmp_path, name):
    folder, _, _ = make_hf("bf16")
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer.*688,586,727,753.*fetch"):
        import_hf(folder, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


OTHER_FORMS = {
    "one pickle": (["pytorch_model.bin"], "only safetensors are read, found pytorch_model.bin"),
    "pickles with an index": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        "found pytorch_model-00001-of-00002.bin, pytorch_model.bin.index.json",
    ),
    "consolidated": (["consolidated.00.pth"], "found consolidated.00.pth"),
    "gguf": (["model-q4.gguf"], r"found model-q4.gguf\. Look"),
    "shards without their index": ([FIRST], f"found {FIRST}, but neither {INDEX}"),
    "a single file of another name": (["consolidated.safetensors"], "fetch the index, or rename"),
    "nothing": ([], "no weights are here"),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_weights_in_another_form_are_named(make_hf, case):
    folder, _, _ = make_hf("bf16", shards=1)
    (folder / "model.safetensors").unlink()
    files, message = OTHER_FORMS[case]
    for name in files:
        (folder / name).write_bytes(b"PK")
    assert is_weights_folder(folder)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)
    # The command says so too, not that a tokenizer or a run's checkpoint is missing.
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=message):
        infer.main(["--checkpoint", str(folder), "--prompt", "hi"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.safetensors", "is a link to nowhere, as an interrupted download leaves it"),
        ("config.json", "config.json: is a link to nowhere"),
        ("generation_config.json", "generation_config.json: is not a file"),
        ("adapter_config.json", "holds an adapter.*merge it into its base"),
    ],
)
def test_what_is_no_file_of_a_model_is_named(make_hf, name, message):
    folder, _, _ = make_hf("bf16", shards=1)
    (folder / name).unlink(missing_ok=True)
    if name == "generation_config.json":
        (folder / name).mkdir()
    elif name == "adapter_config.json":
        (folder / "config.json").rename(folder / name)
    else:
        (folder / name).symlink_to("blob-that-was-never-fetched")
    assert is_weights_folder(folder)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_a_run_and_an_empty_folder_are_no_weights_folder(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"model": {"vocab_size": 3}}')
    (tmp_path / "empty").mkdir()
    for name in ("run", "empty", "nothing"):
        assert not is_weights_folder(tmp_path / name)


TOKENIZERS = {
    "none": ([], "found no tokenizer's file"),
    "sentencepiece": (["tokenizer.model"], "found tokenizer.model"),
    "slow BPE": (["vocab.json", "merges.txt"], r"found vocab.json, merges.txt"),
    "tiktoken alone": (["tiktoken.model"], r"tiktoken.model: needs the tokenizer_config.json"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_prompt_without_a_tokenizer_is_refused_with_the_ways_out(make_hf, case, capsys):
    folder, _, _ = make_hf("f32", num_hidden_layers=1, num_nextn_predict_layers=0)
    (folder / "tokenizer.json").unlink()
    files, message = TOKENIZERS[case]
    for name in files:
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=message) as error:
        infer.main(["--checkpoint", str(folder), "--prompt", "hi"])
    for way in ("tokenizer.json", "--tokenizer", "--token-ids"):
        assert way in str(error.value)
    ids = ["--token-ids", "1,2", "--max-new-tokens", "1", "--temperature", "0"]
    assert infer.main(["--checkpoint", str(folder), *ids]) == 0
    assert capsys.readouterr().out.strip().isdigit()


# What generation_config.json says, and what generation then ends with; config.json says 5.
ENDS = {
    "one id": ({"bos_token_id": 0, "eos_token_id": 7}, 7),
    "several, and keys of no concern": ({"eos_token_id": [7, 9], "top_p": 0.95, "x": {}}, (7, 9)),
    "null: nothing ends a text": ({"eos_token_id": None}, ()),
    "no such key": ({"temperature": 0.6}, 5),
    "no file": (None, 5),
}


@pytest.mark.parametrize("case", ENDS)
def test_generation_ends_with_what_generation_config_says(make_hf, tmp_path, case):
    folder, config, _ = make_hf("bf16", eos_token_id=5)
    values, ends = ENDS[case]
    if values is not None:
        (folder / "generation_config.json").write_text(json.dumps(values))
    ours = import_hf(folder, tmp_path / "ours")
    for source in (folder, ours):
        assert open_checkpoint(source).config.eos_token_id == config.eos_token_id == 5
        assert load_hf(source)[0].eos_token_id == ends


@pytest.mark.parametrize("ids", ["1", [1, "2"], 67, [0, 67], -1, True])
def test_ends_that_are_no_ids_are_refused(make_hf, ids):
    folder, _, _ = make_hf("bf16")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match=r"generation_config\.json.*\n.*eos_token_id"):
        open_checkpoint(folder)


def always(make_hf, token, **fields):
    """A folder whose model writes `token` after anything."""
    folder, _, tensors = make_hf("f32", shards=1, num_nextn_predict_layers=0, **fields)
    head = np.zeros_like(tensors["lm_head.weight"])
    head[token, 0] = 10
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[:, 0] = 50
    norm = np.ones_like(tensors["model.norm.weight"])
    changed = {"lm_head.weight": head, "model.embed_tokens.weight": embedding}
    save_file(tensors | changed | {"model.norm.weight": norm}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config_says", [7, [3, 7], 5])
def test_infer_stops_where_the_files_say(make_hf, capsys, config_says):
    folder = always(make_hf, 7, num_hidden_layers=1)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": config_says}))
    options = ["--token-ids", "1,2,3", "--temperature", "0", "--max-new-tokens", "3"]
    assert infer.main(["--checkpoint", str(folder), *options]) == 0
    assert capsys.readouterr().out.strip() == ("7,7,7" if config_says == 5 else "7")
    if config_says == 5:
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
        assert infer.main(["--checkpoint", str(folder), *options]) == 0
        assert capsys.readouterr().out.strip() == "7"


def test_a_run_on_bytes_is_read_with_bytes_and_another_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert find_tokenizer(tmp_path).name == "byte"
    (tmp_path / "config.json").write_text('{"data": {"tokenizer": "byte"}}')
    assert find_tokenizer(tmp_path).name == "byte"
    (tmp_path / "config.json").write_text('{"data": {"tokenizer": "bpe:1024"}}')
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        find_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_the_model_s_own_is_told(tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"data": {"tokenizer": "byte"}}')
    other = tmp_path / "other.json"
    train_tokenizer(["hello hello world"], 270, other)
    assert find_tokenizer(tmp_path, "byte").name == "byte"
    assert not caplog.records
    assert find_tokenizer(tmp_path, str(other)).name == "other.json"
    (told,) = caplog.messages
    assert "other.json (2" in told and "is not the model's own, byte (261 ids" in told
    caplog.clear()
    train_tokenizer(["hello hello world"], 270, tmp_path / "tokenizer.json")
    find_tokenizer(tmp_path, str(other))
    assert not caplog.records  # the same file
    find_tokenizer(tmp_path, "byte")
    assert "tokenizer.json (2" in caplog.text
