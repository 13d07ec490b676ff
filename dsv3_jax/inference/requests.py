"""What an engine is asked for, and what has come of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.config.files import shown

MAX_STOP_IDS = 8  # of a request, the model's own included
MAX_SEED = 2**32 - 1
FinishReason = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One token that was written."""

    id: int
    logprob: float  # under the model itself: temperature 1, nothing cut
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens there, if the engine returns any


Listener = Callable[[list[Token]], bool | None]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Fields:
        prompt: token ids, at least one.
        max_new_tokens: how many to write at most.
        temperature: 0 takes the likeliest token always.
        top_p: in (0, 1]; the rest of the probability is cut off.
        seed: of the draws; the same request with the same seed gets the same text, whatever else
            the engine does.
        stop_ids: end the text, besides the model's own eos_token_id; the token is the last one.
        ignore_eos: the model's own do not end the text.
        listener: called with the new tokens as they come, from the thread that steps the engine;
            the text ends with them when it returns True.
        on_done: called with the completion once nothing more will come, from the same thread.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    listener: Listener | None = field(default=None, compare=False)
    on_done: Callable[[Completion], None] | None = field(default=None, compare=False)

    def ends(self, config: ModelConfig) -> tuple[int, ...]:
        """The ids that end this request's text."""
        own = () if self.ignore_eos else config.eos_token_ids
        return tuple(dict.fromkeys((*own, *self.stop_ids)))

    def check(self, config: ModelConfig, max_length: int) -> None:
        """Raises UserError, with the numbers, for what cannot be generated with this model."""
        check_prompt(self.prompt, config)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be positive")
        # The last token is not fed back.
        if len(self.prompt) + self.max_new_tokens - 1 > max_length:
            raise UserError(
                f"the prompt has {len(self.prompt)} tokens and {self.max_new_tokens} more are "
                f"asked for, but there is room for {max_length}"
            )
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UserError(f"temperature={self.temperature} must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed={self.seed} must lie in 0 to {MAX_SEED}")
        if len(self.ends(config)) > MAX_STOP_IDS:
            raise UserError(
                f"{len(self.ends(config))} ids end the text, the model's own included; at most "
                f"{MAX_STOP_IDS} can"
            )


def check_prompt(prompt: Any, config: ModelConfig, name: str = "the prompt") -> None:
    """Raises UserError unless a prompt is token ids of the vocabulary, at least one."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        raise UserError(f"{name} is empty")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        what = shown(prompt) if isinstance(prompt, str | float | int) else type(prompt).__name__
        what = f"{what} of {ids.dtype}{list(ids.shape)}" if ids.size > 1 else what
        raise UserError(f"{name} must be a sequence of token ids, as [1, 2, 3], not {what}")
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise UserError(
            f"{name} has token ids from {ids.min()} to {ids.max()}; the model's vocabulary is 0 to "
            f"{config.vocab_size - 1}"
        )


@dataclass(eq=False)
class Completion:
    """What has come of a request; an engine adds to it until `finish_reason` is set."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    # [n, L, K] of the prompt's tokens and the new ones but the last, if the engine returns experts.
    experts: list[Int[np.ndarray, "t L K"]] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, found in the cache
    drafted: list[int] = field(default_factory=list)  # times a draft of this position was checked
    accepted: list[int] = field(default_factory=list)  # and was the token itself
    steps: int = 0  # of decoding
    preemptions: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None  # when its first token came
    finished: float | None = None

    @property
    def ids(self) -> list[int]:
        """The new tokens' ids; one that ended the text is the last."""
        return [token.id for token in self.tokens]

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


def describe_speculation(completions: Sequence[Completion]) -> str:
    """A line: tokens a step, and how many of the drafts of each position were the model's own."""
    steps = sum(c.steps for c in completions)
    tokens = sum(max(len(c.tokens) - 1, 0) for c in completions)  # the prompt gives the first
    pairs = [
        (sum(numbers[0]), sum(numbers[1]))
        for numbers in (
            ([c.accepted[place] for c in completions], [c.drafted[place] for c in completions])
            for place in range(len(completions[0].drafted))
        )
    ]
    rates = ", ".join(f"{right / checked:.2f}" if checked else "-" for right, checked in pairs)
    return f"{tokens / max(steps, 1):.2f} tokens a step; drafts accepted, by position: {rates}"


def seed_of(seed: int, number: int) -> int:
    """The seed of request `number` where one seed is given for all."""
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative")
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
