"""Conversations as text: a folder's own chat template, rendered in jinja2's sandbox.

A template is a program by a stranger. It sees plain strings, numbers, lists and dicts only, cannot
reach Python, and is stopped when its text or its time exceeds a bound. What it renders is what
transformers' `apply_chat_template` renders (transformers, utils/chat_template_utils.py): the same
block trimming, filters, functions and {% generation %} marks.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_bytes, read_json
from dsv3_jax.data.tokens import MAX_TOKENIZER_CONFIG_BYTES, TOKENIZER_CONFIG

ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_CHARACTERS = 2**20
MAX_RENDERED_CHARACTERS = 32 * 2**20
MAX_SECONDS = 10.0  # for one conversation; watched where the main thread renders

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, stop) of a rendered text

# DeepSeek-V3's own form, for tokenizers that bring no template.
DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\
{% elif message.role == 'user' %}<｜User｜>{{ message.content }}\
{% else %}<｜Assistant｜>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""


class TemplateFailed(UserError):
    """A template that cannot be compiled, or fails on a conversation."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the parts of it that are the assistant's to say."""

    text: str
    targets: tuple[Span, ...]  # in order, apart from each other


class ChatTemplate:
    """A compiled chat template; `special` are the strings of bos_token, eos_token and others.

    TemplateFailed for one that is too long or no jinja2 template, UserError without jinja2 3.1.6
    (older ones have known ways out of the sandbox).
    """

    def __init__(self, source: str, special: Mapping[str, str]):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateFailed(
                f"the chat template has {len(source):,} characters, more than "
                f"{MAX_TEMPLATE_CHARACTERS:,}"
            )
        self.source = source
        self.marks_targets = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special = {name: str(value) for name, value in special.items()}
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except RecursionError as error:
            raise TemplateFailed("the chat template is nested too deep") from error
        except Exception as error:  # jinja2's, and Python's own while it compiles
            raise TemplateFailed(f"the chat template does not compile: {_line(error)}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, followed by what opens the assistant's next turn if asked.

        TemplateFailed with the template's own words where it fails. `check_messages` says which
        messages there may be.
        """
        return self._render(messages, add_generation_prompt)[0]

    def render_targets(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation and which of its characters are targets.

        Those within {% generation %} where the template marks them. Otherwise each assistant turn,
        its end token included: what the turn adds to the conversation before it with the opening of
        the assistant's turn. TemplateFailed where that cannot be told, because the template writes
        earlier turns in another way once later ones follow.
        """
        text, marked = self._render(messages, False)
        if self.marks_targets:
            return Rendered(text, tuple(marked))
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], add_generation_prompt=True)
            after = self.render(messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise TemplateFailed(
                    f"the chat template writes the conversation up to message {number + 1} in "
                    "another way once more follows, so that targets cannot be told: use a "
                    "template with {% generation %} marks"
                )
            spans.append((len(before), len(after)))
        return Rendered(text, tuple(spans))

    def _render(self, messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        pieces: list[str] = []
        marks: list[Span] = []
        self._environment.marks = marks  # type: ignore[attr-defined]
        self._environment.pieces = pieces  # type: ignore[attr-defined]
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._special,
        }
        length = 0
        try:
            with _time_limit(MAX_SECONDS):
                for piece in self._template.generate(variables):
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_RENDERED_CHARACTERS:
                        raise TemplateFailed(
                            f"the chat template writes more than {MAX_RENDERED_CHARACTERS:,} "
                            "characters for one conversation"
                        )
        except TemplateFailed:
            raise
        except (RecursionError, MemoryError) as error:
            kind = type(error).__name__
            raise TemplateFailed(f"the chat template fails on this conversation: {kind}") from error
        except Exception as error:  # whatever a template's expressions raise
            raise TemplateFailed(
                f"the chat template fails on this conversation: {_line(error)}"
            ) from error
        return "".join(pieces), marks


def check_messages(messages: Any) -> list[Message]:
    """The messages of a conversation (the OpenAI and Hugging Face form), if they are that.

    Each has a role of `ROLES` and text as its content; there is one at least. ValueError says which
    message is not so.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is a {type(message).__name__}, not an object")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise ValueError(f"message {number} ({role}): content is {kind}, not text")
    return messages


def load_chat_template(folder: Path, special: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template of a Hugging Face folder; None where it has none.

    chat_template.jinja comes before the field of tokenizer_config.json, as in transformers; of
    several named ones, "default" counts. Raises as `ChatTemplate`.
    """
    file, config = folder / CHAT_TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    try:
        if file.is_file():
            return ChatTemplate(read_bytes(file, MAX_TOKENIZER_CONFIG_BYTES).decode(), special)
        if not config.is_file():
            return None
        source = read_json(config, MAX_TOKENIZER_CONFIG_BYTES).get("chat_template")
    except (OSError, ValueError) as error:
        raise TemplateFailed(f"{folder}: no readable chat template: {_line(error)}") from error
    if isinstance(source, list):  # several, by name
        named = {
            each.get("name"): each.get("template") for each in source if isinstance(each, dict)
        }
        if "default" not in named:
            raise TemplateFailed(
                f"{config}: chat templates named {', '.join(map(str, named))}, none 'default'"
            )
        source = named["default"]
    if source is None:
        return None
    if not isinstance(source, str):
        raise TemplateFailed(f"{config}: chat_template is a {type(source).__name__}, not text")
    return ChatTemplate(source, special)


def _environment() -> Any:
    """The sandbox that transformers renders templates in, with bounds on what a template makes."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError(
            "a chat template needs jinja2 3.1.6 or newer: pip install 'dsv3_jax[chat]'"
        ) from error
    if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise UserError(
            f"a chat template needs jinja2 3.1.6 or newer, not {jinja2.__version__}: "
            "pip install 'dsv3_jax[chat]'"
        )

    class GenerationMarks(Extension):
        """{% generation %} ... {% endgeneration %}: the characters within are targets."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            text = caller()
            state: Any = self.environment
            start = sum(map(len, state.pieces))
            state.marks.append((start, start + len(text)))
            return text

    class Sandbox(ImmutableSandboxedEnvironment):
        """No operator makes a text or list that is out of all proportion."""

        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sized = next((x for x in (left, right) if isinstance(x, str | list | tuple)), None)
            if operator == "*" and sized is not None:
                times = next((x for x in (left, right) if isinstance(x, int)), 0)
                if len(sized) * times > MAX_RENDERED_CHARACTERS:
                    raise SecurityError("a text or list is repeated too often")
            if operator == "**" and not (abs(left) < 2**32 and abs(right) < 64):
                raise SecurityError("a power is too large")
            if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z]*\d{5}", left):
                raise SecurityError("a format is too wide")
            return super().call_binop(context, operator, left, right)

    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else min(int(indent), 64),
            separators=separators,
            sort_keys=sort_keys,
        )

    sandbox.filters["tojson"] = tojson
    for name in ("center", "indent", "wordwrap", "batch", "slice"):
        sandbox.filters[name] = _narrow(sandbox.filters[name], SecurityError)
    sandbox.globals.pop("lipsum", None)
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(str(format)[:256])
    return sandbox


def _narrow(function: Any, refusal: type[Exception]) -> Any:
    """A filter that takes no number above 4,096: widths, and counts of columns."""

    def narrow(*args: Any, **kwargs: Any) -> Any:
        numbers = [x for x in (*args, *kwargs.values()) if isinstance(x, int)]
        if any(number > 4096 for number in numbers):
            raise refusal("a filter's width is too large")
        return function(*args, **kwargs)

    # jinja2 passes its context or environment to functions that carry such marks.
    narrow.__dict__.update(function.__dict__)
    return narrow


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TemplateFailed in the block once it has computed so long; main thread only."""
    usable = threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:  # somebody else's clock stays
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateFailed(f"the chat template runs longer than {seconds:g} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    place = getattr(error, "lineno", None)
    return f"{text or type(error).__name__}" + (f" (line {place})" if place else "")
