"""Whether a model can read a corpus: of one that is open, and of one that is only named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsv3_jax.config import Config, DataConfig, ModelConfig, UserError
from dsv3_jax.data.batches import Rows
from dsv3_jax.data.corpus import Corpus, bpe_size, is_prepared, open_corpus
from dsv3_jax.data.documents import find_files
from dsv3_jax.data.mixture_weights import split_path
from dsv3_jax.data.shards import check_vocab
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.data.tokens import Tokenizer


def check_model(model: ModelConfig, corpus: Corpus) -> None:
    """Raises UserError unless the model can read the corpus: vocabulary, bos and eos ids agree."""
    for part in corpus.parts:
        for split in (part.train, part.val):
            check_vocab(model.vocab_size, split.index.vocab_size, split.index.tokenizer)
    _check_ends(model, corpus.tokenizer)


def check_run(config: Config, corpus: Corpus) -> None:
    """Raises UserError unless the run's model can read the corpus, and its text fills a row."""
    check_model(config.model, corpus)
    for part in corpus.parts:
        if not part.train.is_supervised:  # conversations are packed, whatever their length
            for split in (part.train, part.val):
                Rows(split, config.train.seq_len + 1, config.seed)


def problems(config: Config) -> list[str]:
    """What the run would refuse of the data that it names, a text each; nothing is tokenised.

    A prepared folder is opened, its files by their sizes alone; other paths must hold files of
    texts. A vocabulary that is still to be trained counts as large as it may become.
    """
    found = []
    for path, _ in split_path(config.data.path):
        data = dataclasses.replace(config.data, path=path)
        try:
            if is_prepared(path):
                data = dataclasses.replace(data, verify="sizes")
                check_run(config, open_corpus(data, config.seed))
            else:
                _check_texts(data, config.model)
        except (UserError, OSError) as error:
            found.append(str(error))
    return found


def _check_texts(data: DataConfig, model: ModelConfig) -> None:
    if data.path != "stdlib":
        find_files([Path(data.path)])
    if (size := bpe_size(data.tokenizer)) is not None:
        return check_vocab(model.vocab_size, size, data.tokenizer)
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocab(model.vocab_size, tokenizer.vocab_size, tokenizer.name)
    _check_ends(model, tokenizer)


def _check_ends(model: ModelConfig, tokenizer: Tokenizer) -> None:
    for role, ids in (
        ("bos_token_id", (model.bos_token_id,)),
        ("eos_token_id", model.eos_token_ids),
    ):
        theirs = getattr(tokenizer, role)
        if theirs not in ids:
            raise UserError(
                f"model.{role}={getattr(model, role)}, but the tokenizer "
                f"{tokenizer.name} has {theirs}: "
                f"use --model.{role.replace('_', '-')} {theirs}"
            )
