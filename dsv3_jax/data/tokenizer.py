"""Tokenizers: bytes without any dependency, and every lossless tokenizer.json.

Tokenizers that lose text, such as WordPiece, are refused. Special tokens written out in a text are
text: only this package puts real ones in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from dsv3_jax.config import LIMITS, UserError
from dsv3_jax.config.files import parse_json, read_json, shown
from dsv3_jax.data.chat import CHAT_TEMPLATE_FILE
from dsv3_jax.data.pieces import piece_reader
from dsv3_jax.data.tiktoken_model import FILE as TIKTOKEN_FILE
from dsv3_jax.data.tiktoken_model import TiktokenTokenizer
from dsv3_jax.data.tokens import (
    MAX_TOKENIZER_CONFIG_BYTES,
    TOKENIZER_CONFIG,
    SpecialTokens,
    Tokenizer,
    read_capped,
)

# Gemma's 262,144 tokens and 514,906 merges are the most there is: some 1.8 million values.
_MAX_VALUES = 1 << 22
TOKENIZER_FILE = "tokenizer.json"
# Those that are read, the first before the second, and what of a tokenizer lies beside them.
TOKENIZER_FILES = (TOKENIZER_FILE, TIKTOKEN_FILE)
BESIDE_TOKENIZER = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# What belongs to a model besides its weights and its card, and what a run keeps of those that it
# began with; code (*.py) is not carried along.
KEPT_WITH_WEIGHTS = (
    *TOKENIZER_FILES,
    *BESIDE_TOKENIZER,
    "generation_config.json",
    "LICENSE",
    "LICENSE-MODEL",
)
# Of tokenizers that are not read: sentencepiece, Mistral's, and what tokenizer.json was made from.
OTHER_FILES = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    TOKENIZER_CONFIG,
)

# What published tokenizers call each role, ours (DeepSeek's) first.
SPECIAL_NAMES = {
    "bos": (
        "<｜begin▁of▁sentence｜>",
        "<s>",
        "<|begin_of_text|>",
        "<bos>",
        "[BOS]",
        "<|startoftext|>",
    ),
    "eos": ("<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>"),
    "fim_begin": ("<｜fim▁begin｜>", "<fim_begin>", "<fim_prefix>", "<|fim_prefix|>"),
    "fim_hole": ("<｜fim▁hole｜>", "<fim_hole>", "<fim_suffix>", "<|fim_suffix|>"),
    "fim_end": ("<｜fim▁end｜>", "<fim_end>", "<fim_middle>", "<|fim_middle|>"),
}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255; 256 bos, 257 eos, 258 to 260 fim_begin, fim_hole, fim_end."""

    def __init__(self):
        layout = b"byte: 0-255 bytes, 256 bos, 257 eos, 258 fim_begin, 259 fim_hole, 260 fim_end"
        super().__init__(
            name="byte",
            fingerprint=hashlib.sha256(layout).hexdigest(),
            pieces=[bytes([i]) for i in range(256)] + [b""] * 5,
            special=SpecialTokens(bos=256, eos=257, fim_begin=258, fim_hole=259, fim_end=260),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


class HFTokenizer(Tokenizer):
    """A `tokenizer.json`, encoded by the `tokenizers` library.

    Byte-level BPE (DeepSeek, GPT-2, Llama 3, Qwen) and sentencepiece-like models with metaspace and
    byte fall-back (Llama 2, Gemma). UserError for a damaged file, a lossy tokenizer, or one without
    an end-of-document token. Without a bos token, eos also begins documents, as in GPT-2.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        library = _tokenizers_library()
        raw = read_capped(path)
        try:
            spec = parse_json(raw, f"{path}: not a usable tokenizer.json", _MAX_VALUES)
            special_ids = _mark_special(spec, path)
            # The marks are in `spec` only, so the library reads that, not the file.
            self._tokenizer = library.Tokenizer.from_str(json.dumps(spec))
        except UserError:
            raise
        except BaseException as error:  # the library raises bare ones for what it refuses
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # a signal's
            reason = str(error)[:300]
            raise UserError(f"{path}: not a usable tokenizer.json: {reason}") from error
        # "</s>" within a document is text and must not end it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = [t["content"] for t in spec["added_tokens"] if t["special"] and t["content"]]
        self._special_pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        to_bytes, adds_space = piece_reader(spec.get("decoder"), path)
        super().__init__(
            name=path.name,
            fingerprint=hashlib.sha256(raw).hexdigest(),
            pieces=_pieces(self._tokenizer, spec, to_bytes, path),
            special=special_ids,
            path=path,
            files={TOKENIZER_FILE: path},
            adds_space=adds_space,
            prompt_prefix=_prompt_prefix(self._tokenizer, path, special_ids.bos),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The ids of each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    @functools.cached_property
    def _reads_special(self) -> Any:
        """The same tokenizer, to which "</s>" is the special token: in a rendered chat it is."""
        return _tokenizers_library().Tokenizer.from_str(self._tokenizer.to_str())

    def encode_with_special(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " T"], Int64[np.ndarray, " T"]]:
        """The ids of a text in which special tokens are spelt, and the character each begins at."""
        encoding = self._reads_special.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        return np.array(encoding.ids, np.int32), starts

    def spells_special(self, text: str) -> str | None:
        """The first special token that a text spells out; None for none."""
        found = self._special_pattern.search(text)
        return found[0] if found else None

    @property
    def special_spellings(self) -> dict[str, str]:
        """bos_token and eos_token as a chat template writes them."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        return {name: self._tokenizer.id_to_token(i) or "" for name, i in ids.items()}


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "byte", or the path of a tokenizer's file.

    A folder stands for the tokenizer.json within it, or else the tiktoken.model. Raises UserError,
    naming what is there, for a folder with neither. Source: Hugging Face's tokenizers; tiktoken's
    file format for Kimi-K2.

    >>> import dsv3_jax as ds
    >>> ds.load_tokenizer("byte").encode("abc").tolist()
    [97, 98, 99]
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        file = tokenizer_file(path)
        if file is None:
            others = [name for name in OTHER_FILES if (path / name).exists()]
            raise UserError(
                f"{path}: {' and '.join(TOKENIZER_FILES)} are read, found "
                + (", ".join(others) or "no tokenizer's file")
            )
        path = file
    if not path.is_file():
        raise UserError(f"tokenizer {str(spec)!r}: no such file (or say 'byte')")
    if path.suffix == ".model" and path.name != TIKTOKEN_FILE:
        raise UserError(f"{path}: only {TOKENIZER_FILE} and {TIKTOKEN_FILE} are read: convert it")
    if path.name == TIKTOKEN_FILE:
        return TiktokenTokenizer(path)
    return HFTokenizer(path)


def tokenizer_file(folder: str | Path) -> Path | None:
    """The file of the tokenizer that lies in a folder; None where there is none that is read."""
    files = (Path(folder) / name for name in TOKENIZER_FILES)
    return next((file for file in files if file.is_file()), None)


def train_tokenizer(documents: Iterable[str], vocab_size: int, out_path: str | Path) -> HFTokenizer:
    """A byte-level BPE of at most `vocab_size` ids, trained on documents and saved at `out_path`.

    Ids 0 to 4 are bos, eos, fim_begin, fim_hole and fim_end under DeepSeek's names; fewer merges
    than asked for are learnt when the text holds no more pairs.
    """
    library = _tokenizers_library()
    special = [names[0] for names in SPECIAL_NAMES.values()]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"a byte-level vocabulary has at least {256 + len(special)} ids (256 bytes and "
            f"{len(special)} special tokens), not {vocab_size}"
        )
    if vocab_size > LIMITS["vocab_size"]:
        raise UserError(f"a vocabulary has at most {LIMITS['vocab_size']} ids, not {vocab_size}")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    out_path = Path(out_path)
    partial = out_path.with_name(f".{out_path.name}.{os.getpid()}")
    try:
        partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        partial.replace(out_path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        size = len(tokenizer.to_str(pretty=True).encode())
        raise UserError(
            f"cannot write the tokenizer to {out_path}: {error.strerror}; {size:,} bytes are wanted"
        ) from error
    return HFTokenizer(out_path)


def _tokenizers_library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise UserError(
            "a tokenizer.json needs the tokenizers library: pip install 'dsv3_jax[tokenizers]'"
        ) from error
    return tokenizers


def _mark_special(spec: Any, path: Path) -> SpecialTokens:
    """The role ids of a parsed tokenizer.json, whose tokens are marked special in place.

    DeepSeek-V3's file leaves its FIM tokens unmarked, and marks decide what encoding may emit.
    """
    if prefix := spec["model"].get("continuing_subword_prefix"):
        # Pieces would hold it, texts do not; and the library panics at merges that are shorter.
        raise UserError(f"{path}: continuing_subword_prefix={shown(prefix)} is not supported")
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    ids: dict[str, int] = {}
    for role, names in SPECIAL_NAMES.items():
        if found := next((added[name] for name in names if name in added), None):
            found["special"] = True
            ids[role] = int(found["id"])
    if "eos" not in ids:
        raise UserError(
            f"{path}: no end-of-document token; one of these must be an added token: "
            + " ".join(SPECIAL_NAMES["eos"])
        )
    return SpecialTokens(**{"bos": ids["eos"], **ids})


def _prompt_prefix(tokenizer: Any, path: Path, bos: int) -> tuple[int, ...] | None:
    """What transformers' AutoTokenizer puts before a text, by the files; None: nothing is said.

    That is what the post-processor of tokenizer.json puts there, or else bos if add_bos_token of
    tokenizer_config.json says so, which versions before 5 ask for.
    """
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    count = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    if count:
        return tuple(whole[:count])
    beside = path.with_name(TOKENIZER_CONFIG)
    if not beside.is_file():
        return None
    try:
        config = read_json(beside, MAX_TOKENIZER_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {beside}: {error.strerror}") from error
    return (bos,) if config.get("add_bos_token") else ()


def _pieces(tokenizer: Any, spec: dict[str, Any], to_bytes: Any, path: Path) -> list[bytes]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    most = max(vocabulary.values())
    if most >= LIMITS["vocab_size"]:
        raise UserError(f"{path}: the id {most} exceeds the {LIMITS['vocab_size']} allowed")
    pieces = [b""] * (most + 1)
    for token, token_id in vocabulary.items():
        pieces[token_id] = to_bytes(token)
    for token in spec["added_tokens"]:  # spelt as they are, not in the model's alphabet
        name, token_id = token["content"], token["id"]
        if vocabulary.get(name, token_id) != token_id or token_id > most:
            raise UserError(
                f"{path}: the added token {shown(name)} has the id {token_id}, but the vocabulary "
                f"gives it {vocabulary.get(name)}"
            )
        pieces[token_id] = b"" if token["special"] else name.encode()
    return pieces
