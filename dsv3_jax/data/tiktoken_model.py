"""`tiktoken.model`, the tokenizer of Kimi and Moonlight, encoded by the `tiktoken` library.

The published file holds the merges alone, a line a token: its bytes in base64 and its rank, which
is its id. The rest is in `tokenizer_config.json` (special tokens by id) and in the publisher's
Python class (the pattern that cuts a text into words, and how long pieces are cut before it). No
code of a checkpoint runs here: the class is known by name, what it does is written below, and where
its file lies beside, its pattern is compared with the one known.

Source: tokenization_moonshot.py of Moonlight-16B-A3B and tokenization_kimi.py of Kimi-K2 and
Kimi-Linear, as kept in public repositories.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import LIMITS, UserError
from dsv3_jax.config.files import parse_json
from dsv3_jax.data.tokens import TOKENIZER_CONFIG, SpecialTokens, Tokenizer, read_capped

FILE = "tiktoken.model"
# The classes whose pattern and cuts are the ones below.
CODE_FILES = ("tokenization_kimi.py", "tokenization_moonshot.py")
CLASS = "TikTokenTokenizer"
MAX_TOKENS = LIMITS["vocab_size"]

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = (
    r"[\p{Han}]+",
    f"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}",
    f"{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
# Ids past the merges that are special: 256 in Kimi's class, and two more in Moonlight's.
NUM_SPECIAL = 256
MAX_SPECIAL = NUM_SPECIAL + 2
# A text is cut into pieces of so many characters, and a run without a change between white space
# and the rest into so many; tiktoken cannot take longer ones.
MAX_CHARACTERS, MAX_RUN = 400_000, 25_000
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,8})")


class TiktokenTokenizer(Tokenizer):
    """A `tiktoken.model` beside its `tokenizer_config.json`, as the publisher's class encodes.

    UserError for files that do not say everything exactly: an unknown class or another pattern, no
    ids for the special tokens, merges that are damaged. Special tokens written out in a text are
    text, as everywhere here (the publisher's `encode(text, allow_special_tokens=False)`).
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        config, config_raw = _read_config(path)
        raw = read_capped(path)
        ranks = _read_ranks(raw, path)
        names = _special_names(config, len(ranks), path)
        _check_class(config, path)
        library = _tiktoken_library()
        ids = {name: token for token, (name, _) in names.items()}
        self._encoding = library.Encoding(
            path.name, pat_str="|".join(PATTERNS), mergeable_ranks=ranks, special_tokens=ids
        )
        pieces = [b""] * (max(len(ranks) + NUM_SPECIAL, max(names) + 1))
        for piece, rank in ranks.items():
            pieces[rank] = piece
        for token, (name, special) in names.items():
            pieces[token] = b"" if special else name.encode()
        roles = {role: _role(config, role, ids, path) for role in ("bos", "eos")}
        super().__init__(
            name=path.name,
            fingerprint=hashlib.sha256(raw + config_raw).hexdigest(),
            pieces=pieces,
            special=SpecialTokens(**roles),
            files={
                name: path.with_name(name)
                for name in (FILE, TOKENIZER_CONFIG, *CODE_FILES)
                if path.with_name(name).is_file()
            },
            prompt_prefix=(),  # the publisher's class puts nothing before a text
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The ids of each text, on all cores."""
        cut = [list(cut_text(text)) for text in texts]
        made = iter(self._encoding.encode_ordinary_batch([part for parts in cut for part in parts]))
        return [np.array([i for _ in parts for i in next(made)], np.int32) for parts in cut]


def cut_text(text: str) -> Iterator[str]:
    """The pieces that the publisher's class encodes apart: no run longer than MAX_RUN."""
    for start in range(0, len(text), MAX_CHARACTERS):
        part, begin = text[start : start + MAX_CHARACTERS], 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


def _read_config(path: Path) -> tuple[dict[str, Any], bytes]:
    beside = path.with_name(TOKENIZER_CONFIG)
    if not beside.is_file():
        raise UserError(
            f"{path}: needs the {TOKENIZER_CONFIG} beside it, which holds its special tokens"
        )
    raw = read_capped(beside)
    return parse_json(raw, beside), raw


def _read_ranks(raw: bytes, path: Path) -> dict[bytes, int]:
    """Token bytes to rank; every byte alone is a token, and ranks count from 0 without a gap."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(io.BytesIO(raw), 1):
        line = line.rstrip(b"\r\n")
        if not line:
            continue
        found = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else b""
        except binascii.Error:
            token = b""
        if not found or not token or token in ranks or int(found[2]) != len(ranks):
            raise UserError(
                f"{path}: line {number} is not a new token in base64 and the rank {len(ranks)}"
            )
        ranks[token] = len(ranks)
        if len(ranks) > MAX_TOKENS:
            raise UserError(f"{path}: more than {MAX_TOKENS} tokens")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(
            f"{path}: {len(missing)} of the 256 bytes are no token, 0x{missing[0]:02x} first"
        )
    return ranks


def _special_names(
    config: dict[str, Any], num_ranks: int, path: Path
) -> dict[int, tuple[str, bool]]:
    """(name, whether special) of each id that added_tokens_decoder names."""
    beside = path.with_name(TOKENIZER_CONFIG)
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict) or not added:
        raise UserError(f"{beside}: has no added_tokens_decoder, so {path.name} lacks its specials")
    names: dict[int, tuple[str, bool]] = {}
    for key, entry in added.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 9 else -1
        if not isinstance(name, str) or not num_ranks <= token < num_ranks + MAX_SPECIAL:
            raise UserError(
                f"{beside}: added_tokens_decoder[{key[:20]!r}] must have content and an id from "
                f"{num_ranks}, the number of merges, to {num_ranks + MAX_SPECIAL - 1}"
            )
        names[token] = name, entry.get("special") is not False
    if len({name for name, _ in names.values()}) < len(names):
        raise UserError(f"{beside}: added_tokens_decoder has a name twice")
    return names


def _check_class(config: dict[str, Any], path: Path) -> None:
    """Raises UserError unless the pattern is known to be PATTERNS."""
    beside = path.with_name(TOKENIZER_CONFIG)
    mapped = config.get("auto_map")
    named = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else None
    named = named[0] if isinstance(named, list) and named else named
    # "repository--file.Class", as the hub writes for code that lies elsewhere
    module = str(named).rpartition("--")[2] if named else ""
    file = module.removesuffix(f".{CLASS}") + ".py"
    here = [name for name in CODE_FILES if path.with_name(name).is_file()]
    if config.get("tokenizer_class") != CLASS or (file not in CODE_FILES and not here):
        raise UserError(
            f"{beside}: tokenizer_class={str(config.get('tokenizer_class'))[:60]!r} and "
            f"auto_map={str(named)[:60]!r} do not name {CLASS} of {' or '.join(CODE_FILES)}, so "
            f"the pattern that goes with {path.name} is not known"
        )
    for name in here:
        source = read_capped(path.with_name(name)).decode(errors="replace")
        places = [source.find(f'"""{pattern}"""') for pattern in PATTERNS]
        if -1 in places or places != sorted(places):
            raise UserError(
                f"{path.with_name(name)}: its pat_str is not the one known of Kimi and Moonlight"
            )


def _role(config: dict[str, Any], role: str, ids: dict[str, int], path: Path) -> int:
    value = config.get(f"{role}_token")
    name = value.get("content") if isinstance(value, dict) else value
    if name not in ids:
        raise UserError(
            f"{path.with_name(TOKENIZER_CONFIG)}: {role}_token={str(name)[:60]!r} is none of its "
            "added_tokens_decoder"
        )
    return ids[name]


def _tiktoken_library() -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            "a tiktoken.model needs the tiktoken library: pip install 'dsv3_jax[tiktoken]'"
        ) from error
    return tiktoken
