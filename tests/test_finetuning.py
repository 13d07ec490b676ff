"""A published folder and a few conversations: prepared, trained on, and what is refused."""

import dataclasses
import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import train
from dsv3_jax import cli, loading
from dsv3_jax.compiling import apart, report, targets
from dsv3_jax.compiling.command import CompileOptions
from dsv3_jax.config import LoraConfig, UserError, config_from_dict
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.checkpoint import open_checkpoint
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.peft_adapter import export_adapter
from dsv3_jax.interop.safetensors import load_file
from dsv3_jax.model.adapters import init_adapters
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.starting import open_base, open_origin, open_weights
from dsv3_jax.training.extensions import Extensions
from dsv3_jax.training.saved import read_saved
from dsv3_jax.training.state import abstract_state
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

MODEL = dataclasses.replace(
    TINY, vocab_size=320, num_hidden_layers=2, bos_token_id=0, eos_token_id=1
)
CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        train=TrainConfig(steps=3, batch_size=2, seq_len=48, log_every=1, eval_every=3,
                          eval_batches=1, sample_tokens=0),
        schedule=ScheduleConfig(warmup_steps=0),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
"""


def talk(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("hf") / "m", MODEL, hf_tensors(MODEL, "bf16"))
    train_tokenizer(["one two three four of a talk " * 9], 300, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "chat.py"
    path.write_text(CONFIG)
    return path


def write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def prepare(chat, out, hf, *more):
    argv = ["prepare", chat, "--out", out, "--tokenizer", hf, *more]
    return cli.main([*map(str, argv)])


@pytest.fixture(scope="module")
def lora_run(hf, config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    chat = write_lines(folder / "chat.jsonl", [talk("one", "two"), talk("three", "four of a")])
    prepare(chat, folder / "data", hf)
    argv = ["--config", config_file, "--init-from", hf, "--data.path", folder / "data"]
    argv += ["--run-dir", folder / "run", "--lora.rank", 2, "--lora.targets"]
    argv += ["q_b_proj", "kv_b_proj", "shared_experts/down_proj", "--train.sample-tokens", 2]
    argv += ["--optimizer.average-decay", 0.5]
    assert train.main([*map(str, argv)]) == 0
    return folder / "run", [*map(str, argv)]


@pytest.mark.slow
def test_a_lora_run_holds_adapters_alone_and_lowers_the_loss(lora_run, hf):
    run, _ = lora_run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["ce"] for line in lines if "ce" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    saved = read_saved(run / "checkpoints" / "3")["arrays"]
    kinds = {name.split("/")[-1] for name in saved if name.startswith("params/")}
    assert kinds == {"lora_a", "lora_b"} and not any(n.startswith("router") for n in saved)


@pytest.mark.slow
def test_a_lora_run_begins_with_an_own_optimizer(lora_run):
    averaging, weights = cli.parse_run(lora_run[1], description="")
    optimizer = dataclasses.replace(averaging.optimizer, average_decay=0.0)
    config = dataclasses.replace(averaging, optimizer=optimizer)
    own = Extensions(optimizer=optax.sgd(0.1, momentum=0.9))
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    abstract = abstract_state(config, layout, own)
    state = open_origin(config, weights, None).create_state(abstract, own)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    with pytest.raises(UserError, match="average_decay needs the package's own"):
        abstract_state(averaging, layout, own)


@pytest.mark.slow
def test_a_lora_run_is_read_and_exported(lora_run, hf, tmp_path):
    """Its own logits, those of the merged export, and the adapter's matrices by peft's names."""
    run, _ = lora_run
    tokens = np.arange(2, 26, dtype=np.int32).reshape(2, 12)
    model, base = loading.load(run), loading.load(hf)
    config = dataclasses.replace(model.config.model, dtype="float32")
    logits = jax.jit(lambda variables: forward(variables, tokens, config).logits)
    with pytest.raises(UserError, match="is a LoRA run: --adapter exports"):
        cli.main(["export-hf", str(run), str(tmp_path / "x")])
    cli.main(["export-hf", str(run), str(tmp_path / "merged"), "--merge", "--dtype", "f32"])
    merged = logits(load_hf(tmp_path / "merged", dtype="f32")[1])
    assert np.abs(logits(model.variables) - merged).max() < 3e-4
    assert np.abs(logits(base.variables) - merged).max() > 3e-3
    for option in (["--merge"], ["--dtype", "bf16"]):
        with pytest.raises(UserError, match=f"leave out {option[0]}"):
            cli.main(["export-hf", str(run), str(tmp_path / "x"), "--adapter", *option])


@pytest.mark.slow
def test_adapters_and_their_average_are_exported_by_peft_s_names(lora_run, tmp_path):
    """Of feed-forwards as parameters, which peft would else take for those of routed experts."""
    run, _ = lora_run
    found = {}
    for name, options in (("last", []), ("average", ["--ema"])):
        folder = tmp_path / name
        cli.main(["export-hf", str(run), str(folder), "--adapter", *options])
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["target_parameters"] == ["model.layers.1.mlp.shared_experts.down_proj.weight"]
        assert len(values["target_modules"]) == 4
        found[name] = load_file(folder / "adapter_model.safetensors")
    assert found["last"].keys() == found["average"].keys()
    beside = "base_model.model.model.layers.1.mlp.shared_experts.down_proj.lora_B.weight"
    last, average = (found[name][beside] for name in ("last", "average"))
    assert np.any(last) and np.any(average) and np.abs(last - average).max() > 0
    cli.main(["export-hf", str(run), str(tmp_path / "merged"), "--merge", "--ema"])
    a, row = found["average"][beside.replace("lora_B", "lora_A")], 7
    merged, base = (
        open_checkpoint(folder).tensors["model.layers.1.mlp.shared_experts.down_proj.weight"]
        for folder in (tmp_path / "merged", open_base(run, run_config(run)).folder)
    )
    want = base.read(row, row + 1) + 8 * average[row] @ a
    np.testing.assert_allclose(merged.read(row, row + 1), want, atol=1e-5)


@pytest.mark.slow
def test_compile_opens_the_weights_and_has_the_frozen_base(lora_run, hf, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(cli, "run_compile", lambda *args: given.extend(args) or 0)
    options = CompileOptions(config=Path(lora_run[1][1]), topology="h200:1x1")
    assert cli.compile_for(options, lora_run[1][2:]) == 0
    _, config = given
    assert config.init_from == str(hf)

    class Seen(Exception):
        pass

    def compile_program(built, *_):
        raise Seen(built)

    # What the process that compiles does, up to XLA.
    monkeypatch.setattr(report, "compile_program", compile_program)
    monkeypatch.setattr(targets, "devices_of", lambda target: jax.devices()[:1])
    with pytest.raises(Seen) as seen:
        apart._compiled(apart.Task(config, "h200:1x1"), tmp_path / "said")
    (built,) = seen.value.args
    assert built.arguments["frozen base"]["params"].keys() >= {"norm"}


def test_an_adapter_of_attention_has_peft_s_names(hf, tmp_path):
    lora = LoraConfig(rank=2, alpha=16.0, targets=("q_b_proj",))
    adapters = init_adapters(jax.random.key(0), MODEL, lora)
    export_adapter(adapters, MODEL, lora, str(hf), tmp_path / "adapter", files_from=hf)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (2, 16.0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_b_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (2, MODEL.q_lora_rank)
    heads = MODEL.num_attention_heads * MODEL.qk_head_dim
    assert tensors[f"{name}.lora_B.weight"].shape == (heads, 2)
    assert values["target_modules"] == [f"model.layers.{i}.self_attn.q_b_proj" for i in (0, 1)]
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


def run_config(run):
    return config_from_dict(json.loads((run / "config.json").read_text()))


@pytest.mark.slow
def test_a_base_is_found_from_wherever_the_run_is_read(lora_run, hf, tmp_path, monkeypatch):
    run, _ = lora_run
    config = run_config(run)
    monkeypatch.chdir(tmp_path)
    relative = dataclasses.replace(config, init_from="no/such/place/from/here")
    assert open_base(run, relative).folder.samefile(hf)


@pytest.mark.slow
def test_an_adapter_does_not_go_on_another_base(lora_run, hf, tmp_path):
    _, argv = lora_run
    other = write_hf(tmp_path / "other", MODEL, hf_tensors(MODEL, "bf16", seed=5))
    shutil.copyfile(hf / "tokenizer.json", other / "tokenizer.json")
    more = ["--init-from", str(other), "--train.steps", "4"]
    with pytest.raises(UserError, match="begun with other weights"):
        train.main([*argv, *more])
    with pytest.raises(UserError, match="needs init_from"):
        train.main(["--lora.rank", "2", "--run-dir", str(tmp_path / "run")])


REFUSED = {
    "template fails": "{{ raise_exception('no system') }}",
    "template is hostile": "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}",
    "nothing is a target": "{% generation %}{% endgeneration %}{{ messages[0].content }}",
    "does not compile": "{% for %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_fail_name_the_row(hf, tmp_path, name):
    chat = write_lines(tmp_path / "chat.jsonl", [talk("one", "two"), talk("three", "four")])
    (tmp_path / "t.jinja").write_text(REFUSED[name])
    with pytest.raises(UserError) as error:
        prepare(chat, tmp_path / "data", hf, "--chat-template", tmp_path / "t.jinja")
    if name != "does not compile":
        assert "chat.jsonl:1: " in str(error.value)
    assert not (tmp_path / "data").exists()


def test_rows_that_cannot_be_learnt_from_stop_it_or_are_counted(hf, tmp_path, capsys):
    records = [
        talk("one", "two"),
        {"messages": [{"role": "user", "content": "one"}]},
        {"messages": [{"role": "wizard", "content": "one"}]},
        {"prompt": "one ", "completion": "two"},
        {"text": "of a talk"},
    ]
    chat = write_lines(tmp_path / "chat.jsonl", records)
    with pytest.raises(UserError, match=r"chat.jsonl:2: no assistant turn"):
        prepare(chat, tmp_path / "data", hf)
    prepare(chat, tmp_path / "data", hf, "--on-error", "skip")
    said = capsys.readouterr().out
    assert "no assistant turn" in said and "wizard" in said
    assert "train: 3 documents" in said


def test_files_without_conversations(hf, tmp_path):
    empty = tmp_path / "chat.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="empty"):
        prepare(empty, tmp_path / "data", hf)
    only = write_lines(tmp_path / "only.jsonl", [{"messages": []}] * 2)
    with pytest.raises(UserError, match="no conversation in 1 files"):
        prepare(only, tmp_path / "data", hf, "--on-error", "skip")
    text = write_lines(tmp_path / "text.jsonl", [{"text": "words"}])
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="holds no conversations"):
        prepare(text, tmp_path / "data", hf, "--chat-template", tmp_path / "t.jinja")


@pytest.mark.slow
def test_conversations_longer_than_a_row(hf, config_file, tmp_path):
    chat = write_lines(tmp_path / "chat.jsonl", [talk("one", "four " * 80)])
    prepare(chat, tmp_path / "data", hf)
    argv = ["--config", config_file, "--init-from", hf, "--data.path", tmp_path / "data"]
    argv += ["--run-dir", tmp_path / "run"]
    with pytest.raises(UserError, match="long_documents=cut"):
        train.main([*map(str, argv)])


# (command, its options, words of the one message); {chat} is read, {run} would be written.
WRONG = {
    "another architecture": ("train", "--init-from {llama} --run-dir {run}", "model_type='llama'"),
    "no such folder": ("train", "--init-from {run}/x --run-dir {run}", "no such folder"),
    "targets that match nothing": (
        "train",
        "--config {config} --init-from {hf} --run-dir {run} --data.path {data} --lora.rank 2 "
        "--lora.targets qq_proj",
        "qq_proj matches no projection; there are down_proj",
    ),
    "weights of nothing": (
        "train",
        "--config {config} --init-from {hf} --run-dir {run} --data.path {data}:0,{hf}:0",
        "sum up to zero",
    ),
    "no answer": ("prepare", "{chat} --out {run} --tokenizer {hf}", "chat.jsonl:2: no assistant"),
    "an unknown role": ("prepare", "{wizard} --out {run} --tokenizer {hf}", "wizard.jsonl:1: "),
    "a hostile template": (
        "prepare",
        "{chat} --out {run} --tokenizer {hf} --chat-template {hostile}",
        "chat.jsonl:1: ",
    ),
    "an empty file": ("prepare", "{empty} --out {run} --tokenizer {hf}", "empty"),
    "nothing is a target": (
        "prepare",
        "{chat} --out {run} --tokenizer {hf} --chat-template {masked} --on-error skip",
        "no conversation in 1 files",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_message_and_nothing_is_lost(
    hf, config_file, tmp_path, monkeypatch, capsys, name
):
    """Exit code 2, no traceback, and no folder that is half a run."""
    command, options, words = WRONG[name]
    lonely = {"messages": [{"role": "user", "content": "one"}]}
    given = {
        "chat": write_lines(tmp_path / "chat.jsonl", [talk("one", "two"), lonely]),
        "empty": tmp_path / "empty.jsonl",
        "masked": tmp_path / "masked.jinja",
        "llama": shutil.copytree(hf, tmp_path / "llama"),
        "data": tmp_path / "data",
        "run": tmp_path / "run",
        "hf": hf,
        "config": config_file,
    }
    given["empty"].touch()
    wizard = {"messages": [{"role": "wizard", "content": "one"}]}
    given["wizard"] = write_lines(tmp_path / "wizard.jsonl", [wizard])
    given["hostile"] = tmp_path / "hostile.jinja"
    given["hostile"].write_text(REFUSED["template is hostile"])
    given["masked"].write_text("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    values = json.loads((hf / "config.json").read_text()) | {"model_type": "llama"}
    (given["llama"] / "config.json").write_text(json.dumps(values))
    if "{data}" in options:
        prepare(write_lines(tmp_path / "a.jsonl", [talk("one", "two")]), given["data"], hf)
    main = train.main if command == "train" else partial(_first, command)
    monkeypatch.setattr("sys.argv", [command, *options.format(**given).split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("error: ") == 1 and words in said and "Traceback" not in said
    left = [*given["run"].rglob("*")] if given["run"].exists() else []
    assert not [path for path in left if path.name in ("config.json", "checkpoints", "train")]


def _first(command, argv):
    return cli.main([command, *argv])


ROOT = Path(__file__).parent.parent
SMALL = "--train.steps 3 --train.seq-len 48 --train.batch-size 2 --optimizer.learning-rate 1e-2"
SMALL += (
    " --train.log-every 1 --train.eval-every 3 --train.eval-batches 1 --schedule.warmup-steps 0"
)


def documented_commands() -> list[list[str]]:
    """The first three commands of docs/finetuning.md."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    block = text.split("```")[1].strip().splitlines()
    assert len(block) == 3
    return [shlex.split(line.removeprefix("python ")) for line in block]


@pytest.fixture(scope="module")
def by_the_docs(hf, tmp_path_factory):
    """A folder in which the documented commands have run, word for word but for the run's size."""
    folder = tmp_path_factory.mktemp("docs")
    write_lines(folder / "chat.jsonl", [talk("one", "two"), talk("three", "four of a")])
    shutil.copytree(hf, folder / "MODEL")
    (folder / "configs").mkdir()
    shutil.copyfile(ROOT / "configs" / "finetune.py", folder / "configs" / "finetune.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in documented_commands():
            if words[0] == "train.py":
                assert train.main([*words[1:], *SMALL.split()]) == 0
            else:
                assert words[:2] == ["-m", "dsv3_jax"]
                cli.main(words[2:])
    return folder


@pytest.mark.slow
def test_the_documented_commands_lower_the_loss(by_the_docs):
    run = by_the_docs / "RUN"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["ce"] for line in lines if "ce" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert [line for line in lines if "val_loss" in line]
    template = (run / "chat_template.jinja").read_text()
    assert template == (by_the_docs / "chat" / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_the_documented_commands_tune_and_export(by_the_docs):
    before, after = (
        load_hf(by_the_docs / name, dtype="f32")[1]["params"] for name in ("MODEL", "TUNED")
    )
    assert np.abs(after["lm_head"] - before["lm_head"]).max() > 0
    assert (by_the_docs / "TUNED" / "chat_template.jinja").exists()
    assert (by_the_docs / "TUNED" / "tokenizer_config.json").exists()


@pytest.mark.oracle
def test_transformers_answers_with_the_export(by_the_docs):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
    tuned = by_the_docs / "TUNED"
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    turns = [{"role": "user", "content": "one"}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    said = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert said.shape[1] > ids.shape[1]
    _, variables = load_hf(tuned, dtype="f32")
    config = dataclasses.replace(open_weights(tuned).model, dtype="float32")
    ours = jax.jit(forward, static_argnums=2)(variables, ids.numpy().astype(np.int32), config)
    assert int(np.argmax(ours.logits[0, -1])) == int(said[0, ids.shape[1]])
