"""Documents to tokens: the split into training and validation, and fill-in-the-middle.

Both are pure functions of a document's content, so a corpus may be reordered, grown or read by any
number of processes without moving a document from one side to the other. Packing itself needs no
code: rows are windows of the concatenated documents, without a mask between them, as in V3
(V3 report, section 4.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import UserError
from dsv3_jax.data.tokens import Tokenizer

Split = Literal["train", "val"]

# Documents are encoded in groups of this many characters: enough for all cores, little memory.
_GROUP_CHARACTERS = 4 * 2**20


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens; with the tokenizer and the texts it fixes every token."""

    val_fraction: float  # of the documents, chosen by a hash of their content
    fim_rate: float  # of the training documents
    seed: int  # of FIM only: the split does not move with it
    # Fewer documents than it takes to fill both sides: the end of each is its validation part, or
    # of conversations, which are not cut, both sides hold all.
    split_by: Literal["document", "tail", "repeat"] = "document"


@dataclass(frozen=True)
class PackedDocument:
    """One document as it goes into the shards."""

    split: Split
    ids: Int32[np.ndarray, " T"]
    text_bytes: int


def pack_documents(
    texts: Iterable[str], tokenizer: Tokenizer, recipe: Recipe
) -> Iterator[PackedDocument]:
    """Every document as [bos] text [eos], or in FIM order, with the split it belongs to.

    FIM order is PSM: [bos] fim_begin prefix fim_hole suffix fim_end middle [eos]. The report prints
    `<fim_begin> pre <fim_hole> suf <fim_end> mid <eos>` (V3 report, section 4.1); the leading bos
    is ours, so that every document begins with one. The cuts are made on characters, before
    encoding, so FIM works for any tokenizer. UserError when the tokenizer has no FIM tokens.
    """
    if recipe.fim_rate and None in _fim_ids(tokenizer):
        raise UserError(
            f"tokenizer {tokenizer.name} has no fill-in-the-middle tokens, which "
            f"fim_rate={recipe.fim_rate} needs: use fim_rate 0"
        )
    group: list[tuple[Split, list[str]]] = []
    characters = 0
    for text in texts:
        for split, part in _split(text, recipe):
            cuts = fim_cuts(part, recipe) if split == "train" else None
            group.append((split, [part] if cuts is None else _cut(part, *cuts)))
        characters += len(text)
        if characters >= _GROUP_CHARACTERS:
            yield from _encode(group, tokenizer)
            group, characters = [], 0
    yield from _encode(group, tokenizer)


def in_validation(text: str, val_fraction: float) -> bool:
    """Whether a document belongs to the validation split, by a hash of its content alone."""
    return _uniform(_digest(text)) < val_fraction


def fim_cuts(text: str, recipe: Recipe) -> tuple[int, int] | None:
    """The two character positions where FIM cuts a document, or None when it stays in order.

    Each is uniform over all positions, as in Bavarian et al. 2022 (arXiv 2207.14255, section 3),
    and drawn from a hash of the document, keyed by the seed.
    """
    if recipe.fim_rate == 0:
        return None
    key = recipe.seed.to_bytes(16, "little", signed=True)
    draws = hashlib.blake2b(_digest(text), digest_size=24, key=key).digest()
    if _uniform(draws[:8]) >= recipe.fim_rate:
        return None
    first, second = (int(_uniform(part) * (len(text) + 1)) for part in (draws[8:16], draws[16:]))
    return min(first, second), max(first, second)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _uniform(digest: bytes) -> float:
    # 53 bits, all that a double in [0, 1) can hold.
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _split(text: str, recipe: Recipe) -> list[tuple[Split, str]]:
    if recipe.split_by == "document":
        return [("val" if in_validation(text, recipe.val_fraction) else "train", text)]
    border = int(len(text) * (1 - recipe.val_fraction))
    parts: list[tuple[Split, str]] = [("train", text[:border]), ("val", text[border:])]
    return [(split, part) for split, part in parts if part]


def _cut(text: str, first: int, second: int) -> list[str]:
    return [text[:first], text[second:], text[first:second]]  # prefix, suffix, middle


def _fim_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None, int | None]:
    return tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id


def _encode(group: list[tuple[Split, list[str]]], tokenizer: Tokenizer) -> Iterator[PackedDocument]:
    encoded = iter(tokenizer.encode_batch([part for _, parts in group for part in parts]))
    for split, parts in group:
        ids = [np.array([tokenizer.bos_token_id], np.int32)]
        for special in _fim_ids(tokenizer) if len(parts) == 3 else (None,):
            if special is not None:
                ids.append(np.array([special], np.int32))
            ids.append(next(encoded))
        ids.append(np.array([tokenizer.eos_token_id], np.int32))
        text_bytes = sum(len(part.encode()) for part in parts)
        yield PackedDocument(split, np.concatenate(ids), text_bytes)
