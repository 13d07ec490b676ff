"""Requests from a file of JSON lines, completions to another; it goes on where it stopped.

A request is an object with one of `prompt` (text to continue), `messages` (a conversation) and
`token_ids`, and settings if they are to differ from those given for all. A completion has the
request's `id` (its line number where it has none), `text` or `token_ids`, `finish_reason`, the
numbers of tokens, and seconds to the first token and in all. Completions are written as they come.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.config.files import check_folder_of, no_duplicates
from dsv3_jax.data.chat import ChatTemplate, check_messages
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.conversation import chat_prompt
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Completion, Request, seed_of
from dsv3_jax.inference.streaming import TextStream, listener_of

SOURCES = ("prompt", "messages", "token_ids")
NUMBERS = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
FIELDS = (*SOURCES, *NUMBERS, "stop", "id")
MAX_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Asked:
    """A request, and the line that asks for it."""

    line: int
    id: Any
    request: Request
    stops: tuple[str, ...]
    as_text: bool


def run_batch(
    file: Path,
    out: Path | None,
    engine_of: Callable[[int], Engine],
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    request: Request,
    stops: tuple[str, ...] = (),
) -> tuple[int, int]:
    """Completes the file's requests that are not in `out` yet; how many, and how many there were.

    `engine_of(length)` makes an engine for sequences of so many tokens. `request` and `stops` are
    the settings of lines that have none. UserError, naming the line, for a file with a line that is
    no request: nothing is then written.
    """
    out = out or file.with_suffix(".completions.jsonl")
    asked = read_requests(file, config, tokenizer, template, request, stops)
    done = _written_before(out)
    left = [each for each in asked if _key(each.id) not in done]
    if not left:
        return 0, len(asked)
    longest = max(len(a.request.prompt) + a.request.max_new_tokens - 1 for a in left)
    engine = engine_of(longest)
    for each in left:
        with _naming(file, each.line):
            engine.check(each.request)
    with out.open("a") as lines:
        for each in left:
            engine.submit(_writing(each, engine, tokenizer, lines))
        while engine.busy:
            engine.step()
    return len(left), len(asked)


def _writing(asked: Asked, engine: Engine, tokenizer: Tokenizer, lines: TextIO) -> Request:
    """The request, such that its completion is written to the file when it is done."""
    stream = TextStream(tokenizer, asked.request.ends(engine.config), asked.stops)
    pieces: list[str] = []

    def write(completion: Completion) -> None:
        pieces.append(stream.flush())
        said = {"text": "".join(pieces)} if asked.as_text else {"token_ids": completion.ids}
        assert completion.started is not None and completion.finished is not None
        line = {
            "id": asked.id,
            **said,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(asked.request.prompt),
            "cached_tokens": completion.cached_tokens,
            "completion_tokens": len(completion.tokens),
            "seconds_to_first_token": round(completion.started - completion.submitted, 6),
            "seconds": round(completion.finished - completion.submitted, 6),
        }
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    return replace(asked.request, listener=listener_of(stream, pieces.append), on_done=write)


def read_requests(
    file: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    request: Request,
    stops: tuple[str, ...] = (),
) -> list[Asked]:
    """All requests of a file; UserError names the first line that is none for this model."""
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{file} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    asked, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with _naming(file, number):
            record = json.loads(line, object_pairs_hook=no_duplicates)
            each = _request_of(record, number, tokenizer, template, request, stops)
            each.request.check(config, config.max_position_embeddings)
            if _key(each.id) in seen:
                raise ValueError(f"id {each.id!r} was there before")
        seen.add(_key(each.id))
        asked.append(each)
    if not asked:
        raise UserError(f"{file} has no request")
    return asked


@contextmanager
def _naming(file: Path, line: int) -> Iterator[None]:
    """What is wrong with a request is said with its line."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # UserError, JSONDecodeError
        raise UserError(f"{file}, line {line}: {error}") from error


def _request_of(record: Any, number: int, tokenizer, template, request: Request, stops) -> Asked:
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} is no object")
    if unknown := [name for name in record if name not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    sources = [name for name in SOURCES if name in record]
    if len(sources) != 1:
        raise ValueError(f"a request has one of {', '.join(SOURCES)}; this has {len(sources)}")
    prompt = prompt_of(sources[0], record[sources[0]], tokenizer, template)
    settings = {}
    for name, kind in NUMBERS.items():
        if name in record:
            settings[name] = number_of(name, record[name], kind)
    # Like prompts given together, lines draw independently where they have no seed of their own.
    settings.setdefault("seed", seed_of(request.seed, number))
    if "stop" in record:
        stops = strings_of("stop", record["stop"])
    return Asked(
        number, record.get("id", number), replace(request, prompt=prompt, **settings), stops,
        sources[0] != "token_ids",
    )  # fmt: skip


def prompt_of(
    source: str, value: Any, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[int, ...]:
    """The ids of a prompt, a conversation or ids; ValueError for what is none."""
    if source == "messages":
        return chat_prompt(check_messages(value), template, tokenizer)
    if source == "token_ids":
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise ValueError("token_ids is not a list of whole numbers")
        return tuple(value)
    if not isinstance(value, str):
        raise ValueError(f"prompt is a {type(value).__name__}, not text")
    return (*tokenizer.prompt_prefix, *map(int, tokenizer.encode(value)))


def number_of(name: str, value: Any, kind: type) -> Any:
    """A setting's number; ValueError for what is none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or (kind is int and not isinstance(value, int)):
        raise ValueError(f"{name}={value!r} is no {'whole ' * (kind is int)}number")
    return kind(value)


def strings_of(name: str, value: Any) -> tuple[str, ...]:
    """A string or several; ValueError for what is none, or is empty."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"{name}={value!r} is neither a text nor a list of texts, or is empty")
    return tuple(strings)


def _written_before(out: Path) -> set[str]:
    """The ids that are in the file; a line that was cut off is taken out of it."""
    if not out.exists():
        check_folder_of(out, "completions")
        return set()
    raw = out.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with out.open("r+b") as file:
            file.truncate(whole)
    try:
        records: list[Mapping[str, Any]] = [json.loads(line) for line in raw[:whole].splitlines()]
        return {_key(record["id"]) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} holds a line that is no completion: {error}") from error


def _key(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)
