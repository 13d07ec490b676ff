"""Token shards: flat little-endian files of token ids, and an index that says what they hold.

A folder of shards is one long stream of tokens, read through memory maps; documents are marked by
their bos and eos tokens only. It is written once, beside its final place, and renamed when whole,
so that a folder in its place is always complete.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dsv3_jax.config import LIMITS, UserError
from dsv3_jax.config.files import build, file_inside, read_json, shown
from dsv3_jax.data.supervision import Supervision, SupervisionIndex, SupervisionWriter
from dsv3_jax.data.tokens import Tokenizer

INDEX_FILE = "index.json"
FORMAT = 1
# 64 Mi tokens: 128 MiB as uint16, so that one damaged file is small beside a corpus.
TOKENS_PER_SHARD = 64 * 2**20
# What `verify` hashes at most when a corpus is opened: about a second on one core.
VERIFY_BYTES = 2**30
_MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds; the content of its index.json."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int  # of the tokenizer
    tokenizer: str
    tokenizer_sha256: str
    documents: int
    text_bytes: int  # of all documents in UTF-8, without special tokens
    shards: tuple[Shard, ...]
    format: int = FORMAT
    supervision: SupervisionIndex | None = None  # of supervised data only
    seal: str | None = None  # sha256 of all the other fields; None in folders made before there was

    def sealed(self) -> ShardIndex:
        """The same index with its seal."""
        values = dataclasses.asdict(dataclasses.replace(self, seal=None))
        text = json.dumps(values, sort_keys=True)
        return dataclasses.replace(self, seal=hashlib.sha256(text.encode()).hexdigest())

    @property
    def tokens(self) -> int:
        """Tokens of all shards, special ones included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """A fingerprint of the whole stream: two corpora with the same one hold the same tokens.

        Of supervised ones, also the same targets and documents.
        """
        parts = [shard.sha256 for shard in self.shards]
        if self.supervision is not None:
            parts += [self.supervision.targets_sha256, self.supervision.documents_sha256]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


class DamagedShards(UserError):
    """A shard folder that does not hold what its index says."""


class ShardWriter:
    """Writes a stream of tokens into an existing, empty folder; `close` writes the index.

    Memory is bounded by the largest array added. With `supervised`, each document brings targets.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        tokens_per_shard: int = TOKENS_PER_SHARD,
        supervised: bool = False,
    ):
        self._folder = folder
        self._tokenizer = tokenizer
        self._tokens_per_shard = tokens_per_shard
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._shards: list[Shard] = []
        self._file: Any = None
        self._sha256 = hashlib.sha256()
        self._tokens = 0  # in the open file
        self._documents = 0
        self._text_bytes = 0
        self._supervision = SupervisionWriter(folder) if supervised else None

    def add(
        self,
        ids: Int32[np.ndarray, " T"],
        text_bytes: int,
        targets: Bool[np.ndarray, " T"] | None = None,
    ) -> None:
        """Appends one document of `text_bytes` bytes of text, with its targets where asked for."""
        assert (targets is None) == (self._supervision is None)
        if self._supervision is not None and targets is not None:
            self._supervision.add(targets)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self._tokenizer.vocab_size)
        self._documents += 1
        self._text_bytes += text_bytes
        while ids.size:
            if self._file is None:
                self._file = (self._folder / self._file_name()).open("wb", buffering=2**20)
            part, ids = np.split(ids, [self._tokens_per_shard - self._tokens])
            raw = part.astype(self._dtype).tobytes()
            self._file.write(raw)
            self._sha256.update(raw)
            self._tokens += part.size
            if self._tokens == self._tokens_per_shard:
                self._end_shard()

    def close(self) -> ShardIndex:
        """The index, after writing it as index.json."""
        if self._file is not None:
            self._end_shard()
        index = ShardIndex(
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            vocab_size=self._tokenizer.vocab_size,
            tokenizer=self._tokenizer.name,
            tokenizer_sha256=self._tokenizer.fingerprint,
            documents=self._documents,
            text_bytes=self._text_bytes,
            shards=tuple(self._shards),
            supervision=None if self._supervision is None else self._supervision.close(),
        ).sealed()
        text = json.dumps(dataclasses.asdict(index), indent=2) + "\n"
        (self._folder / INDEX_FILE).write_text(text)
        return index

    def _file_name(self) -> str:
        return f"tokens-{len(self._shards):05d}.bin"

    def _end_shard(self) -> None:
        self._file.close()
        self._shards.append(Shard(self._file_name(), self._tokens, self._sha256.hexdigest()))
        self._file, self._sha256, self._tokens = None, hashlib.sha256(), 0


class TokenShards:
    """The tokens of a shard folder as one sequence.

    Opening checks the index and every file's size; `verify` also reads and hashes the files.
    Raises DamagedShards naming the file and what is wrong with it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        for shard in self.index.shards:
            path, expected = self.folder / shard.file, shard.tokens * dtype.itemsize
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                state = "is missing" if size is None else f"has {size:,} bytes, not {expected:,}"
                raise DamagedShards(f"{path} {state}: prepare the folder again")
        self._maps = [
            np.memmap(file_inside(self.folder, shard.file), dtype, mode="r", shape=(shard.tokens,))
            for shard in self.index.shards
        ]
        # starts[i] is the position of shard i's first token; the last entry is the length.
        self._starts = np.cumsum([0] + [shard.tokens for shard in self.index.shards])
        self._supervision = None
        if self.index.supervision is not None:
            try:
                self._supervision = Supervision(self.folder, self.index.documents, len(self))
            except (OSError, ValueError) as error:
                raise DamagedShards(f"{error}: prepare the folder again") from error

    @property
    def is_supervised(self) -> bool:
        """Whether the folder says which tokens are targets."""
        return self._supervision is not None

    @property
    def document_starts(self) -> Int64[np.ndarray, " starts"]:
        """Where each document of supervised shards begins, and the length at the end."""
        assert self._supervision is not None
        return self._supervision.document_starts

    def targets(self, start: int, stop: int) -> Bool[np.ndarray, " T"]:
        """Whether each token of [start, stop) is a target; all are where nothing says otherwise."""
        if self._supervision is None:
            return np.ones(stop - start, bool)
        return self._supervision.targets(start, stop)

    def __len__(self) -> int:
        """Tokens in the folder."""
        return int(self._starts[-1])

    @property
    def num_bytes(self) -> int:
        """Size of all token files."""
        return sum(tokens.nbytes for tokens in self._maps)

    def slice(self, start: int, stop: int) -> Int32[np.ndarray, " T"]:
        """The tokens [start, stop) as int32, across files where need be.

        ValueError when the range does not lie within the folder: a short answer would shift rows.
        DamagedShards when an id is not one of the tokenizer's: it has no row in an embedding.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens [{start}, {stop}) are not within the {len(self)} there are")
        parts: list[np.ndarray] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base = int(self._starts[shard])
            end = min(stop, int(self._starts[shard + 1]))
            part = self._maps[shard][start - base : end - base]
            if (most := int(part.max())) >= self.index.vocab_size:
                raise DamagedShards(
                    f"{self.folder / self.index.shards[shard].file} holds the id {most}, but its "
                    f"tokenizer has {self.index.vocab_size}: prepare the folder again"
                )
            parts.append(part)
            start, shard = end, shard + 1
        if not parts:
            return np.zeros(0, np.int32)
        return np.concatenate(parts, dtype=np.int32, casting="unsafe")

    def verify(self, max_bytes: int | None = None) -> int:
        """Reads files and compares their sha256 with the index; returns how many files those were.

        At most about `max_bytes`, of files taken at random, so that every start looks at others;
        None reads all. DamagedShards names the file.
        """
        self._verify_supervision()
        shards = list(self.index.shards)
        random.Random(os.urandom(8)).shuffle(shards)
        read = 0
        for done, shard in enumerate(shards):
            if max_bytes is not None and read >= max_bytes:
                return done
            self._verify_file(shard)
            read += (self.folder / shard.file).stat().st_size
        return len(shards)

    def damage(self) -> list[str]:
        """What is wrong with each file whose sha256 differs from the index; reads all."""
        found = []
        looks = [functools.partial(self._verify_file, shard) for shard in self.index.shards]
        for look in [self._verify_supervision, *looks]:
            try:
                look()
            except DamagedShards as error:
                found.append(str(error))
        return found

    def _verify_file(self, shard: Shard) -> None:
        path = self.folder / shard.file
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise DamagedShards(
                f"{path} does not hold what was written (sha256 {found[:12]}..., expected "
                f"{shard.sha256[:12]}...): prepare the folder again"
            )

    def _verify_supervision(self) -> None:
        if self._supervision is not None and self.index.supervision is not None:
            try:
                self._supervision.verify(self.index.supervision)
            except ValueError as error:
                raise DamagedShards(f"{error}: prepare the folder again") from error


def check_vocab(vocab_size: int, ids: int, tokenizer: str) -> None:
    """UserError when a tokenizer has more ids than a model's vocabulary."""
    if ids > vocab_size:
        raise UserError(
            f"the data's tokenizer ({tokenizer}) has {ids} ids, but "
            f"model.vocab_size={vocab_size}: use model.vocab_size={ids} or more"
        )


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, which takes that place when the block ends without an error.

    `final` must be absent or an empty folder. Nothing is left behind on an error. UserError when
    the place cannot be written; other OSErrors (a full disk) pass through.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    except OSError as error:
        raise UserError(f"cannot write to {final.parent}: {error.strerror or error}") from error
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield partial
        os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX_FILE
    if not path.exists():
        raise DamagedShards(f"{folder}: no {INDEX_FILE}, so not a folder of token shards")
    try:
        values = read_json(file_inside(folder, INDEX_FILE), _MAX_INDEX_BYTES)
        if (made := values.get("format", FORMAT)) != FORMAT:
            raise UserError(f"{path}: format {shown(made)}; this version reads {FORMAT}")
        index = build(ShardIndex, values, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DamagedShards(f"{path}: not a shard index: {reason}") from error
    if problem := _index_problem(index):
        raise DamagedShards(f"{path}: not a shard index: {problem}")
    return index


def _index_problem(index: ShardIndex) -> str | None:
    """The first value no index of ours would hold; a hostile index is refused by name."""
    for name in ("documents", "text_bytes"):
        if getattr(index, name) < 0:
            return f"{name}={getattr(index, name)} is not a count"
    if not 0 < index.vocab_size <= LIMITS["vocab_size"]:
        return f"vocab_size={index.vocab_size} is not in [1, {LIMITS['vocab_size']}]"
    files = {shard.file for shard in index.shards}
    if len(files) < len(index.shards):
        return "a file is listed twice"
    for shard in index.shards:
        bare = Path(shard.file).name == shard.file and shard.file.isprintable()
        if not bare or len(shard.file.encode()) > 255:
            return f"file {shown(shard.file)} is not a bare file name"
        if shard.tokens <= 0:
            return f"{shard.file}: tokens={shard.tokens} is not a count"
    if index.documents > index.tokens:
        return f"documents={index.documents}, but there are {index.tokens} tokens"
    if index.seal is not None and index.seal != index.sealed().seal:
        return "it does not hold what was written (its seal is another's)"
    return None
