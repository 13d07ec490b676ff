"""Files as strangers may make them, at random: each is read, or refused in a line.

    python -m tests.fuzzing headers 1000000 --seed 3

A target makes a good file, spoils it, and opens it as the package does. Nothing but the errors that
a command line shows as one message may come of it, within 5 s, in 300 MB, and without a byte
written anywhere else. test_fuzzing.py runs some of each; the full counts are run by hand.
"""

import argparse
import contextlib
import gzip
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.config import DataConfig, RunError, UserError

SECONDS, MEGABYTES = 5, 300
ALLOWED = (UserError, RunError, OSError)
NUMBERS = [-1, 0, 1, 2, 3, 127, 1 << 15, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**39]
NUMBERS += [-(1 << 63), 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    "x",
    "../../outside/secret",
    "/etc/passwd",
    "a/../../outside/secret",
    "a\0b",
    "\x1b[2J",
]
TEXTS += ["\ud800", "x" * 5000, "é\n", "F32", "F8_E8M0", "yarn", "uint32", "__metadata__", "1"]
RAW = [b"1e999", b"-", b"NaN", b"[" * 300, b"{" * 70, b'"', b"\\", b"\xff", b",", b":", b"\0", b"}"]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that may stand where another value stood."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 8 or depth > 3:
        return rng.choice([None, True, False, [], {}, [[]], [0] * 1000])
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def spoilt(rng: random.Random, good: Any) -> bytes:
    """JSON of a tree in which one to three things are not as they were, or whose text is not."""
    tree = json.loads(json.dumps(good))
    for _ in range(rng.randrange(1, 4)):
        _change(rng, tree)
    # As ASCII: half a surrogate pair has no UTF-8 of its own.
    raw = json.dumps(tree).encode()
    return torn(rng, raw) if rng.random() < 0.3 else raw


def _change(rng: random.Random, tree: Any) -> None:
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            if isinstance(tree, dict):
                tree[rng.choice(TEXTS)] = value(rng)
            else:
                tree.append(value(rng))
            return
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and rng.random() < 0.8:
            tree = tree[key]
            continue
        how = rng.randrange(4)
        if how == 0:
            del tree[key]
        elif how == 1 and isinstance(tree, dict):
            tree[rng.choice(TEXTS)] = tree.pop(key)
        elif how == 2 and isinstance(tree[key], int) and not isinstance(tree[key], bool):
            tree[key] = tree[key] + rng.choice([-1, 1, 128, -tree[key]])
        else:
            tree[key] = value(rng)
        return


def torn(rng: random.Random, raw: bytes) -> bytes:
    """Bytes of which some are others, more, or fewer."""
    content = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(content) + 1)
        how = rng.randrange(4)
        if how == 0 and content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif how == 1:
            content[place:place] = rng.choice(RAW)
        elif how == 2:
            del content[place : place + rng.randrange(1, 40)]
        else:
            del content[place:]
    return bytes(content)


# Targets: a folder -> a function that spoils something in it and opens it


def headers(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Headers of safetensors files."""
    from dsv3_jax.interop.safetensors import read_header

    good = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [32, 32]},
    }
    path = folder / "model.safetensors"
    while True:
        text = spoilt(rng, good)
        length = len(text)
        if rng.random() < 0.1:
            length = rng.choice([0, 7, abs(len(text) - 1), len(text) + 1, 1 << 25, 1 << 63])
        size = rng.choice([32, 32, 32, 31, 33, 0])
        raw = length.to_bytes(8, "little") + text + bytes(size)
        path.write_bytes(torn(rng, raw) if rng.random() < 0.1 else raw)
        yield lambda: read_header(path)


def configs(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """config.json and generation_config.json of published folders."""
    from dsv3_jax.config.files import file_inside, read_json
    from dsv3_jax.interop.hf_config import (
        eos_of_generation_config,
        model_config_from_hf,
        model_config_to_hf,
        scale_format_of_hf,
    )
    from tests.fixtures.interop.tiny import TINY

    good = [
        model_config_to_hf(TINY, fp8=True, scale_fmt="ue8m0"),
        {"model_type": "deepseek_v2", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"eos_token_id": [1, 2], "bos_token_id": 0},
    ]
    good[1] = {**good[0], **good[1], "rope_scaling": None}
    path = folder / "config.json"
    while True:
        which = rng.randrange(3)
        path.write_bytes(spoilt(rng, good[which]))

        def read(which: int = which) -> None:
            values = read_json(file_inside(folder, path.name), 1 << 20)
            if which == 2:
                eos_of_generation_config(values, 100)
            else:
                model_config_from_hf(values)
                scale_format_of_hf(values)

        yield read


def published(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Folders of published weights: config.json, the index, and what verifies them."""
    from dsv3_jax.verifying import verify
    from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

    write_hf(folder / "hf", TINY, hf_tensors(TINY, "fp8"), shards=3)
    yield from _spoiling(
        folder / "hf", ["config.json", "model.safetensors.index.json"], rng, verify
    )


def imports(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Manifests of imports."""
    from dsv3_jax.interop.checkpoint import open_checkpoint
    from dsv3_jax.interop.importing import import_hf
    from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

    write_hf(folder / "hf", TINY, hf_tensors(TINY, "fp8"), shards=1)
    ours = import_hf(folder / "hf", folder / "ours")
    yield from _spoiling(ours, ["dsv3_jax_weights.json"], rng, open_checkpoint, "seal")


def shards(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Indices, recipes and token files of prepared data."""
    from dsv3_jax.data.corpus import damage_of_prepared, open_corpus, prepare
    from dsv3_jax.data.tokenizer import ByteTokenizer

    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text(f"document {i}\n" * (i + 1))
    options = {"val_fraction": 0.2, "fim_rate": 0.1, "seed": 0}
    prepare([folder / "texts"], folder / "data", ByteTokenizer(), **options)
    data = DataConfig(path=str(folder / "data"))

    def read(path: Path) -> None:
        damage_of_prepared(path)
        corpus = open_corpus(data, 0)
        corpus.train.slice(0, min(50, len(corpus.train)))

    names = ["train/index.json", "val/index.json", "recipe.json"]
    yield from _spoiling(folder / "data", names, rng, read, "seal")


def runs(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Folders of runs, read without JAX: config.json, metrics.jsonl, manifests, metadata."""
    from dsv3_jax.analysis.report import read_metrics
    from dsv3_jax.config.run import config_of_run
    from dsv3_jax.training.saved import pick_step, read_saved
    from dsv3_jax.verifying import verify

    def last_step(path: Path) -> None:
        steps = path / "checkpoints"
        read_saved(steps / str(pick_step(steps, "auto")))

    yield from _of_a_run(folder, rng, [verify, config_of_run, read_metrics, last_step])


def states(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """The same folders, of which the arrays are restored."""
    from dsv3_jax.loading import find_tokenizer, load

    yield from _of_a_run(folder, rng, [find_tokenizer, load])


def _of_a_run(
    folder: Path, rng: random.Random, looks: list[Callable[[Path], Any]]
) -> Iterator[Callable[[], Any]]:
    from dsv3_jax.training.manifest import write_manifest

    run = folder / "run"
    # In a process of its own: what makes a run imports JAX.
    made = [sys.executable, "-m", "tests.fuzzing", "--make-run", str(run)]
    subprocess.run(made, check=True)
    step = run / "checkpoints/3"
    inside = ["meta/metadata", "state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA"]
    inside += ["state/array_metadatas/process_0"]
    names = ["config.json", "metrics.jsonl", "checkpoints/3/MANIFEST.json"]
    names += [f"checkpoints/3/{name}" for name in inside]

    def read(path: Path) -> None:
        found = []
        for look in looks:
            try:
                look(path)
            except ALLOWED as error:
                found.append(error)
        if found:
            raise found[0]

    def seal() -> None:
        if rng.random() < 0.9:  # a stranger's manifest fits
            write_manifest(step)

    yield from _spoiling(run, names, rng, read, sealing=seal)


def tokenizers(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """tokenizer.json, and tokenizer_config.json beside it."""
    from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer

    (folder / "t").mkdir()
    train_tokenizer(["hello hello world"], 270, folder / "t/tokenizer.json")
    config = {"add_bos_token": True, "bos_token": "x", "model_max_length": 10**30}
    (folder / "t/tokenizer_config.json").write_text(json.dumps(config))

    def read(path: Path) -> None:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("hello größe"))

    names = ["tokenizer.json", "tokenizer_config.json"]
    yield from _spoiling(folder / "t", names, rng, read)


def documents(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Texts: JSON lines, plain and compressed, and parquet."""
    import pyarrow
    import pyarrow.parquet

    from dsv3_jax.data.documents import find_files, read_documents, read_records

    lines = [{"text": "one"}, {"text": "two", "n": 1}]
    rows = {"text": ["one", "two"], "messages": [[{"role": "user", "content": "x"}], []]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "good")
    parquet = (folder / "good").read_bytes()
    while True:
        raw = b"\n".join(spoilt(rng, line) for line in lines) + b"\n"
        squeezed = gzip.compress(raw, 1)
        name, content = rng.choice(
            [
                ("a.jsonl", raw),
                ("a.jsonl.gz", torn(rng, squeezed)),
                ("a.parquet", torn(rng, parquet)),
            ]
        )
        (folder / name).write_bytes(content)

        def read(path: Path = folder / name) -> None:
            with contextlib.suppress(UserError):
                list(read_records(find_files([path])))
            list(read_documents(find_files([path])))

        yield read


def _spoiling(
    folder: Path,
    names: list[str],
    rng: random.Random,
    read: Callable[[Path], Any],
    drop: str | None = None,
    sealing: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], Any]]:
    """One file of the folder spoilt at a time; every other time without its own checksum `drop`."""
    good = {name: (folder / name).read_bytes() for name in names}
    while True:
        name = rng.choice(names)
        if name.endswith(".jsonl"):
            lines = [spoilt(rng, json.loads(line)) for line in good[name].splitlines()]
            content = b"\n".join(lines) + b"\n"
        else:
            tree = json.loads(good[name])
            if drop in tree and rng.random() < 0.9:
                del tree[drop]
            content = spoilt(rng, tree)
        (folder / name).write_bytes(content)
        if name != "checkpoints/3/MANIFEST.json":
            sealing()
        yield lambda: read(folder)
        for each, was in good.items():
            if (folder / each).read_bytes() != was:
                (folder / each).write_bytes(was)


def _a_run(run: Path) -> Path:
    """A run of the least size with the checkpoint of a step."""
    import dataclasses

    import jax

    from dsv3_jax.config import Config, ModelConfig, to_json
    from dsv3_jax.model.transformer import init_variables
    from dsv3_jax.training.checkpoint import Checkpoints

    model = ModelConfig(
        **{"vocab_size": 261, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        **{"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
        **{"v_head_dim": 4, "intermediate_size": 8, "first_k_dense_replace": 1},
        **{"num_nextn_predict_layers": 0, "bos_token_id": 256, "eos_token_id": 257},
    )
    config = Config(model=model)
    with Checkpoints(run / "checkpoints", every_steps=1, keep=1) as checkpoints:
        meta = {"config": dataclasses.asdict(config), "losses": [1.0]}
        checkpoints.save(3, init_variables(jax.random.key(0), model), meta)
    (run / "config.json").write_text(to_json(config))
    lines = [{"step": i, "loss": 2.0, "expert_load": [[0.5, 0.5]]} for i in (1, 2, 3)]
    lines.append({"step": 3, "seconds": {"step": 1.5}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


TARGETS = {
    f.__name__: f
    for f in (headers, configs, published, imports, shards, runs, states, tokenizers, documents)
}


class Stuck(BaseException):
    """A case takes far too long."""


def fuzz(name: str, count: int, seed: int) -> dict[str, Any]:
    """What became of `count` cases of a target; AssertionError for the first that went wrong."""
    logging.disable(logging.CRITICAL)
    rng = random.Random(f"{name} {seed}")
    seen: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as base:
        os.environ["XDG_CACHE_HOME"] = f"{base}/cache"
        outside, inside = Path(base) / "outside", Path(base) / "inside"
        outside.mkdir()
        inside.mkdir()
        (outside / "secret").write_text("{}")
        cases = TARGETS[name](inside, rng)
        case = next(cases)
        before, there = _peak(), _listing(Path(base))
        for number in range(count):
            start = time.process_time()
            try:
                _within(20 * SECONDS, case)
                seen["read"] += 1
            except ALLOWED as error:
                text = str(error)
                assert len(text) < 5000 and len(text.splitlines()) < 40, text[:300]
                seen["refused"] += 1
            except BaseException as error:
                told = "".join(traceback.format_exception(error))
                raise AssertionError(f"{name} {seed}, case {number}: {told[-3000:]}") from None
            spent = time.process_time() - start
            longest = max(longest, spent)
            assert spent < SECONDS, f"{name} {seed}, case {number}: {spent:.1f} s"
            case = next(cases)
        assert _listing(Path(base)) == there, "something was written outside the folder"
        cases.close()
    return {
        "target": name,
        "cases": count,
        **seen,
        "longest_s": round(longest, 3),
        "MB_before": before,
        "MB": _peak(),
    }


def _within(seconds: int, case: Callable[[], Any]) -> None:
    def stop(*_: Any) -> None:
        raise Stuck

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        case()
    finally:
        signal.alarm(0)


def _peak() -> int:
    """MiB at most so far of this program; ru_maxrss begins with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) >> 10


def _listing(base: Path) -> list[tuple[str, int, int]]:
    """All that lies outside of the folder that is played with, and what changed when."""
    found = [path for path in base.rglob("*") if "inside" not in path.relative_to(base).parts]
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found)


def main() -> int:
    """One target, so many cases; prints what became of them."""
    if sys.argv[1:2] == ["--make-run"]:
        _a_run(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    told = fuzz(options.target, options.count, options.seed)
    print(json.dumps(told | {"seconds": round(time.monotonic() - start, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
