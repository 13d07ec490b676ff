"""What a dry run says of data that is named, before anything is tokenised."""

from dataclasses import replace

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import checks
from dsv3_jax.data.corpus import prepare
from dsv3_jax.data.tokenizer import ByteTokenizer, train_tokenizer
from tests.helpers import tiny_config, tiny_model

MODEL = tiny_model(vocab_size=272, bos_token_id=256, eos_token_id=257)
BYTES = DataConfig(tokenizer="byte")


def problems(data, model, **plan):
    return checks.problems(replace(tiny_config(model, **plan), data=data))


@pytest.fixture
def prepared(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"document {i}\n" * 5)
    out = tmp_path / "out"
    prepare([texts], out, ByteTokenizer(), val_fraction=0.2, fim_rate=0.0, seed=0)
    return out


def test_what_a_run_could_read_has_no_problems(prepared, tmp_path):
    for path in ("stdlib", prepared, tmp_path / "texts"):
        assert problems(replace(BYTES, path=str(path)), MODEL) == []
    ends = replace(MODEL, bos_token_id=0, eos_token_id=1)
    assert problems(replace(BYTES, path="stdlib", tokenizer="bpe:272"), ends) == []


def test_a_missing_corpus_and_ids_past_the_vocabulary_are_named(prepared, tmp_path):
    small = replace(MODEL, vocab_size=258)
    for path in ("stdlib", prepared, tmp_path / "texts"):
        (told,) = problems(replace(BYTES, path=str(path)), small)
        assert "has 261 ids" in told and "model.vocab_size=258" in told
    (told,) = problems(replace(BYTES, path="no/such/place"), MODEL)
    assert "no/such/place" in told
    (told,) = problems(replace(BYTES, path="stdlib", tokenizer="bpe:273"), MODEL)
    assert "has 273 ids" in told
    (told,) = problems(replace(BYTES, path="stdlib", tokenizer="no.json"), MODEL)
    assert "no.json" in told
    file = tmp_path / "tokenizer.json"
    train_tokenizer(["some words"], 262, file)
    (told,) = problems(replace(BYTES, path="stdlib", tokenizer=str(file)), MODEL)
    assert "use --model.bos-token-id 0" in told


def test_each_part_of_a_mixture_is_looked_at(prepared):
    (prepared / "val/index.json").unlink()
    told = problems(replace(BYTES, path=f"{prepared}:1,no/such/place:2"), MODEL)
    assert len(told) == 2
    assert "index.json" in told[0] and "no/such/place" in told[1]


def test_a_text_shorter_than_a_row_is_named(prepared):
    data = replace(BYTES, path=str(prepared))
    assert problems(data, MODEL, seq_len=30) == []
    (told,) = problems(replace(data, verify="all"), MODEL, seq_len=2000)
    assert "tokens are too few for one row of 2,001" in told
