"""What --dry-run reports, without running anything."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.deepseek_v3 import get_config
from dsv3_jax.config import ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.picture import draw, ranges
from dsv3_jax.parallel.sharding import Layout, make_layout
from dsv3_jax.training import dry_run
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.dry_run import device_bytes, dry_run_report, fit_line, parameter_counts
from dsv3_jax.training.schedule import START, Schedule
from dsv3_jax.training.state import abstract_state
from tests.helpers import random_state, random_variables, tiny_config, tiny_model

# The report compiles a step: a dense layer would be a third of it.
MODEL = tiny_model(num_hidden_layers=1, first_k_dense_replace=0)


@pytest.fixture(scope="module")
def one_device():
    return Layout(make_mesh(ParallelConfig()))


def test_the_paper_s_run_is_counted_without_allocating_it(one_device):
    state = abstract_state(get_config(), one_device)
    assert parameter_counts(state) == (671_026_419_200, 11_610_068_224)
    # "the moments in BF16" of section 3.3.3, both of them: 4 bytes a parameter.
    moments = jax.tree.leaves(state.opt_state[1].mu) + jax.tree.leaves(state.opt_state[1].nu)
    assert {leaf.dtype.name for leaf in moments} == {"bfloat16"}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_the_report_names_every_parameter_and_adds_up(one_device):
    config = tiny_config(MODEL, batch_size=4, micro_batch_size=2, steps=7)
    half = dataclasses.replace(config.optimizer, moment_dtype="bfloat16")
    report = dry_run_report(dataclasses.replace(config, optimizer=half), one_device)
    variables = random_variables(MODEL)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert any(
            line.split()[:1] == [name] and str(list(leaf.shape)) in line
            for line in report.splitlines()
        ), name
    total = sum(leaf.size for leaf in jax.tree.leaves(variables))
    trained = sum(leaf.size for _, leaf in leaves)
    main = next(line for line in report.splitlines() if "in the main model" in line)
    assert sum(int(word.replace(",", "")) for word in main.split() if word[0].isdigit()) == total

    def gib(label):
        line = next(line for line in report.splitlines() if label in line)
        return float(line.split()[-1])

    assert gib("master weights, f32") == pytest.approx(4 * total / 2**30, abs=6e-4)
    assert gib("moments, bfloat16") == pytest.approx(4 * trained / 2**30, abs=6e-4)
    assert math.isfinite(gib("peak of one training step"))
    assert "reads 4 rows of 9 tokens in 2 micro-batches" in report
    assert "252 tokens in 7 steps" in report  # 7 x 4 x 9
    assert "\n  fits: " in report


@pytest.mark.slow
def test_on_a_mesh_the_report_says_what_a_device_holds():
    model = tiny_model(num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    sizes = ParallelConfig(data=2, local=2, tensor=2)
    config = dataclasses.replace(tiny_config(model, seq_len=8), mesh=sizes)
    mesh = make_mesh(sizes)
    layout = make_layout(mesh, config.sharding, config.expert_parallel)
    report = dry_run_report(config, layout)
    whole = dry_run_report(
        dataclasses.replace(config, mesh=ParallelConfig()), Layout(make_mesh(ParallelConfig()))
    )

    def gib(text, label):
        return float(next(line for line in text.splitlines() if label in line).split()[-1])

    # 8 devices, and norms of odd length stay whole.
    for label in ("master weights", "moments"):
        assert gib(report, label) <= 0.14 * gib(whole, label) + 1e-3
    assert "[40, 24]                 [5, 24] on a device" in report
    picture = report[report.index("lm_head [40, 24], used") :].splitlines()
    assert [line.strip() for line in picture[1:6]] == [
        "+---------+",
        "| 0,2,4,6 |",
        "+---------+",
        "| 1,3,5,7 |",
        "+---------+",
    ]
    assert "tokens between blocks, 4 rows x 8 positions" in report


def test_a_picture_leaves_out_what_is_too_much():
    mesh = make_mesh(ParallelConfig(data=8))
    lines = draw(NamedSharding(mesh, PartitionSpec(None, "data")), (3, 16), max_cells=4)
    assert lines == [
        "+---+---+---+---+",
        "| 0 | 1 | 2 | 3 | ...",
        "+---+---+---+---+",
    ]
    assert ranges([0, 1, 2, 3, 8]) == "0-3,8"


def test_the_report_says_whether_a_step_fits(one_device):
    assert fit_line(254022 * 2**30, 139 * 2**30) == "does not fit: 254,022 GiB of 139 a device"
    assert fit_line(2**29, 2**30) == "fits: 0.5 GiB of 1 a device"
    assert "not known" in fit_line(1, None)
    all_devices = device_bytes(one_device) * len(jax.local_devices())
    assert 2**30 < all_devices < 2**50, "the host's memory"


def test_the_report_says_what_the_run_s_folder_makes_of_it(one_device, tmp_path, monkeypatch):
    """A dry run of another seed said that all was well, and the run was then refused.

    The memory of its step is another test's: here one program stands for all.
    """
    config = tiny_config(MODEL, steps=4)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    state = random_state(config)
    compiled = jax.jit(lambda: 0).lower().compile()
    lowered = SimpleNamespace(compile=lambda: compiled)
    monkeypatch.setattr(dry_run, "lowered_step", lambda *args: lowered)

    def told(**changes):
        changed = dataclasses.replace(config, **changes)
        (line,) = re.findall(r"^run: (.*)$", dry_run_report(changed, one_device), re.MULTILINE)
        return line

    assert told() == f"a new one, in {tmp_path}/run"
    with Checkpoints(tmp_path / "run/checkpoints", every_steps=1, keep=2) as checkpoints:
        meta = {"config": dataclasses.asdict(config), "data_sha256": "d", "tokenizer_sha256": "t"}
        meta |= {"position": Schedule(config).position(2)._asdict(), "plan": START._asdict()}
        meta["learning_rate"] = float(Schedule(config).settings(1).learning_rate)
        checkpoints.save(2, state._asdict(), meta)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert told().startswith(f"it would go on from {tmp_path}/run/checkpoints/2")
    assert told(seed=config.seed + 1).endswith("checkpoints/2 is of another run:")
    assert "is of another run" in told(model=dataclasses.replace(MODEL, num_hidden_layers=3))
    longer = dataclasses.replace(config.optimizer, learning_rate=1.0)
    assert "the learning rate would jump" in told(optimizer=longer)
    assert told(train=dataclasses.replace(config.train, steps=2)).startswith("nothing to do: ")
    assert told(resume="never").startswith("a new one")
    assert "no checkpoint" in told(resume="7")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
