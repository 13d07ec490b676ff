"""From a token's spelling in a tokenizer.json to the bytes that it stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsv3_jax.config import UserError


def piece_reader(decoder: Any, path: Path) -> tuple[Any, bool]:
    """(the function from a token's spelling to its bytes, whether encoding adds a first space)."""
    decoder = decoder or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type") for part in parts}
    if kinds == {"ByteLevel"}:
        return _byte_level_bytes, False
    if kinds & {"Replace", "Metaspace"} and kinds <= {
        *("Replace", "Metaspace", "ByteFallback", "Fuse", "Strip")
    }:
        adds_space = any(
            (part["type"] == "Strip" and part.get("start", 0) > 0)
            or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in parts
        )
        return _metaspace_bytes, adds_space
    raise UserError(
        f"{path}: its decoder ({', '.join(sorted(map(str, kinds)))}) does not give back the exact "
        "text; byte-level BPE and sentencepiece-like (metaspace) tokenizers do"
    )


def _byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of GPT-2's printable alphabet spells."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _metaspace_bytes(token: str) -> bytes:
    """The bytes of a sentencepiece-like token: <0x0A> is a byte, ▁ is a space."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest from U+0100 on.

    Origin: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _gpt2_alphabet()
