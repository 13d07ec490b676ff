"""Wrong checkpoints, names that lead elsewhere, full disks, kills: one message, nothing left."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.interop import importing, safetensors, stream
from dsv3_jax.interop.checkpoint import from_variables, open_checkpoint, open_hf
from dsv3_jax.interop.digests import verify_imported
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.importing import import_hf
from dsv3_jax.interop.load import load_hf
from dsv3_jax.interop.safetensors import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
INDEX = "model.safetensors.index.json"
Q_A = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def wrong(tensors, **changes):
    """The tensors with some replaced, added, or (None) removed."""
    made = tensors | changes
    return {name: tensor for name, tensor in made.items() if tensor is not None}


WRONG_TENSORS = {
    "missing expert": ({EXPERT: None, EXPERT + "_scale_inv": None}, f"{EXPERT} is missing"),
    "missing norm": ({"model.norm.weight": None}, "model.norm.weight is missing"),
    "missing bias": (
        {"model.layers.1.mlp.gate.e_score_correction_bias": None},
        "e_score_correction_bias is missing",
    ),
    "half an MTP layer": (
        {"model.layers.3.enorm.weight": None},
        "layers.3.enorm.weight is missing",
    ),
    "extra tensor": (
        {"model.layers.1.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)},
        "q_proj.weight is not part",
    ),
    "extra layer": (
        {"model.layers.9.input_layernorm.weight": np.zeros(160, np.float32)},
        "layers.9.input_layernorm.weight is not part",
    ),
    "path as a name": ({"../../evil": np.zeros(1, np.float32)}, "../../evil is not part"),
    "wrong shape": (
        {"lm_head.weight": np.zeros((66, 160), np.float32)},
        "lm_head.weight has shape",
    ),
    "transposed": ({Q_A: np.zeros((160, 48), np.float32)}, f"{Q_A} has shape"),
    "wrong dtype": ({Q_A: np.zeros((48, 160), np.int8)}, f"{Q_A} is I8"),
    "half precision": ({Q_A: np.zeros((48, 160), np.float16)}, f"{Q_A} is F16"),
    "float8 norm": (
        {"model.norm.weight": np.zeros(160, ml_dtypes.float8_e4m3fn)},
        "model.norm.weight is F8_E4M3",
    ),
    "weight without scales": ({Q_A + "_scale_inv": None}, f"{Q_A}_scale_inv is missing"),
    "scales without weight": ({EXPERT: None}, f"{EXPERT}_scale_inv has no weight"),
    "scales of a plain weight": (
        {Q_A: np.zeros((48, 160), np.float32)},
        f"{Q_A}_scale_inv scales {Q_A}, which is F32",
    ),
    "wrong scale shape": ({Q_A + "_scale_inv": np.ones((1, 1), np.float32)}, "scale_inv is F32"),
    "wrong scale dtype": (
        {Q_A + "_scale_inv": np.ones((1, 2), np.int32)},
        "scale_inv is I32",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(make_hf, tmp_path, case):
    folder, _, tensors = make_hf("fp8", shards=1)
    changes, message = WRONG_TENSORS[case]
    save_file(wrong(tensors, **changes), folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        import_hf(folder, tmp_path / "ours")
    assert str(folder) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_many_problems_are_counted_and_the_first_are_shown(make_hf):
    folder, _, tensors = make_hf("bf16", shards=1)
    save_file(
        {n: t for n, t in tensors.items() if "experts" not in n}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match="and 55 more") as error:
        open_hf(folder)
    assert len(str(error.value).splitlines()) == 10


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
LYING_INDEX = {
    "parent folder": (
        lambda i: i["weight_map"].update({Q_A: "../evil.safetensors"}),
        "no file name",
    ),
    "absolute path": (lambda i: i["weight_map"].update({Q_A: "/evil.safetensors"}), "no file name"),
    "backslash": (lambda i: i["weight_map"].update({Q_A: "..\\e.safetensors"}), "no file name"),
    "hidden file": (lambda i: i["weight_map"].update({Q_A: ".e.safetensors"}), "no file name"),
    "pickle": (lambda i: i["weight_map"].update({Q_A: "pytorch_model.bin"}), "no file name"),
    "not a string": (lambda i: i["weight_map"].update({Q_A: 3}), "no file name"),
    "absent file": (lambda i: i["weight_map"].update({Q_A: "x.safetensors"}), "no such file"),
    "absent tensor": (lambda i: i["weight_map"].update({"model.x": FIRST}), "model.x is not in"),
    "unlisted tensor": (lambda i: i["weight_map"].pop(Q_A), f"{Q_A} is in .* does not list"),
    "wrong file": (
        lambda i: i["weight_map"].update({Q_A: FIRST if i["weight_map"][Q_A] != FIRST else SECOND}),
        f"{Q_A} is in .*, which the index puts in",
    ),
    "no map": (lambda i: i.pop("weight_map"), "has no weight_map"),
}


@pytest.mark.parametrize("case", LYING_INDEX)
def test_lying_index_is_refused(make_hf, case):
    folder, _, _ = make_hf("bf16")
    change, message = LYING_INDEX[case]
    edit_index(folder, change)
    with pytest.raises(UserError, match=message):
        open_hf(folder)


def test_tensor_in_two_files_is_refused(make_hf):
    folder, _, tensors = make_hf("bf16")
    first = load_file(folder / FIRST)
    name = next(n for n in tensors if n not in first)
    save_file(first | {name: tensors[name]}, folder / FIRST)
    with pytest.raises(UserError, match=f"{name} is in {FIRST}, which the index puts in"):
        open_hf(folder)


def test_name_listed_twice_is_refused(make_hf):
    folder, _, _ = make_hf("bf16")
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(UserError, match="'a' appears twice"):
        open_hf(folder)


def test_index_beside_a_single_file_is_refused(make_hf):
    folder, _, tensors = make_hf("bf16")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="has both"):
        open_hf(folder)


def test_links_out_of_the_folder_are_not_followed(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    shutil.move(folder / FIRST, tmp_path / "elsewhere")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside its folder"):
        open_hf(folder)


def test_links_of_the_hub_cache_are_followed(make_hf, tmp_path):
    folder, config, _ = make_hf("bf16")
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_hf(snapshot)[0].hidden_size == config.hidden_size
    assert (import_hf(snapshot, tmp_path / "ours") / "tokenizer.json").is_file()


def test_linked_tokenizer_from_elsewhere_is_not_carried_along(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside its folder"):
        import_hf(folder, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "secret"]


def test_truncated_file_is_named(make_hf):
    folder, _, _ = make_hf("bf16")
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    with pytest.raises(UserError, match=f"{SECOND}: has .* it is cut off"):
        open_hf(folder)


def test_config_of_another_size_is_refused_before_anything_is_made(make_hf, tmp_path, monkeypatch):
    folder, _, _ = make_hf("bf16")
    values = json.loads((folder / "config.json").read_text())
    for field, value in (
        ("hidden_size", 10**12),
        ("n_routed_experts", 4096 * 3),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 4),
        ("hidden_size", 161),
    ):
        (folder / "config.json").write_text(json.dumps(values | {field: value}))
        monkeypatch.setattr(safetensors.StoredTensor, "read", None)  # nothing may be read
        with pytest.raises(UserError):
            load_hf(folder)
    # Within every bound on its own, but 12 million tensors together.
    huge = {"n_routed_experts": 4095, "num_hidden_layers": 1000}
    (folder / "config.json").write_text(json.dumps(values | huge))
    with pytest.raises(UserError, match="12299021 tensors, over"):
        load_hf(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_broken_config_is_refused(make_hf, text):
    folder, _, _ = make_hf("bf16")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        open_hf(folder)


def test_oversized_config_is_refused_unread(make_hf):
    folder, _, _ = make_hf("bf16")
    (folder / "config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(UserError, match="exceed"):
        open_hf(folder)


def test_folders_without_a_checkpoint_are_refused(make_hf, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path / "empty")
    folder, _, _ = make_hf("bf16", shards=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        open_checkpoint(folder)


def test_mtp_copies_that_differ_are_refused_rather_than_lost(make_hf, tmp_path):
    folder, _, tensors = make_hf("bf16", shards=1)
    name = "model.layers.3.shared_head.head.weight"
    save_file(tensors | {name: tensors[name] * 2}, folder / "model.safetensors")
    for call in (lambda: load_hf(folder), lambda: import_hf(folder, tmp_path / "ours")):
        with pytest.raises(UserError, match=f"{name} differs"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_existing_destination_is_left_alone_unless_asked(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/precious").write_text("x")
    for write in (import_hf, lambda s, d, **k: export_hf(open_hf(s), d, **k)):
        with pytest.raises(UserError, match="exists"):
            write(folder, tmp_path / "ours")
        assert (tmp_path / "ours/precious").read_text() == "x"
    import_hf(folder, tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours/precious").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_too_small_a_disk_is_refused_at_the_start(make_hf, tmp_path, monkeypatch):
    folder, _, _ = make_hf("bf16")
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    for write in (import_hf, lambda s, d: export_hf(open_hf(s), d)):
        with pytest.raises(OSError, match="GB are needed") as error:
            write(folder, tmp_path / "ours")
        assert error.value.errno == errno.ENOSPC
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_disk_that_fills_up_leaves_nothing_behind(make_hf, tmp_path, monkeypatch):
    folder, _, _ = make_hf("bf16")
    calls = []
    write = safetensors.Writer.write

    def full(self, *args, **kwargs):
        calls.append(args[0])
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, *args, **kwargs)

    monkeypatch.setattr(safetensors.Writer, "write", full)
    for attempt in (import_hf, lambda s, d: export_hf(open_hf(s), d)):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            attempt(folder, tmp_path / "ours")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


KILLED = """
import os, signal, sys
from dsv3_jax.interop import importing
copy_one, seen = importing._copy_one, []
def copy(*args):
    seen.append(args[1])
    if len(seen) > 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy_one(*args)
importing._copy_one = copy
importing.import_hf(sys.argv[1], sys.argv[2])
"""


def test_killed_import_looks_unfinished_and_continues_from_what_is_good(
    make_hf, tmp_path, monkeypatch
):
    folder, _, tensors = make_hf("fp8")
    dst = tmp_path / "ours"
    command = [sys.executable, "-c", KILLED, str(folder), str(dst)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not dst.exists()
    partial = tmp_path / ".ours.partial"
    with pytest.raises(UserError):
        open_checkpoint(partial)
    done = [json.loads(x) for x in (partial / importing.PROGRESS).read_text().splitlines()[1:]]
    assert 30 < len(done) <= 40
    # One of those it finished is damaged meanwhile: it must be copied again.
    damaged = next(iter(done[0]))
    place = open_hf(folder).places[damaged]
    file = partial / f"weights/{'.'.join(place.path)}.safetensors"
    file.write_bytes(
        file.read_bytes()[:-50_000] + bytes(50_000) if file.stat().st_size > 60_000 else b""
    )

    copied = []
    copy_one = importing._copy_one
    monkeypatch.setattr(
        importing, "_copy_one", lambda *args: copied.append(args[1]) or copy_one(*args)
    )
    import_hf(folder, dst)
    weights = [n for n in tensors if not n.endswith("_scale_inv") and "layers.3.embed" not in n]
    assert len(copied) < len(weights) - 20
    assert verify_imported(dst) == [] and not partial.exists()
    out = export_hf(open_checkpoint(dst), tmp_path / "out")
    found = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    assert {n: t.tobytes() for n, t in found.items()} == {
        n: t.tobytes() for n, t in tensors.items()
    }


def test_import_of_another_source_starts_clean(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    other, _, _ = make_hf("f32", name="other")
    partial = tmp_path / ".ours.partial"
    shutil.copytree(import_hf(other, tmp_path / "ours"), partial)
    shutil.rmtree(tmp_path / "ours")
    (partial / importing.PROGRESS).write_text('{"source": "another"}\n{"lm_head.weight": "00"}\n')
    import_hf(folder, tmp_path / "ours")
    assert verify_imported(tmp_path / "ours") == []


def test_two_imports_into_one_folder_do_not_mix(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    with stream.finished_folder(tmp_path / "ours", 0, overwrite=False, resume=True):
        with pytest.raises(UserError, match="another process is writing"):
            import_hf(folder, tmp_path / "ours")
        (tmp_path / ".ours.partial/x").write_text("")
    assert (tmp_path / "ours/x").exists()


def test_flipped_bit_in_an_import_is_found_by_name(make_hf, tmp_path):
    folder, _, _ = make_hf("bf16")
    ours = import_hf(folder, tmp_path / "ours")
    file = ours / "weights/params.lm_head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert verify_imported(ours) == ["lm_head.weight"]
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"params\.lm_head\.safetensors"):
        open_checkpoint(ours)


def test_variables_that_do_not_fit_the_config_are_refused(make_hf):
    folder, _, _ = make_hf("bf16")
    config, variables = load_hf(folder)
    norm = variables["params"].pop("norm")
    with pytest.raises(ValueError, match="params/norm"):
        from_variables(variables, config)
    variables["params"]["norm"] = norm[:-1]
    with pytest.raises(ValueError, match=r"params/norm has shape \(159,\)"):
        from_variables(variables, config)
