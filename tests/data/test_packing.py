"""Documents to tokens: the split, and fill-in-the-middle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.data.packing import Recipe, fim_cuts, in_validation, pack_documents
from dsv3_jax.data.tokenizer import ByteTokenizer

BOS, EOS, BEGIN, HOLE, END = 256, 257, 258, 259, 260
TOKENIZER = ByteTokenizer()
TEXTS = [f"document {i}: größe {i * i}" for i in range(4000)]
# 4000 draws: five standard deviations of a fraction p are 5 sqrt(p (1 - p) / 4000).
FIVE_SIGMA = 5 / 4000**0.5


def pack(texts, **changes):
    recipe = Recipe(**{"val_fraction": 0.02, "fim_rate": 0.1, "seed": 0, **changes})
    return list(pack_documents(texts, TOKENIZER, recipe))


def reassemble(ids):
    """The text of a document in either order, from the report's definition of PSM."""
    ids = ids.tolist()
    assert ids[0] == BOS and ids[-1] == EOS
    if BEGIN not in ids:
        return bytes(ids[1:-1]).decode()
    assert ids[1] == BEGIN and ids.index(HOLE) < ids.index(END)
    prefix = ids[2 : ids.index(HOLE)]
    suffix = ids[ids.index(HOLE) + 1 : ids.index(END)]
    middle = ids[ids.index(END) + 1 : -1]
    return bytes(prefix + middle + suffix).decode()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(0, 2**32))
def test_a_fim_document_holds_the_whole_document(text, seed):
    (document,) = pack([text], fim_rate=1.0, val_fraction=1e-9, seed=seed)
    assert BEGIN in document.ids
    assert reassemble(document.ids) == text
    assert document.text_bytes == TOKENIZER.count_bytes(document.ids) == len(text.encode())


def test_every_document_is_packed_once_in_order():
    assert [reassemble(d.ids) for d in pack(TEXTS, fim_rate=0.5)] == TEXTS


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_fim_comes_at_its_rate_and_only_in_training(rate):
    documents = pack(TEXTS, fim_rate=rate, val_fraction=0.3)
    has_fim = {
        split: [BEGIN in d.ids for d in documents if d.split == split] for split in ("train", "val")
    }
    assert not any(has_fim["val"])
    deviation = FIVE_SIGMA * (rate * (1 - rate) / 0.7) ** 0.5
    assert abs(np.mean(has_fim["train"]) - rate) <= deviation


def test_fim_cuts_are_uniform_and_follow_the_seed():
    text = "x" * 99
    cuts = [fim_cuts(text, Recipe(0.1, 1.0, seed)) for seed in range(4000)]
    low, high = np.mean(cuts, axis=0) / len(text)
    # The smaller and larger of two uniform draws have means 1/3 and 2/3 and deviation 0.236.
    assert abs(low - 1 / 3) < 0.236 * FIVE_SIGMA
    assert abs(high - 2 / 3) < 0.236 * FIVE_SIGMA
    assert cuts[7] == fim_cuts(text, Recipe(0.1, 1.0, 7))


def test_the_split_has_its_size_and_does_not_move():
    chosen = {text for text in TEXTS if in_validation(text, 0.1)}
    assert abs(len(chosen) / len(TEXTS) - 0.1) < FIVE_SIGMA * 0.3
    # Independent of the order, the company and the seed; a larger fraction only adds.
    moved = pack(reversed(TEXTS[:2000]), val_fraction=0.1, seed=9)
    assert {reassemble(d.ids) for d in moved if d.split == "val"} == chosen & set(TEXTS[:2000])
    assert chosen <= {text for text in TEXTS if in_validation(text, 0.2)}


def test_split_by_tail_gives_every_document_two_sides():
    documents = pack(["abcdefghij"], val_fraction=0.3, fim_rate=0, split_by="tail")
    assert [(d.split, reassemble(d.ids)) for d in documents] == [
        ("train", "abcdefg"),
        ("val", "hij"),
    ]


def test_a_tokenizer_without_fim_tokens_is_refused_unless_the_rate_is_zero():
    tokenizer = ByteTokenizer()
    tokenizer.fim_hole_id = None
    with pytest.raises(UserError, match=r"no fill-in-the-middle tokens.*use fim_rate 0"):
        list(pack_documents(["x"], tokenizer, Recipe(0.1, 0.1, 0)))
    assert len(list(pack_documents(["x"], tokenizer, Recipe(0.1, 0.0, 0)))) == 1
