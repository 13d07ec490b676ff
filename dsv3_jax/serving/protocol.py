"""OpenAI's requests as this package's, and completions as OpenAI's answers.

What a request may ask for and this server does not do is refused by name, unless its value asks for
nothing (a penalty of 0, no tools).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.data.chat import ChatTemplate, check_messages
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.batch_file import number_of, prompt_of, strings_of
from dsv3_jax.inference.conversation import chat_prompt
from dsv3_jax.inference.requests import Completion, Request, Token, seed_of

MAX_STOPS, MAX_CHOICES = 16, 64
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # all integers of 64 bits, signed or not

COMMON = {
    "model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed",
    "user",
}  # fmt: skip
FIELDS = {
    "completion": COMMON | {"prompt", "logprobs", "echo", "best_of"},
    "chat": COMMON | {"messages", "max_completion_tokens", "logprobs", "top_logprobs"},
}
# Known, and only these values ask for nothing that is not done here.
NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "metadata": ({},),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI's


class BadRequest(ValueError):
    """A request that is wrong; `parameter` says where."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.parameter, self.code = parameter, code


@dataclass(frozen=True)
class Asked:
    """A request of OpenAI's API."""

    kind: str  # "completion" or "chat"
    requests: tuple[Request, ...]  # a choice each
    choices: int  # of each prompt, one after the other
    stops: tuple[str, ...]
    stream: bool
    usage: bool  # a last chunk of a stream with the counts
    logprobs: bool
    top: int  # of the likeliest tokens with each


@dataclass(frozen=True)
class Served:
    """What is served: its names and how its text is read."""

    model: str
    tokenizer: Tokenizer
    template: ChatTemplate
    max_length: int
    top: int  # the most likeliest tokens that a request may ask for


def parse(kind: str, body: Any, served: Served, seed: int) -> Asked:
    """The requests in a body; BadRequest names what is wrong. `seed` is for one that has none."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a {type(body).__name__}, not an object")
    for name, value in body.items():
        if value is None or (name in FIELDS[kind] and name not in NOTHING):
            continue
        if name not in NOTHING:
            raise BadRequest(f"unknown field {name!r}", name)
        if value not in NOTHING[name]:
            raise BadRequest(f"{name}={value!r} is not supported by this server", name)
    values = {name: value for name, value in body.items() if value is not None}
    if (model := values.get("model", served.model)) != served.model:
        raise BadRequest(
            f"the model {model!r} does not exist; this server has {served.model!r}",
            "model",
            "model_not_found",
        )
    prompts = _prompts(kind, values, served)
    choices = _number(values, "n", int, 1)
    if not 1 <= choices * len(prompts) <= MAX_CHOICES:
        raise BadRequest(f"n={choices} for {len(prompts)} prompts: 1 to {MAX_CHOICES} choices", "n")
    if _number(values, "best_of", int, choices) != choices:
        raise BadRequest("best_of must equal n: choices are not ranked", "best_of")
    stops = _stops(values)
    logprobs, top = _logprobs(kind, values, served)
    options = values.get("stream_options", {})
    if not isinstance(options, dict) or any(name != "include_usage" for name in options):
        raise BadRequest(
            f"stream_options={options!r} may have include_usage only", "stream_options"
        )
    seed = _number(values, "seed", int, seed)
    if not MIN_SEED <= seed <= MAX_SEED:
        raise BadRequest(f"seed={seed} must lie in {MIN_SEED} to {MAX_SEED}", "seed")
    seed %= 2**64
    requests = []
    for number, prompt in enumerate(p for p in prompts for _ in range(choices)):
        requests.append(
            Request(
                prompt=prompt,
                max_new_tokens=_max_tokens(kind, values, served, len(prompt)),
                temperature=_number(values, "temperature", float, 1.0),
                top_p=_number(values, "top_p", float, 1.0),
                seed=seed_of(seed, number),
            )
        )
    stream = _flag(values, "stream")
    usage = _flag(options, "include_usage")
    return Asked(kind, tuple(requests), choices, stops, stream, usage, logprobs, top)


def _prompts(kind: str, values: Mapping[str, Any], served: Served) -> list[tuple[int, ...]]:
    field = "prompt" if kind == "completion" else "messages"
    if field not in values:
        raise BadRequest(f"{field} is missing", field)
    value = values[field]
    try:
        if kind == "chat":
            messages = check_messages(_joined(value))
            return [chat_prompt(messages, served.template, served.tokenizer)]
        several = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
        given = value if several else [value]
        return [
            prompt_of(
                "token_ids" if isinstance(each, list) else "prompt",
                each,
                served.tokenizer,
                served.template,
            )
            for each in given
        ]
    except ValueError as error:  # UserError of a template, too
        raise BadRequest(str(error), field) from error


def _joined(messages: Any) -> Any:
    """Messages whose content is a list of texts, as newer clients send it, with one text each."""
    if not isinstance(messages, list):
        return messages
    joined = []
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list) and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in parts
        ):
            message = {**message, "content": "".join(part["text"] for part in parts)}
        joined.append(message)
    return joined


def _number(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    try:
        return number_of(name, values[name], kind) if name in values else default
    except ValueError as error:
        raise BadRequest(str(error), name) from error


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name}={value!r} is neither true nor false", name)
    return value


def _stops(values: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        stops = strings_of("stop", values.get("stop", []))
    except ValueError as error:
        raise BadRequest(str(error), "stop") from error
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"{len(stops)} stop strings; at most {MAX_STOPS}", "stop")
    return stops


def _logprobs(kind: str, values: Mapping[str, Any], served: Served) -> tuple[bool, int]:
    if kind == "completion":
        wanted = "logprobs" in values
        top, field = _number(values, "logprobs", int, 0), "logprobs"
    else:
        wanted, top = _flag(values, "logprobs"), _number(values, "top_logprobs", int, 0)
        field = "top_logprobs"
        if top and not wanted:
            raise BadRequest("top_logprobs needs logprobs: true", field)
    if not 0 <= top <= served.top:
        raise BadRequest(f"{field}={top}: this server returns 0 to {served.top}", field)
    return wanted, top


def _max_tokens(kind: str, values: Mapping[str, Any], served: Served, prompt: int) -> int:
    name = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
    room = served.max_length - prompt + 1
    if name in values:
        return _number(values, name, int, 0)
    if room < 1:
        raise BadRequest(
            f"the prompt has {prompt} tokens, and there is room for {served.max_length}",
            "messages" if kind == "chat" else "prompt",
            "context_length_exceeded",
        )
    return min(DEFAULT_TOKENS, room) if kind == "completion" else room


def usage_of(completions: Sequence[Completion], choices: int) -> dict[str, Any]:
    """The counts of a request; a prompt counts once, however many choices it has."""
    prompts = sum(len(c.request.prompt) for c in completions[::choices])
    written = sum(len(c.tokens) for c in completions)
    cached = sum(c.cached_tokens for c in completions[::choices])
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def logprobs_of(kind: str, tokens: Sequence[Token], tokenizer: Tokenizer, top: int, offset: int):
    """The log-probabilities of tokens in OpenAI's form; `offset` is the text's length before."""

    def spelt(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode(errors="replace")

    if kind == "chat":

        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            raw = list(tokenizer.token_bytes(token_id))
            return {"token": spelt(token_id), "logprob": logprob, "bytes": raw}

        content = [
            {**entry(t.id, t.logprob), "top_logprobs": [entry(*each) for each in t.top[:top]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(spelt(token.id))
    return {
        "tokens": [spelt(t.id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{spelt(i): p for i, p in t.top[:top]} for t in tokens] if top else None,
        "text_offset": offsets,
    }
