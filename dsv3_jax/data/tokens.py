"""What a tokenizer is here: a table of bytes, one string of them a token.

Decoding, streaming and the count of bytes for bits per byte all follow from that one table; special
tokens have none. Tokenizers that lose text, such as WordPiece, have no such table.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from dsv3_jax.config import UserError
from dsv3_jax.config.files import refuse_lfs_pointer

# The largest published tokenizer.json files are near 40 MB; more is a mistake or an attack.
MAX_FILE_BYTES = 128 * 2**20
TOKENIZER_CONFIG = "tokenizer_config.json"
# Of that one; Kimi-K2's has 4 kB, and one with every added token some 200.
MAX_TOKENIZER_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens this package places; the FIM ones are None where absent."""

    bos: int
    eos: int
    fim_begin: int | None = None
    fim_hole: int | None = None
    fim_end: int | None = None


class Tokenizer(ABC):
    """Text to int32 ids and back. `pieces[i]` holds the bytes of id i, empty for special tokens."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        pieces: list[bytes],
        special: SpecialTokens,
        *,
        path: Path | None = None,
        files: Mapping[str, Path] | None = None,
        adds_space: bool = False,
        prompt_prefix: tuple[int, ...] | None = None,
    ):
        self.name = name
        self.fingerprint = fingerprint  # sha256 of what defines it
        self.path = path  # its file, where it has one
        # What a folder needs to hold to be read as this tokenizer: the names there, and the files.
        self.files = dict(files or {})
        self.vocab_size = len(pieces)  # the highest id + 1
        self.bos_token_id = special.bos
        self.eos_token_id = special.eos
        self.fim_begin_id = special.fim_begin
        self.fim_hole_id = special.fim_hole
        self.fim_end_id = special.fim_end
        # What a prompt begins with: bos, as documents do in training, unless its files say other.
        self.prompt_prefix = (special.bos,) if prompt_prefix is None else prompt_prefix
        self.adds_space = adds_space  # encoding puts a space before the text; decoding removes it
        self._pieces = pieces
        self._piece_bytes = np.array([len(piece) for piece in pieces], np.int64)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The ids of each text, no special token added."""

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """The ids of a text, no special token added."""
        return self.encode_batch([text])[0]

    def encode_with_special(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " T"]]:
        """The ids of a text in which special tokens are spelt, and the character each begins at.

        As transformers reads what a chat template wrote. A tokenizer whose special tokens have no
        spelling reads text only.
        """
        ids = self.encode(text)
        ends = np.cumsum([len(self.token_bytes(int(i))) for i in ids])
        characters = np.cumsum([0, *(len(c.encode()) for c in text)])
        starts = np.searchsorted(characters, np.concatenate([[0], ends[:-1]]), side="right") - 1
        return ids, starts.astype(np.int64)

    def spells_special(self, text: str) -> str | None:
        """The first special token that a text spells out; None for none."""
        return None

    @property
    def special_spellings(self) -> dict[str, str]:
        """bos_token and eos_token as a chat template writes them; empty without a spelling."""
        return {"bos_token": "", "eos_token": ""}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; none for special tokens and ids beyond the vocabulary.

        A model's vocabulary may be padded past the tokenizer's (V3: 129,280 rows for 128,815 ids).
        """
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def count_bytes(self, ids: np.ndarray | Sequence[int]) -> int:
        """How many bytes of text the ids stand for; special tokens count zero."""
        ids = np.asarray(ids, np.int64).ravel()
        return int(self._piece_bytes[ids[ids < self.vocab_size]].sum())


class StreamDecoder:
    """Text as ids come in: what `push` returns never splits a character.

    All pushes and the flush, joined, equal `decode` of the whole. When the ids continue a prompt,
    `continues=True` keeps the first token's leading space.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.adds_space and not continues

    def push(self, token_id: int) -> str:
        """The characters that this id completes."""
        piece = self._tokenizer.token_bytes(int(token_id))
        if self._drop_space and piece:
            piece, self._drop_space = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def read_capped(path: Path) -> bytes:
    """The bytes of a tokenizer's file; UserError for one that is too large or a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes, so no tokenizer.json")
    refuse_lfs_pointer(raw, path)
    return raw
