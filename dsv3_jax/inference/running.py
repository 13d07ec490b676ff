"""Requests on their way through an engine, as the host knows them, and what it launched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.inference.kv_cache import NO_PAGE
from dsv3_jax.inference.requests import MAX_STOP_IDS, Completion, Token
from dsv3_jax.inference.sampling import Settings
from dsv3_jax.inference.slots import Asked, Chunk, Written


@dataclass(eq=False)
class Running:
    """A request on its way, as the host knows it."""

    completion: Completion
    ids: list[int]  # the prompt and what was written
    ends: tuple[int, ...] = ()  # the ids that end it
    slot: int = NO_PAGE
    fed: int = 0  # of the prompt's tokens, launched or shared
    prompt: int = 0  # tokens to feed before it writes: those that ids had when it was admitted
    rows: int = 0  # in the cache for certain, once what is launched has run
    room: int = 0  # rows that its pages hold
    flights: int = 0  # steps launched and not read
    promised: int = 0  # tokens it will have at the least, once what is launched has run

    @property
    def writing(self) -> bool:
        """Whether its prompt is in the cache, or on its way there."""
        return self.slot != NO_PAGE and self.fed == self.prompt

    @property
    def unfinished(self) -> bool:
        """Whether it is writing and what is launched may leave it short of the tokens asked for."""
        return self.writing and self.promised < self.completion.request.max_new_tokens


class Piece(NamedTuple):
    """A sequence's part of an act: its row and, of a chunk, the positions of the tokens fed."""

    row: int
    sequence: Running
    first: int = 0
    count: int = 0


@dataclass(eq=False)
class Flight:
    """An act that was launched and not read."""

    written: Written
    pieces: list[Piece]
    is_step: bool  # else a chunk
    of_this_step: bool = True


def chunk_of(chosen: Sequence[Running | None], rows: int, size: int, nobody: int) -> Chunk:
    """The next piece of each of these prompts, in programs of so many rows; None: slot `nobody`."""
    ids = np.zeros((rows, size), np.int32)
    slot = np.full(rows, nobody, np.int32)
    start, following, number, limit, seed = np.zeros((5, rows), np.int32)
    valid, last = np.ones(rows, np.int32), np.zeros(rows, bool)
    temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    seed, ends = seed.astype(np.uint32), np.full((rows, MAX_STOP_IDS), -1, np.int32)
    for row, sequence in enumerate(chosen):
        if sequence is None:
            continue
        request, first = sequence.completion.request, sequence.fed
        piece = sequence.ids[first : first + size]
        ids[row, : len(piece)], valid[row] = piece, len(piece)
        slot[row], start[row] = sequence.slot, first
        last[row] = first + len(piece) == sequence.prompt
        if not last[row]:
            following[row] = sequence.ids[first + len(piece)]
        number[row] = len(sequence.completion.tokens)
        limit[row], seed[row] = request.max_new_tokens, request.seed
        temperature[row], top_p[row] = request.temperature, request.top_p
        ends[row, : len(sequence.ends)] = sequence.ends
    # NumPy's: to one of several processes they are the same on every device.
    arrays: Any = (slot, ids, start, valid, following, last, number)
    settings: Any = (temperature, top_p, seed)
    others: Any = (limit, ends)
    return Chunk(*arrays, asked=Asked(Settings(*settings), *others))


def tokens_of(written: Any, row: int) -> list[Token]:
    """The tokens that an act wrote in a row; `written` is on the host, its arrays as lists."""
    ids = written.tokens[row]
    made = next((place for place, token_id in enumerate(ids) if token_id < 0), len(ids))
    if written.top is None:
        return [Token(*pair) for pair in zip(ids[:made], written.logprobs[row])]
    tops = (tuple(zip(*likeliest)) for likeliest in zip(*(each[row] for each in written.top)))
    return [Token(*triple) for triple in zip(ids[:made], written.logprobs[row], tops)]
