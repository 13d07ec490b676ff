"""Runs that begin with weights: what comes along, what is refused, what comes out again."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest

import train
from dsv3_jax import cli, frozen, loading, saving, starting
from dsv3_jax.config import UserError, load_config
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.safetensors import load_file
from dsv3_jax.training import saved, step
from dsv3_jax.training.restore import read_meta, restore, state_sha256
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf
from tests.helpers import write_small_run

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps=2, batch_size=4, seq_len=24, log_every=1, eval_every=2,
                          eval_batches=1, sample_tokens=0),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
    )
"""
MODEL = dataclasses.replace(
    TINY, vocab_size=272, bos_token_id=0, eos_token_id=1, max_position_embeddings=64
)


@pytest.fixture(scope="module", autouse=True)
def cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("config"), CONFIG)


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    """make_folder(dtype, **fields) -> a published folder with a tokenizer and a chat template."""

    def make(dtype: str, **fields):
        config = dataclasses.replace(MODEL, **fields)
        place = tmp_path_factory.mktemp("hf") / dtype
        folder = write_hf(place, config, hf_tensors(config, dtype), shards=2)
        train_tokenizer(["some words of text"], 261, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return make


@pytest.fixture(scope="module")
def bf16_folder(make_folder):
    return make_folder("bf16")


def begin(config_file, run, folder, *more) -> int:
    return train.main(
        ["--config", str(config_file), "--run-dir", str(run), "--init-from", str(folder)]
        + [*map(str, more)]
    )


def tensors_of(folder):
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["bf16", "f32", "fp8"])
def test_no_steps_then_export_gives_every_byte_back(make_folder, config_file, tmp_path, dtype):
    folder = make_folder(dtype)
    run, out = tmp_path / "run", tmp_path / "out"
    assert begin(config_file, run, folder, "--train.steps", 0) == 0
    cli.main(["export-hf", str(run), str(out), "--dtype", dtype])
    want, got = tensors_of(folder), tensors_of(out)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].tobytes() == tensor.tobytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, folder))
    assert ours == theirs


def test_a_trained_block_gets_a_new_scale_and_the_others_keep_theirs(make_folder, tmp_path):
    from dsv3_jax.interop.published_scales import as_published
    from dsv3_jax.interop.stream import dequantize_rows, quantize_rows

    rng = np.random.default_rng(0)
    made = quantize_rows(rng.normal(size=(300, 200)).astype(np.float32), "f32")
    values, scales = np.asarray(made.values), np.asarray(made.scales) * np.float32(1.37)
    rows = dequantize_rows(values, scales, "F32")
    rows[140, 150] *= 3
    again = quantize_rows(rows, "f32")
    found = as_published(rows, np.asarray(again.values), np.asarray(again.scales), scales, 128)
    assert (found[1] != scales).tolist() == [[False, False], [False, True], [False, False]]
    same = np.ones((300, 200), bool)
    same[128:256, 128:] = False
    assert (found[0].view(np.uint8) == values.view(np.uint8))[same].all()
    assert np.abs(dequantize_rows(*found, "F32") - rows).max() < 0.07 * np.abs(rows).max()


AVERAGED = ("--optimizer.average-decay", 0.5)


@pytest.fixture(scope="module")
def straight_run(config_file, bf16_folder, tmp_path_factory):
    """Two steps, with a moving average."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert begin(config_file, run, bf16_folder, *AVERAGED) == 0
    return run


@pytest.mark.slow
def test_weights_are_opened_and_hashed_once(config_file, straight_run, tmp_path, monkeypatch):
    """By the options, the record of where the run begins, and the load; the last of two counts."""
    opened, hashed = [], []
    was_open, was_damage = starting.open_weights, saved.damage
    monkeypatch.setattr(starting, "open_weights", lambda f: [opened.append(f), was_open(f)][1])
    monkeypatch.setattr(saved, "damage", lambda f: [hashed.append(f), was_damage(f)][1])
    more = ("--init-from", straight_run, "--train.steps", 0)
    assert begin(config_file, tmp_path / "run", tmp_path / "none", *more) == 0
    assert opened == [str(straight_run)]
    assert hashed == [straight_run / "checkpoints" / "2"]


LORA = ("--lora.rank", 2, "--lora.base", "fp8", "--lora.targets", "q_b_proj")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [pytest.param((), id="all weights"), pytest.param(LORA, id="adapters")]
)
def test_a_step_is_compiled_once_and_before_weights_are_read(
    config_file, bf16_folder, tmp_path, monkeypatch, more
):
    done = []

    def watch(module, name, what):
        was = getattr(module, name)
        seen = functools.wraps(was)(lambda *a, **kw: [done.append(what), was(*a, **kw)][1])
        monkeypatch.setattr(module, name, seen)

    watch(step, "train_step", "step")
    watch(starting, "load_checkpoint", "weights")
    watch(frozen, "load_checkpoint", "weights")
    assert begin(config_file, tmp_path, bf16_folder, *more) == 0
    assert done == ["step", "weights"]
    done.clear()
    assert begin(config_file, tmp_path, bf16_folder, *more, "--train.steps", 3) == 0
    assert done == ["step", *["weights"] * bool(more)]
    done.clear()
    assert begin(config_file, tmp_path / "none", bf16_folder, *more, "--train.steps", 0) == 0
    assert done == ["weights"]


@pytest.mark.slow
def test_weights_that_cannot_be_loaded_are_told_before_a_step_is_compiled(
    config_file, bf16_folder, straight_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "compiled_step", lambda *_: pytest.fail("compiled"))
    tensors = hf_tensors(MODEL, "bf16")
    copy = next(n for n in tensors if n.endswith(".embed_tokens.weight") and "layers" in n)
    tensors[copy] = tensors[copy] + tensors[copy].dtype.type(1)
    other = write_hf(tmp_path / "other", MODEL, tensors)
    shutil.copyfile(bf16_folder / "tokenizer.json", other / "tokenizer.json")
    damaged = tmp_path / "damaged"
    shutil.copytree(straight_run, damaged)
    (damaged / "checkpoints" / "2" / "state" / "_METADATA").write_text("{}")
    for folder, error, words in [
        (other, UserError, f"{copy} differs from the main model's"),
        (damaged, saved.CheckpointError, "damaged"),
    ]:
        for more in ((), LORA):
            with pytest.raises(error, match=words):
                begin(config_file, tmp_path / "run", folder, *more)
            assert not (tmp_path / "run" / "config.json").exists()


def test_what_lies_beside_a_tokenizer_goes_with_it_and_with_no_other(
    config_file, bf16_folder, tmp_path
):
    plain = tmp_path / "plain"
    shutil.copytree(bf16_folder, plain)
    (plain / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert loading.find_tokenizer(plain).prompt_prefix == ()
    saving.save(loading.load(plain), tmp_path / "saved")
    assert loading.find_tokenizer(tmp_path / "saved").prompt_prefix == ()
    with pytest.raises(UserError, match="'nowhere': no such file"):
        saving.save(loading.load(plain), tmp_path / "x", tokenizer="nowhere")
    other, run = tmp_path / "other.json", tmp_path / "run"
    train_tokenizer(["other words of words"], 265, other)
    assert begin(config_file, run, plain, "--data.tokenizer", other, "--train.steps", 0) == 0
    assert loading.find_tokenizer(run).prompt_prefix == (0,)
    assert (run / "chat_template.jinja").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "read",
    [
        loading.load,
        lambda run: loading.open_run(run, "2").read(),
        lambda run: loading.open_run(run, "auto").read_average(),
    ],
)
def test_a_step_is_hashed_once_and_read_once(straight_run, monkeypatch, read):
    hashed, restored = [], []
    was_damage, was_restore = saved.damage, orbax.Checkpointer.restore
    monkeypatch.setattr(saved, "damage", lambda f: [hashed.append(f), was_damage(f)][1])
    monkeypatch.setattr(
        *(orbax.Checkpointer, "restore"),
        lambda *given, **more: [restored.append(given), was_restore(*given, **more)][1],
    )
    read(straight_run)
    assert len(hashed) == len(restored) == 1


def state_of(run, step):
    abstract = starting.open_weights(run)
    config = load_config_of(run)
    assert abstract.model == config.model
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.parallel.sharding import make_layout
    from dsv3_jax.training.state import abstract_state

    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    wanted = abstract_state(config, layout)._asdict()
    return restore(run / "checkpoints", step, wanted)[0]


def load_config_of(run):
    from dsv3_jax.config import config_from_dict

    return config_from_dict(json.loads((run / "config.json").read_text()))


@pytest.mark.slow
def test_resumed_is_bitwise_what_ran_through(config_file, bf16_folder, straight_run, tmp_path):
    run = tmp_path / "run"
    for steps in (0, 2):
        assert begin(config_file, run, bf16_folder, *AVERAGED, "--train.steps", steps) == 0
    assert state_sha256(state_of(run, 2)) == state_sha256(state_of(straight_run, 2))
    assert int(read_meta(run / "checkpoints")[0]) == 2


@pytest.mark.slow
def test_a_run_begins_with_another_run_s_weights(config_file, straight_run, tmp_path):
    run = tmp_path / "run"
    assert begin(config_file, run, straight_run, "--train.steps", 0) == 0
    ours, theirs = state_of(run, 0), state_of(straight_run, 2)
    for kind in ("params", "router"):
        assert state_sha256(ours[kind]) == state_sha256(theirs[kind])
    assert int(ours["opt_state"][1].count) == 0
    assert not any(np.any(m) for m in jax.tree.leaves(ours["opt_state"][1].mu))
    assert (run / "chat_template.jinja").exists()


def test_masters_lie_as_the_run_holds_its_state(config_file, bf16_folder, tmp_path):
    """On a mesh, in slices: the same numbers, and each device has its part."""
    argv = ["--config", str(config_file), "--init-from", str(bf16_folder)]
    argv += ["--run-dir", str(tmp_path), "--mesh.data", "2", "--mesh.local", "2"]
    config, weights = cli.parse_run(argv, default_config=config_file, description="")
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.parallel.sharding import make_layout
    from dsv3_jax.training.state import abstract_state

    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    abstract = abstract_state(config, layout)
    state = starting.open_origin(config, weights, None).create_state(abstract)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    head = tensors_of(bf16_folder)["lm_head.weight"]
    np.testing.assert_array_equal(np.asarray(state.params["lm_head"]), head.astype(np.float32))
    assert state.params["lm_head"].addressable_shards[0].data.size < head.size


@pytest.mark.parametrize(
    "has, wants", [(0, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 1), (1, 2)))]
)
def test_mtp_modules_are_made_used_or_left_out(
    make_folder, config_file, tmp_path, caplog, has, wants
):
    folder, run = make_folder("bf16", num_nextn_predict_layers=has), tmp_path / "run"
    more = ("--train.steps", 0, "--model.num-nextn-predict-layers", wants)
    with caplog.at_level("INFO"):
        assert begin(config_file, run, folder, *more) == 0
    state = state_of(run, 0)
    assert {n for n in state["params"] if n[:4] == "mtp_"} == {f"mtp_{k}" for k in range(wants)}
    said = "made anew" if wants > has else "left out"
    assert sum(said in line and "MTP" in line for line in caplog.messages) == 1
    for depth in range(min(has, wants)):
        layer = MODEL.num_hidden_layers + depth
        there = tensors_of(folder)[f"model.layers.{layer}.eh_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(
            state["params"][f"mtp_{depth}"]["eh_proj"].reshape(there.shape), there
        )
    fresh = state["params"][f"mtp_{wants - 1}"]
    assert np.std(fresh["eh_proj"]) > 0


def refused(config_file, run, folder, *more) -> str:
    with pytest.raises(UserError) as error:
        begin(config_file, run, folder, *more)
    assert not run.exists() or not (run / "checkpoints").exists()
    return str(error.value)


def test_what_contradicts_the_folder_is_named(config_file, bf16_folder, tmp_path):
    more = ("--model.hidden-size", 64, "--model.n-group", 1)
    said = refused(config_file, tmp_path / "run", bf16_folder, *more)
    assert "model.hidden_size=64 contradicts" in said and "model.n_group=1 contradicts" in said
    assert str(MODEL.hidden_size) in said


def test_folders_that_are_none_or_of_another_architecture(config_file, bf16_folder, tmp_path):
    said = refused(config_file, tmp_path / "run", tmp_path / "nowhere")
    assert "--init-from" in said and "no such folder" in said
    (tmp_path / "empty").mkdir()
    assert "neither" in refused(config_file, tmp_path / "run", tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((bf16_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    (other / "model.safetensors").write_bytes(b"")
    assert "model_type='llama'" in refused(config_file, tmp_path / "run", other)


@pytest.mark.slow
def test_a_run_goes_on_only_from_the_weights_it_began_with(
    config_file, bf16_folder, straight_run, tmp_path
):
    run = tmp_path / "run"
    assert begin(config_file, run, bf16_folder, "--train.steps", 0) == 0
    moved = tmp_path / "moved"
    shutil.copytree(bf16_folder, moved)
    began = load_config_of(run)
    weights = starting.open_weights(moved)
    starting.open_origin(dataclasses.replace(began, init_from=str(moved)), weights, 0)
    other = tmp_path / "other"
    shutil.copytree(bf16_folder, other)
    name = sorted(other.glob("*.safetensors"))[0]
    raw = bytearray(name.read_bytes())
    raw[-1] ^= 1
    name.write_bytes(raw)
    with pytest.raises(UserError, match="other weights"):
        begin(config_file, run, other, "--train.steps", 2)
    elsewhere = dataclasses.replace(began, run_dir=str(straight_run), init_from=str(moved))
    (straight_run / "origin.json").rename(straight_run / "was.json")
    with pytest.raises(UserError, match="without --init-from"):
        starting.open_origin(elsewhere, weights, 2)
    (straight_run / "was.json").rename(straight_run / "origin.json")


def test_a_config_that_names_its_weights_says_the_model(bf16_folder, tmp_path):
    """As configs of another context length do: what else differs is a contradiction."""
    path = tmp_path / "long.py"
    path.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "from dsv3_jax.config import Config, RopeScaling\n"
        "from dsv3_jax.starting import open_weights\n"
        f"folder = {str(bf16_folder)!r}\n"
        "scaling = RopeScaling(factor=8.0, original_max_position_embeddings=64)\n"
        "def get_config():\n"
        "    model = replace(open_weights(folder).model, rope_scaling=scaling,\n"
        "                    max_position_embeddings=512)\n"
        "    return Config(model=model, init_from=folder)\n"
    )
    config = cli.parse_config(["--config", str(path)], default_config=path, description="")
    assert config.model.max_position_embeddings == 512
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 8
    assert load_config(path).model == config.model
    with pytest.raises(UserError, match="q_lora_rank"):
        argv = ["--config", str(path), "--model.q-lora-rank", "4"]
        cli.parse_config(argv, default_config=path, description="")


@pytest.mark.slow
def test_a_moving_average_is_kept_and_exported(config_file, bf16_folder, tmp_path):
    """With a decay of 0.5, after one step: the mean of the first weights and the last."""
    run = tmp_path / "run"
    assert begin(config_file, run, bf16_folder, *AVERAGED, "--train.steps", 1) == 0
    for name, options in (("last", []), ("average", ["--ema"])):
        cli.main(["export-hf", str(run), str(tmp_path / name), *options])
    first, last, average = (
        tensors_of(f) for f in (bf16_folder, tmp_path / "last", tmp_path / "average")
    )
    for name in ("lm_head.weight", "model.layers.1.mlp.experts.0.up_proj.weight"):
        mean = (first[name].astype(np.float32) + last[name]) / 2
        np.testing.assert_allclose(average[name], mean, atol=1e-6)
    assert (average["lm_head.weight"] != last["lm_head.weight"]).any()
    for option in (["--ema"], ["--merge"], ["--step", "3"]):
        with pytest.raises(UserError, match=f"{' '.join(option)}: .* is no run"):
            cli.main(["export-hf", str(bf16_folder), str(tmp_path / "x"), *option])
    plain = tmp_path / "plain"
    assert begin(config_file, plain, bf16_folder, "--train.steps", 0) == 0
    with pytest.raises(UserError, match=r"--merge: .* is no LoRA run"):
        cli.main(["export-hf", str(plain), str(tmp_path / "x"), "--merge"])
    with pytest.raises(UserError, match=r"without optimizer\.average_decay"):
        cli.main(["export-hf", str(plain), str(tmp_path / "x"), "--ema"])
