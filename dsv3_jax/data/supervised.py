"""Supervised records as tokens, each with a bit that says whether it is a target.

A record of JSON lines or parquet is a conversation (`messages`), a pair (`prompt` and `completion`)
or plain `text`. Targets are what the model shall learn to say: the assistant's turns with their end
tokens, a completion with its end of document, all of a text. The loss is taken over targets only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import UserError
from dsv3_jax.data.chat import (
    CHAT_TEMPLATE_FILE,
    DEFAULT_TEMPLATE,
    ChatTemplate,
    TemplateFailed,
    check_messages,
    load_chat_template,
)
from dsv3_jax.data.corpus import Summary, checked_recipe, write_corpus
from dsv3_jax.data.documents import Inputs, find_files, read_records
from dsv3_jax.data.packing import Recipe
from dsv3_jax.data.shards import ShardWriter
from dsv3_jax.data.tokenizer import Tokenizer

OnError = Literal["stop", "skip"]


class SupervisedDocument(NamedTuple):
    """One conversation, pair or text as the model reads it."""

    ids: Int32[np.ndarray, " T"]
    targets: Bool[np.ndarray, " T"]  # of each token, whether it is to be predicted
    text_bytes: int


def is_supervised(record: Mapping[str, Any]) -> bool:
    """Whether a record says what of it is a target: it has messages, or a prompt."""
    return "messages" in record or "prompt" in record


def prepare_supervised(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    val_fraction: float,
    seed: int = 0,
    on_error: OnError = "stop",
) -> Summary:
    """What was written to `out`: as `corpus.prepare`, from records and with their targets.

    The split follows a hash of each document; where that leaves one side empty, both hold all
    documents (recipe.json: split_by "repeat"), so that a few conversations can be learnt and
    watched. The chat template is kept beside the tokens. UserError as `corpus.prepare`, and for
    records as `read_supervised`.
    """
    recipe, files = checked_recipe(Path(out), val_fraction, 0.0, seed), find_files(inputs)

    def write(folder: Path, recipe: Recipe) -> Summary:
        if template is not None:
            (folder / CHAT_TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
        return _write(files, folder, tokenizer, template, recipe, on_error)

    repeated = dataclasses.replace(recipe, split_by="repeat")
    return write_corpus(files, Path(out), tokenizer, (recipe, repeated), write)


def find_template(file: Path | None, tokenizer_folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template in a file, else that beside a tokenizer, else DeepSeek-V3's own form.

    UserError for a file that cannot be read; raises as `ChatTemplate`.
    """
    spellings = tokenizer.special_spellings
    if file is not None:
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), spellings)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {file}: {error}") from error
    folder = tokenizer_folder if tokenizer_folder.is_dir() else tokenizer_folder.parent
    of_folder = None if tokenizer.path is None else load_chat_template(folder, spellings)
    return of_folder or ChatTemplate(DEFAULT_TEMPLATE, spellings)


def _write(
    files: Inputs,
    folder: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    recipe: Recipe,
    on_error: OnError,
) -> Summary:
    writers = {}
    for split in ("train", "val"):
        (folder / split).mkdir()
        writers[split] = ShardWriter(folder / split, tokenizer, supervised=True)
    skipped: Counter[str] = Counter()
    records = read_records(files)
    for document in read_supervised(records, tokenizer, template, skipped, on_error):
        sides = ("train", "val")
        if recipe.split_by == "document":
            digest = hashlib.blake2b(document.ids.tobytes(), digest_size=8).digest()
            in_val = int.from_bytes(digest, "little") < recipe.val_fraction * 2**64
            sides = ("val",) if in_val else ("train",)
        for split in sides:
            writers[split].add(document.ids, document.text_bytes, document.targets)
    train, val = writers["train"].close(), writers["val"].close()
    if not (train.documents or val.documents):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
        raise UserError(f"no conversation in {len(files.files)} files ({reasons or 'no records'})")
    return Summary(train, val, recipe, dict(skipped))


def holds_conversations(inputs: Sequence[str | Path]) -> bool:
    """Whether the inputs' first record says what of it is a target; False for plain text."""
    structured = [
        file
        for file in find_files(inputs).files
        if file.path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet"))
    ]
    if not structured:
        return False
    first = next(read_records(Inputs((structured[0],), Counter())), None)
    return first is not None and is_supervised(first[1])


def read_supervised(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    skipped: Counter[str],
    on_error: OnError = "stop",
) -> Iterator[SupervisedDocument]:
    """The documents of (place, record) pairs, in order.

    A record that is none, or that its template fails on, is a UserError that names the place, or
    with "skip" is left out and counted in `skipped` by reason. `tools` are not rendered; records
    that bring them are counted.
    """
    for place, record in records:
        try:
            if record.get("tools"):
                skipped["tools of a conversation, which are not rendered (it is kept)"] += 1
            yield encode_record(record, tokenizer, template)
        except ValueError as error:
            if on_error == "stop":
                raise UserError(f"{place}: {error}") from error
            skipped[f"record: {error}"] += 1


def encode_record(
    record: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> SupervisedDocument:
    """A record's tokens and targets. ValueError says what is wrong with it.

    Messages are written by the template and read as transformers' `apply_chat_template` reads them:
    what is spelt like a special token is one, so that messages which spell one are refused. A pair
    is [bos] prompt completion [eos], a text [bos] text [eos].
    """
    if "messages" in record:
        return _conversation(check_messages(record["messages"]), tokenizer, template)
    if "prompt" in record:
        prompt, completion = record["prompt"], record.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = check_messages([*prompt, *completion])
            return _conversation(messages, tokenizer, template, answers_from=len(prompt))
        if not (isinstance(prompt, str) and isinstance(completion, str) and completion):
            raise ValueError("prompt and completion are not both text (or both lists of messages)")
        return _pair(prompt, completion, tokenizer)
    text = record.get("text")
    if not isinstance(text, str) or not text:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"no messages, no prompt with completion, no text; fields: {names}")
    return _pair("", text, tokenizer)


def _conversation(
    messages, tokenizer: Tokenizer, template: ChatTemplate | None, answers_from: int = 0
) -> SupervisedDocument:
    if template is None:
        raise ValueError("messages need a chat template, and there is none")
    if not any(message["role"] == "assistant" for message in messages[answers_from:]):
        raise ValueError("no assistant turn: nothing to learn")
    for number, message in enumerate(messages, start=1):
        if spelt := tokenizer.spells_special(message["content"]):
            raise ValueError(f"message {number} spells the special token {spelt!r}")
    rendered = template.render_targets(messages)
    earlier = sum(message["role"] == "assistant" for message in messages[:answers_from])
    spans = rendered.targets[earlier:]
    if (
        template.marks_targets
        and earlier
        and len(rendered.targets) != sum(message["role"] == "assistant" for message in messages)
    ):
        raise TemplateFailed("the template marks other spans than one for each assistant turn")
    ids, starts = tokenizer.encode_with_special(rendered.text)
    targets = np.zeros(len(ids), bool)
    for start, stop in spans:
        targets |= (starts >= start) & (starts < stop)
    if not targets.any():
        raise ValueError("the chat template marks no token as the assistant's: nothing to learn")
    return SupervisedDocument(ids, targets, len(rendered.text.encode()))


def _pair(prompt: str, completion: str, tokenizer: Tokenizer) -> SupervisedDocument:
    before, after = tokenizer.encode_batch([prompt, completion])
    ids = np.concatenate(
        [[tokenizer.bos_token_id], before, after, [tokenizer.eos_token_id]], dtype=np.int32
    )
    targets = np.arange(len(ids)) > len(before)
    return SupervisedDocument(ids, targets, len((prompt + completion).encode()))
