"""Checkpoints: bitwise, on any mesh, and never trusted when damaged.

Saves of tiny trees take about 0.1 s each; those that many tests look at are made once.
"""

import asyncio
import dataclasses
import gc
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.hushed_arrays import hush_other_arrays
from dsv3_jax.training.manifest import MANIFEST, begin_save, damage, steps_in, write_manifest
from dsv3_jax.training.restore import (
    latest_valid,
    read_meta,
    restore,
    state_sha256,
)
from dsv3_jax.training.saved import CheckpointError
from tests.training.saved_states import (
    ABSTRACT,
    CONFIG,
    META,
    OPTIMIZER,
    make_state,
    run_file,
    run_named,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 10, 20 and 30; step 0 was dropped by keep=3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, every_steps=10, keep=3) as checkpoints:
        for step in (0, 10, 20, 30):
            checkpoints.save(step, make_state(step), {**META, "step": step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def largest_file(step_folder: Path) -> Path:
    files = [p for p in step_folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(step_folder: Path) -> str:
    file = largest_file(step_folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "does not match its sha256"


def truncate(step_folder: Path) -> str:
    file = largest_file(step_folder)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    return f"{size // 2} bytes instead of {size}"


def delete_the_state(step_folder: Path) -> str:
    shutil.rmtree(step_folder / "state")
    return "is missing"


def empty_the_folder(step_folder: Path) -> str:
    shutil.rmtree(step_folder)
    step_folder.mkdir()
    return "the folder is empty"


def delete_the_manifest(step_folder: Path) -> str:
    (step_folder / MANIFEST).unlink()
    return f"no {MANIFEST}: the save did not finish"


def tear_the_manifest(step_folder: Path) -> str:
    os.truncate(step_folder / MANIFEST, 100)
    return f"{MANIFEST} cannot be read"


DAMAGES = [
    flip_a_bit,
    truncate,
    delete_the_state,
    empty_the_folder,
    delete_the_manifest,
    tear_the_manifest,
]


# Saving and restoring


def test_a_state_comes_back_bit_for_bit(saved):
    state, meta = restore(saved, "auto", ABSTRACT, CONFIG)
    assert state_sha256(state) == state_sha256(make_state(30))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(30))
    assert meta == {**json.loads(json.dumps(META)), "step": 30}
    assert read_meta(saved) == (30, meta)


def test_the_hash_sees_values_dtypes_and_names():
    base = {"a": jnp.zeros(3), "b": jnp.ones(2, jnp.int32)}
    others = [
        {**base, "a": jnp.zeros(3).at[1].set(-0.0)},
        {**base, "b": jnp.ones(2, jnp.uint32)},
        {**base, "a": jnp.zeros((3, 1))},
        {"a": base["a"], "c": base["b"]},
    ]
    hashes = {state_sha256(tree) for tree in [base, *others]}
    assert len(hashes) == 5
    assert state_sha256(jax.tree.map(np.asarray, base)) in hashes


def test_keeps_the_newest_steps(saved):
    assert steps_in(saved) == [10, 20, 30]
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]
    assert all(damage(saved / str(s)) is None for s in (10, 20, 30))


def test_a_part_of_a_state_can_be_restored_alone(saved):
    part = {"params": ABSTRACT["params"], "router": ABSTRACT["router"]}
    state, _ = restore(saved, 20, part, CONFIG, partial=True)
    whole = make_state(20)
    expected = {"params": whole["params"], "router": whole["router"]}
    assert state_sha256(state) == state_sha256(expected)


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"w": [jnp.zeros(1 << 18) + i for i in range(8)]})
    expected = state_sha256(state)
    abstract = jax.eval_shape(lambda: state)
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = step(state)
    restored, _ = restore(tmp_path, 1, abstract)
    assert state_sha256(restored) == expected
    assert state_sha256(state) != expected


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["embed_tokens"]) ** 2)

    @jax.jit
    def train_step(state):
        key, now = jax.random.split(state["key"])
        x = jax.random.normal(now, (4, 7))
        gradients = jax.grad(loss)(state["params"], x)
        with jax.numpy_dtype_promotion("standard"):  # optax's own Adam raises a float to an int32
            updates, opt_state = OPTIMIZER.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {**state, "params": params, "opt_state": opt_state, "key": key}

    state = make_state(0)
    with Checkpoints(tmp_path, every_steps=3, keep=1) as checkpoints:
        for step in range(1, 7):
            state = train_step(state)
            if checkpoints.due(step) and step < 6:
                checkpoints.save(step, state, {})
    with Checkpoints(tmp_path, every_steps=3, keep=1) as checkpoints:
        step, resumed, _ = checkpoints.resume("auto", ABSTRACT)
    assert step == 3
    for _ in range(3):
        resumed = train_step(resumed)
    assert state_sha256(resumed) == state_sha256(state)


def test_another_mesh_restores_the_same_bits(tmp_path):
    if len(jax.devices()) >= 8:
        reshard(tmp_path)
    else:
        run_file(__file__, "reshard", tmp_path)


def reshard(folder: Path) -> None:
    """Saves on a 2 x 4 mesh, restores on 1 x 2, on 4 x 2 with Explicit axes and on one device."""
    P, kinds = jax.sharding.PartitionSpec, jax.sharding.AxisType

    def abstract(shape, kind, specs):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("data", "local"), axis_types=(kind, kind))
        return {
            name: jax.ShapeDtypeStruct(
                (8, 16), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
            )
            for name, spec in specs.items()
        }

    both = abstract((2, 4), kinds.Auto, {"w": P("data", "local"), "b": P(None, "local")})
    state = {
        name: jax.device_put(jnp.arange(128.0).reshape(8, 16) + i, leaf.sharding)
        for i, (name, leaf) in enumerate(both.items())
    }
    with Checkpoints(folder, every_steps=1, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    targets = [
        abstract((1, 2), kinds.Auto, {"w": P("local", None), "b": P()}),
        abstract((4, 2), kinds.Explicit, {"w": P("local", "data"), "b": P("data", None)}),
        jax.eval_shape(lambda: {name: jnp.zeros((8, 16)) for name in state}),
    ]
    for target in targets:
        restored, _ = restore(folder, 1, target)
        assert state_sha256(restored) == state_sha256(state)
        for name, leaf in target.items():
            wanted = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            assert restored[name].sharding == wanted


# Damage


@pytest.mark.parametrize("break_it", DAMAGES)
def test_a_damaged_newest_step_is_named_and_passed_over(folder, caplog, break_it):
    complaint = break_it(folder / "30")
    assert complaint in damage(folder / "30")
    with caplog.at_level(logging.WARNING), Checkpoints(folder, every_steps=1, keep=3) as opened:
        step, state, meta = opened.resume("auto", ABSTRACT, CONFIG)
        assert (step, meta["step"]) == (20, 20)
        assert state_sha256(state) == state_sha256(make_state(20))
        assert f"{folder / '30'} is damaged" in caplog.text
        assert complaint in caplog.text
        # The step comes round again: what was damaged must not be in the way, nor be deleted.
        assert (folder.parent / "checkpoints.old-1" / "30").is_dir()
        opened.save(30, make_state(30), META)
    assert latest_valid(folder) == 30


def test_all_damaged_is_refused_and_nothing_is_changed(folder):
    complaints = [d(folder / s) for d, s in zip(DAMAGES, ("10", "20", "30"))]
    with Checkpoints(folder, every_steps=1, keep=3) as opened:
        with pytest.raises(CheckpointError, match="none of the 3 checkpoints") as error:
            opened.resume("auto", ABSTRACT, CONFIG)
        assert all(complaint in str(error.value) for complaint in complaints)
        assert "--resume never" in str(error.value)
        assert steps_in(folder) == [10, 20, 30]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("meta/metadata", b"[]", "no JSON object"),
        ("meta/metadata", b"[" * 100_000, "nested too deep"),
        ("meta/metadata", b'{"a":[' + b"[]," * (1 << 20) + b"[]]}", "more than 1048576 values"),
        ("meta/metadata", b'{"format": 2, "arrays": {}, "meta": {}}', "its format is 2"),
        ("meta/metadata", b'{"format": 1, "arrays": [], "meta": {}}', "arrays=.* is not an object"),
        ("meta/metadata", b'{"format": 1, "arrays": {"a": 1}, "meta": {}}', "is not a text"),
        (
            "meta/metadata",
            b'{"format": 1, "arrays": {}, "meta": {"config": [1]}}',
            "meta.config=.* is not an object",
        ),
        (
            "meta/metadata",
            b'{"format": 1, "arrays": {}, "meta": {"config": {"model": 3}}}',
            "config.model=3 is not an object",
        ),
        ("state/_METADATA", b"[" * 100_000, "nested too deep"),
        ("state/_METADATA", b"{}", "cannot be read"),
        ("state/array_metadatas/process_0", b'{"a":' + b"[]," * (1 << 20) + b"[]}", "values"),
    ],
)
def test_a_stranger_s_step_whose_manifest_fits_is_refused_in_a_line(folder, name, content, message):
    step = folder / "30"
    (step / name).write_bytes(content)
    (step / MANIFEST).unlink()
    write_manifest(step)
    assert damage(step) is None
    with pytest.raises(CheckpointError, match=message) as error:
        restore(folder, 30, ABSTRACT)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.slow
def test_reads_that_outlast_a_failed_one_show_no_traceback(folder):
    """Every array is cut in half, and the manifest fits."""
    for path in (folder / "30").glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write_manifest(folder / "30")
    shown = run_file(__file__, "read_cut", folder, check=False).stderr.strip()
    assert shown == "told, and other errors are still shown"


def read_cut(folder: Path) -> None:
    sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(folder, 30, ABSTRACT)
    time.sleep(1)
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    raise RuntimeError("told, and other errors are still shown")


@pytest.mark.parametrize("file, shown", [("/x/orbax/read.py", False), ("/x/read.py", True)])
def test_a_read_that_nobody_awaits_fails_unheard(file, shown, caplog):
    """Of several arrays that fail, orbax hears the first; asyncio logs the others, if any end."""
    hush_other_arrays()
    of_file: dict[str, Any] = {}
    exec(compile("async def read(): raise OSError('cut')", file, "exec"), of_file)

    async def await_nothing():
        reading = asyncio.ensure_future(of_file["read"]())
        await asyncio.sleep(0)
        del reading

    asyncio.run(await_nothing())
    gc.collect()
    assert ("never retrieved" in caplog.text and "OSError: cut" in caplog.text) == shown


def test_only_an_empty_folder_starts_at_zero(tmp_path):
    with Checkpoints(tmp_path / "new", every_steps=1, keep=1) as opened:
        assert opened.latest_valid() is None
        assert opened.resume("auto", ABSTRACT) is None
        with pytest.raises(UserError, match=r"no checkpoint of step 5 .* it has none"):
            opened.resume("5", ABSTRACT)


def test_a_first_save_that_was_cut_off_counts_for_nothing(folder, caplog):
    """Killed between orbax's rename and the manifest: as if the save had not begun."""
    for step in (10, 20):
        shutil.rmtree(folder / str(step))
    (folder / "30" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="30: no MANIFEST"):  # whoever lost it, not a save
        latest_valid(folder)
    begin_save(folder, 30)
    assert latest_valid(folder) is None
    with caplog.at_level(logging.WARNING), Checkpoints(folder, every_steps=1, keep=3) as opened:
        assert "left by a save that was cut off" in caplog.text
        assert opened.resume("auto", ABSTRACT) is None
        opened.save(30, make_state(30), META)
    assert [p.name for p in folder.iterdir()] == ["30"]
    assert latest_valid(folder) == 30


def test_a_step_can_be_chosen_and_newer_ones_are_set_aside(folder, caplog):
    with caplog.at_level(logging.WARNING), Checkpoints(folder, every_steps=1, keep=3) as opened:
        with pytest.raises(UserError, match=r"no checkpoint of step 15 .* it has 10, 20, 30"):
            opened.resume("15", ABSTRACT, CONFIG)
        assert opened.resume("10", ABSTRACT, CONFIG)[0] == 10
    assert "moved the checkpoints of steps 20, 30" in caplog.text
    assert steps_in(folder) == [10]
    assert steps_in(folder.parent / "checkpoints.old-1") == [20, 30]


def test_resume_never_sets_everything_aside(folder):
    (folder.parent / "checkpoints.old-1").mkdir()
    with Checkpoints(folder, every_steps=1, keep=3) as opened:
        assert opened.resume("never", ABSTRACT, CONFIG) is None
    assert steps_in(folder) == []
    assert steps_in(folder.parent / "checkpoints.old-2") == [10, 20, 30]


def test_reading_changes_nothing(folder):
    flip_a_bit(folder / "30")
    (folder / "40.orbax-checkpoint-tmp").mkdir()
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    assert read_meta(folder)[0] == 20
    restore(folder, "auto", ABSTRACT)
    for read in (read_meta, lambda *step: restore(*step, ABSTRACT)):
        with pytest.raises(CheckpointError, match=r"30 is damaged: .* does not match its sha256"):
            read(folder, 30)
    with pytest.raises(UserError, match="step 3O must be auto or a step number"):
        read_meta(folder, "3O")
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before


# Another architecture


def test_another_architecture_is_refused_with_the_differences(folder):
    model = dataclasses.replace(CONFIG.model, hidden_size=128, topk_method="greedy")
    abstract = {**ABSTRACT, "moments": jax.ShapeDtypeStruct((5,), jnp.float32)}
    abstract["extra"] = jax.ShapeDtypeStruct((3,), jnp.int32)
    del abstract["step"]
    opened = Checkpoints(folder, every_steps=1, keep=3)
    with pytest.raises(UserError, match="checkpoint of another architecture") as error:
        opened.resume("10", abstract, dataclasses.replace(CONFIG, model=model))
    for line in [
        "model.hidden_size: 64 in the checkpoint, 128 in this run",
        "model.topk_method: 'noaux_tc' in the checkpoint, 'greedy' in this run",
        "moments: bfloat16[5] in the checkpoint, float32[5] in this run",
        "extra: absent in the checkpoint, int32[3] in this run",
        "step: int32[] in the checkpoint, absent in this run",
    ]:
        assert line in str(error.value)
    assert steps_in(folder) == [10, 20, 30], "refused, so nothing is set aside"


def test_the_context_may_be_extended(saved, caplog):
    model = dataclasses.replace(CONFIG.model, max_position_embeddings=10)
    with caplog.at_level(logging.WARNING):
        restore(saved, 30, ABSTRACT, dataclasses.replace(CONFIG, model=model))
    assert "model.max_position_embeddings was 163840" in caplog.text


if __name__ == "__main__":
    run_named({"reshard": reshard, "read_cut": read_cut})
