"""What an export holds beside the weights: tokenizer, generation_config.json, a model card."""

import dataclasses
import json

import pytest

from configs.tiny import get_config
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.interop import commands
from dsv3_jax.interop.checkpoint import open_checkpoint, open_hf
from dsv3_jax.interop.commands import OpenedRun
from dsv3_jax.interop.companions import RunFacts, _with_bos
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.load import load_hf
from dsv3_jax.training.metrics import newest_numbers
from tests.fixtures.interop.tiny import TINY

TEXT = "def route(x):\n    return x @ w  # größer\n"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture
def exported_run(make_hf, tmp_path, capsys):
    """exported_run(tokenizer=..., **fields of the model) -> the exported folder."""

    def make(tokenizer: str, **fields):
        small = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": 300}
        folder, _, _ = make_hf("f32", **(small | fields))
        config, variables = load_hf(folder)
        run = tmp_path / "runs/first"
        run.mkdir(parents=True)
        file = run / "tokenizer.json"
        if tokenizer != "byte":
            train_tokenizer([TEXT * 3], 300, file)
            (run / "chat_template.jinja").write_text("{{ messages }}")
        whole = get_config()
        whole = dataclasses.replace(
            whole, model=config, data=dataclasses.replace(whole.data, tokenizer=tokenizer)
        )
        facts = RunFacts(12, whole, {"tokens": 6144, "loss": 4.25, "val_loss": 4.5, "mfu": None})
        opened = OpenedRun(config, lambda: variables, file if file.exists() else None, facts)
        options = commands.ExportOptions(run, tmp_path / "out")
        commands.run_export(options, lambda folder, step: opened)
        return tmp_path / "out"

    return make


def test_an_exported_run_feeds_what_infer_feeds(exported_run, tmp_path):
    out = exported_run("bpe:300")
    trained, exported = load_tokenizer(tmp_path / "runs/first"), load_tokenizer(out)
    assert exported.prompt_prefix == trained.prompt_prefix == (0,)
    assert exported.encode(TEXT).tolist() == trained.encode(TEXT).tolist()
    # The library's own call, which AutoTokenizer's is.
    whole = exported._tokenizer.encode(TEXT).ids
    assert whole == [0, *trained.encode(TEXT)]
    says = json.loads((out / "tokenizer_config.json").read_text())
    assert (says["bos_token"], says["eos_token"], says["add_bos_token"]) == (BOS, EOS, True)
    assert says["model_max_length"] == TINY.max_position_embeddings
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.oracle
def test_autotokenizer_feeds_what_infer_feeds(exported_run, tmp_path):
    pytest.importorskip("torch", reason="needs the oracle extra: torch is not installed")
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    out = exported_run("bpe:300", eos_token_id=(1, 4))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    assert theirs(TEXT).input_ids == [*ours.prompt_prefix, *ours.encode(TEXT)]
    assert theirs(TEXT, TEXT).input_ids == [0, *ours.encode(TEXT), 0, *ours.encode(TEXT)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True) == TEXT
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == [1, 4]
    # A second reading of what it saves itself feeds the same.
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(tmp_path / "theirs").prompt_prefix == (0,)


@pytest.mark.parametrize("ends", [1, (1, 4)])
def test_an_exported_run_says_what_ends_a_text(exported_run, ends):
    out = exported_run("bpe:300", eos_token_id=ends)
    says = json.loads((out / "generation_config.json").read_text())
    assert says == {"bos_token_id": 0, "eos_token_id": 1 if ends == 1 else [1, 4]}
    assert load_hf(out)[0].eos_token_id == ends


def test_a_run_on_bytes_says_that_it_has_no_tokenizer(exported_run, capsys):
    out = exported_run("byte", bos_token_id=256, eos_token_id=257)
    assert "no tokenizer to export: the run was trained on bytes" in capsys.readouterr().out
    assert not list(out.glob("tokenizer*"))
    assert "--tokenizer byte" in (out / "README.md").read_text()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 257


def test_the_card_has_the_runs_numbers_and_how_to_load(exported_run, tmp_path):
    card = (exported_run("bpe:300") / "README.md").read_text()
    for row in ("steps | 12", "tokens | 6,144", "loss | 4.2500", "val_loss | 4.5000"):
        assert f"| {row} |" in card
    assert "2 layers, 1 of them dense" in card and "mfu" not in card
    assert 'AutoTokenizer.from_pretrained("out")' in card
    assert "--checkpoint out" in card
    assert str(tmp_path) not in card


def test_what_a_publisher_wrote_is_kept_through_import_and_export(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16", eos_token_id=(3, 5))
    kept = {
        "generation_config.json": '{"eos_token_id": [3, 7], "temperature": 0.6}',
        "tokenizer_config.json": '{"add_bos_token": false, "chat_template": "x"}',
        "chat_template.jinja": "{{ bos_token }}",
        "README.md": "# Theirs",
        "LICENSE": "MIT",
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    ours = import_hf(folder, tmp_path / "ours")
    direct = export_hf(open_hf(folder), tmp_path / "direct")
    through = export_hf(open_checkpoint(ours), tmp_path / "through")
    for out in (ours, direct, through):
        for name, text in kept.items():
            assert (out / name).read_text() == text, name
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, 5]
        assert load_hf(out)[0].eos_token_id == (3, 7)


def test_a_card_is_written_for_weights_without_one(make_hf, tmp_path):
    folder, _, tensors = make_hf("fp8")
    card = (export_hf(open_hf(folder), tmp_path / "out") / "README.md").read_text()
    assert "## Training" not in card and "F8_E4M3" in card
    copies = ("layers.3.embed_tokens", "shared_head.head")
    count = sum(
        t.size
        for n, t in tensors.items()
        if "scale_inv" not in n and not any(c in n for c in copies)
    )
    assert f"{count:,} stored" in card


def test_bos_joins_a_post_processor_that_places_none():
    byte_level = {"type": "ByteLevel", "trim_offsets": False}
    template = _with_bos(None, "<s>", 1)
    assert template["type"] == "TemplateProcessing"
    assert template["special_tokens"]["<s>"]["ids"] == [1]
    joined = _with_bos(byte_level, "<s>", 1)
    assert joined == {"type": "Sequence", "processors": [byte_level, template]}
    assert _with_bos(joined, "<s>", 1) is joined


def test_a_runs_newest_numbers_up_to_a_step(tmp_path):
    lines = [
        {"step": 2, "loss": 5.0, "val_loss": 5.5},
        {"step": 3, "loss": 4.0, "mfu": None},
        {"step": 4, "loss": 3.0, "val_loss": 3.5},
    ]
    path = tmp_path / "metrics.jsonl"
    assert newest_numbers(path, 3) == {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert newest_numbers(path, 3) == {"step": 3, "loss": 4.0, "val_loss": 5.5}
