"""A corpus: the training and validation shards of one set of texts, prepared once.

`prepare` writes one where the user says. `open_corpus` opens what `data.path` names; texts that are
not prepared yet go through `prepare` into a cache folder, whose name is a hash of everything that
decides its tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dsv3_jax.config import DataConfig, UserError
from dsv3_jax.config.files import build, file_inside, read_json, shown
from dsv3_jax.data.cache import (
    default_cache_dir,
    fingerprints,
    locked,
    remove,
    short_hash,
    told_when_full,
)
from dsv3_jax.data.chat import CHAT_TEMPLATE_FILE
from dsv3_jax.data.documents import Inputs, find_files, read_documents, stdlib_files
from dsv3_jax.data.mixture_weights import split_path
from dsv3_jax.data.packing import Recipe, in_validation, pack_documents
from dsv3_jax.data.shards import (
    INDEX_FILE,
    VERIFY_BYTES,
    DamagedShards,
    ShardIndex,
    ShardWriter,
    TokenShards,
    atomic_folder,
)
from dsv3_jax.data.tokenizer import (
    TIKTOKEN_FILE,
    TOKENIZER_FILE,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from dsv3_jax.data.tokens import Tokenizer, read_capped

RECIPE_FILE = "recipe.json"
_MAX_RECIPE_BYTES = 1 << 20
# Part of every cache key: raise it when the same texts would give other tokens.
CACHE_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What `prepare` wrote."""

    train: ShardIndex
    val: ShardIndex
    recipe: Recipe
    skipped: dict[str, int]  # what was passed over, by reason

    def __str__(self) -> str:
        lines = [
            f"{name}: {index.documents:,} documents, {index.text_bytes:,} bytes of text, "
            f"{index.tokens:,} tokens in {len(index.shards)} files"
            for name, index in (("train", self.train), ("val", self.val))
        ]
        if self.recipe.split_by == "tail":
            lines.append(
                "too few documents to split: the last "
                f"{self.recipe.val_fraction:.1%} of each is its validation part"
            )
        if self.recipe.split_by == "repeat":
            lines.append("too few documents to split: validation repeats the training documents")
        lines += [f"skipped {count:,}: {reason}" for reason, count in sorted(self.skipped.items())]
        return "\n".join(lines)


class Part(NamedTuple):
    """One prepared corpus, and its weight among those of a mixture."""

    train: TokenShards
    val: TokenShards
    weight: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, and the tokenizer that made them.

    Of a mixture, `train` and `val` are those of the first part. Source: this project
    (docs/architecture.md).
    """

    parts: tuple[Part, ...]
    tokenizer: Tokenizer

    @property
    def train(self) -> TokenShards:
        """Tokens to train on."""
        return self.parts[0].train

    @property
    def val(self) -> TokenShards:
        """Tokens to validate on."""
        return self.parts[0].val

    @property
    def is_supervised(self) -> bool:
        """Whether any part says which tokens are targets."""
        return any(part.train.is_supervised for part in self.parts)

    @property
    def chat_template(self) -> Path | None:
        """The template that wrote the first part with conversations."""
        files = (part.train.folder.parent / CHAT_TEMPLATE_FILE for part in self.parts)
        return next((file for file in files if file.is_file()), None)

    def sha256(self, side: Literal["train", "val"]) -> str:
        """A fingerprint of one side: of its tokens, and in a mixture of the weights."""
        if len(self.parts) == 1:
            return getattr(self.parts[0], side).index.sha256
        return short_hash([[getattr(p, side).index.sha256, p.weight] for p in self.parts])


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    fim_rate: float,
    seed: int,
    text_field: str = "text",
) -> Summary:
    """What was written to `out`: the shards `train` and `val`, and the tokenizer's file.

    The split follows a hash of each document; where that leaves one side empty (a single text
    file), the last `val_fraction` of every document is its validation part instead. `out` appears
    whole or not at all. UserError: a missing input, text that cannot be read, no documents at all,
    an `out` that is not empty or cannot be written, a tokenizer without FIM tokens.
    """
    recipe = checked_recipe(Path(out), val_fraction, fim_rate, seed)
    return _prepare(find_files(inputs), Path(out), tokenizer, recipe, text_field)


def checked_recipe(out: Path, val_fraction: float, fim_rate: float, seed: int) -> Recipe:
    """The recipe of a corpus that is to be written to `out`; UserError as `prepare`."""
    if problems := DataConfig(val_fraction=val_fraction, fim_rate=fim_rate).problems():
        raise UserError("; ".join(problems))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another output folder")
    return Recipe(val_fraction, fim_rate, seed)


def open_corpus(data: DataConfig, seed: int, cache_dir: str | Path | None = None) -> Corpus:
    """The corpus that `data.path` names, tokenised into the cache when it is used first.

    "stdlib" is the source of the running Python's standard library; a folder that `prepare` wrote
    is opened as it is; any other path is text. The cache is `cache_dir`, or dsv3_jax in
    $XDG_CACHE_HOME or ~/.cache; several processes may open one corpus at once, and a damaged cache
    is built again. UserError: as for `prepare`, and when a prepared folder is damaged or was made
    by another tokenizer. With "bpe:N" as the tokenizer, one of N ids is trained on the corpus'
    training documents and cached beside the tokens; a prepared folder brings its own. Of a mixture
    all parts have one tokenizer. Source: V3 report, section 4.1 (packing without masks,
    fill-in-the-middle).

    >>> import tempfile, pathlib, dsv3_jax as ds
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = pathlib.Path(folder, "text.txt")
    ...     _ = text.write_text("Some words. " * 200)
    ...     data = ds.DataConfig(path=str(text), tokenizer="byte", val_fraction=0.5)
    ...     len(ds.open_corpus(data, seed=0, cache_dir=folder).train) > 0
    True
    """
    named = split_path(data.path)
    opened = [_open_one(dataclasses.replace(data, path=p), seed, cache_dir) for p, _ in named]
    first = opened[0].tokenizer
    for (path, _), corpus in zip(named, opened):
        if corpus.tokenizer.fingerprint != first.fingerprint:
            raise UserError(f"data.path: {path} and {named[0][0]} have different tokenizers")
    parts = [corpus.parts[0]._replace(weight=w) for corpus, (_, w) in zip(opened, named)]
    return Corpus(tuple(parts), first)


def _open_one(data: DataConfig, seed: int, cache_dir: str | Path | None) -> Corpus:
    path = Path(data.path)
    size = bpe_size(data.tokenizer)
    if is_prepared(data.path):
        own = path if tokenizer_file(path) else "byte"
        tokenizer = load_tokenizer(data.tokenizer if size is None else own)
        return _open_prepared(path, tokenizer, data)
    recipe = Recipe(data.val_fraction, data.fim_rate, seed)
    inputs = stdlib_files() if data.path == "stdlib" else find_files([path])
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if size is None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        tokenizer = _trained_bpe(inputs, size, data, root)
    folder = root / f"corpus-{_cache_key(inputs, tokenizer, recipe, data.path)}"
    with locked(folder):
        try:
            return _open_splits(folder, tokenizer, data)
        except UserError as error:  # nobody but this program writes there
            if folder.exists():
                log.warning("rebuilding the token cache: %s", error)
                remove(folder)
        log.info("tokenising %s into %s", data.path, folder)
        summary = _prepare(inputs, folder, tokenizer, recipe, "text")
        log.info("%s", summary)
        return _open_splits(folder, tokenizer, data)


def is_prepared(path: str | Path) -> bool:
    """Whether `data.path` names a folder that `prepare` wrote, whole or damaged."""
    marks = (RECIPE_FILE, f"train/{INDEX_FILE}")
    return path != "stdlib" and any((Path(path) / mark).exists() for mark in marks)


def bpe_size(spec: str) -> int | None:
    """N of "bpe:N"; None for any other tokenizer."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not size.isdigit():
        raise UserError(f"data.tokenizer={spec!r}: write bpe:N with the number of ids, as bpe:1024")
    return int(size)


def _trained_bpe(inputs: Inputs, size: int, data: DataConfig, root: Path) -> Tokenizer:
    """The corpus' own tokenizer, from the cache or trained on what is not validation text."""
    key = short_hash(
        [CACHE_FORMAT, "bpe", size, data.val_fraction, fingerprints(inputs, data.path)]
    )
    file = root / f"bpe-{key}.json"
    seal = file.with_suffix(".sha256")
    with locked(file):
        if file.exists():
            try:
                tokenizer = load_tokenizer(file)
                if seal.read_text() == tokenizer.fingerprint:
                    return tokenizer
                problem = "does not hold what was written"
            except (OSError, ValueError) as error:  # UserError among them
                problem = str(error).removeprefix(f"{file}: ")
            log.warning("training the cached tokenizer again: %s: %s", file, problem)
        log.info("training a tokenizer of %d ids on %s", size, data.path)
        documents = (
            text for text in read_documents(inputs) if not in_validation(text, data.val_fraction)
        )
        tokenizer = train_tokenizer(documents, size, file)
        seal.write_text(tokenizer.fingerprint)
        return tokenizer


def _prepare(
    inputs: Inputs, out: Path, tokenizer: Tokenizer, recipe: Recipe, text_field: str
) -> Summary:
    """Writes the corpus, in a second pass split by tails when the first left one side empty."""

    def write(folder: Path, recipe: Recipe) -> Summary:
        return _write_splits(inputs, folder, tokenizer, recipe, text_field)

    tails = dataclasses.replace(recipe, split_by="tail")
    return write_corpus(inputs, out, tokenizer, (recipe, tails), write)


def write_corpus(
    inputs: Inputs,
    out: Path,
    tokenizer: Tokenizer,
    recipes: tuple[Recipe, Recipe],
    write: Callable[[Path, Recipe], Summary],
) -> Summary:
    """What `write` wrote into a folder by the first recipe, or where that left one side empty by
    the second; with the tokenizer's files and recipe.json.

    `out` appears whole or not at all. OSError for a full disk, with the place and about how many
    bytes are wanted there.
    """
    with told_when_full(out, inputs, tokenizer.vocab_size), atomic_folder(out) as folder:
        summary = write(folder, recipes[0])
        if not (summary.train.documents and summary.val.documents):
            for split in ("train", "val"):
                shutil.rmtree(folder / split)
            summary = write(folder, recipes[1])
        for name, path in tokenizer.files.items():
            shutil.copyfile(path, folder / name)
        made = {**dataclasses.asdict(summary.recipe), "skipped": summary.skipped}
        (folder / RECIPE_FILE).write_text(json.dumps(made, indent=2) + "\n")
    return summary


def _write_splits(
    inputs: Inputs, folder: Path, tokenizer: Tokenizer, recipe: Recipe, text_field: str
) -> Summary:
    writers = {}
    for split in ("train", "val"):
        (folder / split).mkdir()
        writers[split] = ShardWriter(folder / split, tokenizer)
    skipped: Counter[str] = Counter()
    texts = read_documents(inputs, text_field, skipped)
    for document in pack_documents(texts, tokenizer, recipe):
        writers[document.split].add(document.ids, document.text_bytes)
    train, val = writers["train"].close(), writers["val"].close()
    if not (train.documents or val.documents):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
        raise UserError(
            f"the corpus is empty: no text in {len(inputs.files)} files ({reasons or 'no files'})"
            + (f", as {inputs.files[0].path}" if inputs.files else "")
        )
    return Summary(train, val, recipe, dict(skipped))


def _open_prepared(path: Path, tokenizer: Tokenizer, data: DataConfig) -> Corpus:
    corpus = _open_splits(path, tokenizer, data)
    made = _read_recipe(path)
    for name in ("val_fraction", "fim_rate"):
        if getattr(made, name) != getattr(data, name):
            log.warning(
                "%s was prepared with %s=%s, which stays; data.%s=%s has no effect",
                *(path, name, getattr(made, name), name, getattr(data, name)),
            )
    return corpus


def _open_splits(path: Path, tokenizer: Tokenizer, data: DataConfig) -> Corpus:
    """A folder's two sides, their files verified as `data.verify` says."""
    corpus = Corpus((Part(TokenShards(path / "train"), TokenShards(path / "val")),), tokenizer)
    own = tokenizer_file(path)
    for shards in (corpus.train, corpus.val):
        index = shards.index
        if index.tokenizer_sha256 != tokenizer.fingerprint:
            if own is not None and any(own.samefile(file) for file in tokenizer.files.values()):
                raise DamagedShards(f"{own} does not hold what was written: prepare it again")
            fits = "byte" if index.tokenizer == "byte" else own or f"that of {path}, which is lost"
            raise UserError(
                f"{path} was prepared with tokenizer {shown(index.tokenizer)[1:-1]} "
                f"(sha256 {index.tokenizer_sha256[:12]}...), but data.tokenizer={data.tokenizer} "
                f"is another: use data.tokenizer={fits}"
            )
        if index.vocab_size != tokenizer.vocab_size:
            raise DamagedShards(
                f"{shards.folder / INDEX_FILE}: vocab_size={index.vocab_size}, but its tokenizer "
                f"has {tokenizer.vocab_size} ids: prepare the folder again"
            )
        if data.verify == "sizes":
            continue
        done = shards.verify(None if data.verify == "all" else VERIFY_BYTES)
        if done < len(index.shards):
            log.warning(
                "%s: %d of %d files were hashed and are whole; `python -m dsv3_jax verify %s` or "
                "data.verify=all reads the others too",
                *(shards.folder, done, len(index.shards), path),
            )
    return corpus


def damage_of_prepared(path: Path) -> list[str]:
    """What is wrong with each file of a folder that `prepare` wrote; reads all of it."""
    found: list[str] = []
    try:
        _read_recipe(path)
    except UserError as error:
        found.append(str(error))
    for split in ("train", "val"):
        try:
            shards = TokenShards(path / split)
        except UserError as error:
            found.append(str(error))
            continue
        found += shards.damage()
        if problem := _tokenizer_problem(path, shards.index.tokenizer_sha256):
            found.append(f"{problem}, of {shards.folder}")
    return found


def _tokenizer_problem(path: Path, expected: str) -> str | None:
    own = tokenizer_file(path)
    if own is None:
        lost = load_tokenizer("byte").fingerprint != expected
        return f"{path / TOKENIZER_FILE} is missing" if lost else None
    if own.name == TIKTOKEN_FILE:
        try:
            found = load_tokenizer(own).fingerprint
        except UserError as error:
            return str(error)
    else:
        found = hashlib.sha256(read_capped(own)).hexdigest()
    return None if found == expected else f"{own} is not the tokenizer that made the tokens"


def _read_recipe(path: Path) -> Recipe:
    file = path / RECIPE_FILE
    try:
        made = read_json(file_inside(path, RECIPE_FILE), _MAX_RECIPE_BYTES)
        made.pop("skipped", None)
        return build(Recipe, made, file)
    except (OSError, UserError) as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise DamagedShards(f"{file}: missing or damaged: {reason}") from error


def _cache_key(inputs: Inputs, tokenizer: Tokenizer, recipe: Recipe, path: str) -> str:
    """A hash of all that decides the tokens."""
    files = fingerprints(inputs, path)
    return short_hash([CACHE_FORMAT, tokenizer.fingerprint, dataclasses.asdict(recipe), files])
