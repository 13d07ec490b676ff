"""Continuous batching: requests come and go while others are written, over one pool of pages.

A step launches at most two programs, a chunk of prompts (`acts.feed`) and one more step of every
sequence (`acts.advance`), and then reads what the step *before* wrote: the devices never wait for
the host. What the host decides, it decides from what it has read; what it does not know yet (how
many drafts agreed, who has ended) the devices do by themselves, and pages are reserved for the most
it could be. Nothing is decided by the clock, so several processes decide alike.

Prompts come in chunks under a budget of tokens, sequences that begin alike share pages, and when
pages run out the youngest sequence goes back to the queue and is computed again later: its text
stays the same.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.inference.acts import advance_of, copy_page, feed
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.kv_cache import NO_PAGE, OutOfPages, PagePool
from dsv3_jax.inference.options import EngineOptions, Statistics
from dsv3_jax.inference.requests import Completion, FinishReason, Request
from dsv3_jax.inference.running import Flight, Piece, Running, chunk_of, tokens_of
from dsv3_jax.inference.slots import Program, empty_slots, pools_of
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.placement import held_for_steps
from dsv3_jax.model.transformer import Variables
from dsv3_jax.model.unstacked import has_unstacked
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout, serving_layouts


class Engine:
    """Serves requests with one model; `step` from one thread, `submit` and `cancel` from any."""

    def __init__(
        self,
        variables: Variables,
        config: ModelConfig,
        options: EngineOptions,
        layout: Layout = ONE_DEVICE,
        expert_load: ExpertLoad | None = None,
    ):
        options.check(config, layout)
        if layout.one_device:  # a longer piece would be padding
            chunks = {min(size, options.max_length) for size in options.chunks}
            options = replace(options, chunks=tuple(sorted(chunks)))
        self.config, self.options, self.expert_load = config, options, expert_load
        # What ends a text is decided here, on the host: other ids are the same programs.
        endless = replace(config, eos_token_id=())
        prompts, steps = (Pass(endless, layout=each) for each in serving_layouts(layout))
        steps = replace(steps, micro_batches=options.micro_batches)
        self._groups, self._alone = layout.size("batch"), layout.one_device
        self.variables = held_for_steps(variables, prompts.layout)
        unstacked = has_unstacked(self.variables["params"])
        program = partial(
            Program,
            prompts,
            steps,
            drafts=options.drafts,
            top=options.top,
            small=unstacked,
            experts=options.experts,
            load=expert_load is not None,
        )
        self._programs = {sampled: program(sampled=sampled) for sampled in (False, True)}
        self.pools, most = pools_of(options, layout)
        pages = sum(pool.pages for pool in self.pools)
        self._slots = empty_slots(config, options, pages, most, steps.layout, unstacked)
        self._sequences: dict[int, Running] = {}  # by slot, in the order of admission
        self._arrived: deque[Running] = deque()  # from any thread
        self._waiting: deque[Running] = deque()
        self._cancelled: deque[Completion] = deque()
        self._flying: deque[Flight] = deque()
        self._table: Any = None  # as the devices have it; None: it has changed
        self.statistics = Statistics(drafted=[0] * options.drafts, accepted=[0] * options.drafts)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that this engine can never finish."""
        request.check(self.config, self.options.max_length)
        pool, most = self.pools[0], self._most_rows(request)
        if -(-most // pool.page) > pool.pages:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_new_tokens} more "
                f"are asked for, but all {pool.pages} pages hold {pool.pages * pool.page}"
            )

    def submit(self, request: Request) -> Completion:
        """Queues a request; raises as `check`."""
        self.check(request)
        completion = Completion(request)
        completion.drafted, completion.accepted = ([0] * self.options.drafts for _ in range(2))
        self._arrived.append(Running(completion, [*request.prompt], request.ends(self.config)))
        return completion

    def cancel(self, completion: Completion) -> None:
        """Ends a request with the tokens it has; its pages come back with the next step."""
        self._cancelled.append(completion)

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions of these requests, all done."""
        completions = [self.submit(request) for request in requests]
        while not all(completion.done for completion in completions):
            self.step()
        if not self._sequences and self._flying:  # launched before the end was known
            self.step()
        return completions

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        queues = (self._arrived, self._waiting, self._flying, self._cancelled)
        return bool(self._sequences) or any(queues)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._sequences)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting) + len(self._arrived)

    def step(self) -> None:
        """Launches what is next, and reads what the step before wrote."""
        began = perf_counter()
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        self._drop_cancelled()
        self._admit()
        launched = self._launch_chunk()
        launched |= self._launch_step()
        waited = 0.0
        while self._flying and not (launched and self._flying[0].of_this_step):
            waited += self._read()
        for flight in self._flying:
            flight.of_this_step = False
        self.statistics.host_seconds += perf_counter() - began - waited

    def warm_up(self) -> None:
        """Compiles all programs that this engine may need, by running each on no sequence."""
        for program in self._programs.values():
            for rows in self.options.chunk_rows:
                for size in self.options.chunks:
                    for fresh in (True, False) if self.options.paged else (True,):
                        table = np.full((rows, self._width), NO_PAGE, np.int32)
                        chunk = chunk_of([], rows, size, self.options.slots)
                        args = (self.variables, self._slots, table, chunk, program)
                        self._slots, _ = feed(*args, fresh)
            nobody = np.full((self.options.slots, self._width), NO_PAGE, np.int32)
            table = jax.device_put(nobody) if self._alone else nobody
            self._slots, _ = advance_of(program)(self.variables, self._slots, table, program)
        if self._copies:
            self._slots = copy_page(self._slots, *np.zeros((2,), np.int32))
        jax.block_until_ready(self._slots.lengths)

    # What there is

    @property
    def _width(self) -> int:
        return self.pools[0].table.shape[1]

    @property
    def _copies(self) -> bool:
        """Whether a page may be shared in part, by copying it."""
        return self._shares and self._groups == 1

    @property
    def _shares(self) -> bool:
        options = self.options
        return options.paged and options.share_prefixes and not options.experts

    def _pool(self, slot: int) -> tuple[PagePool, int]:
        """The pool of a slot's devices, and the slot's number in it."""
        group, within = divmod(slot, self.options.slots // self._groups)
        return self.pools[group], within

    def _most_rows(self, request: Request) -> int:
        return self.options.most_rows(len(request.prompt), request.max_new_tokens)

    # Who gets a slot

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        here = {id(s.completion): s for s in (*self._sequences.values(), *self._waiting)}
        for _ in range(len(self._cancelled)):
            completion = self._cancelled.popleft()
            if completion.done:
                continue
            if id(completion) in here:
                self._finish(here[id(completion)], "cancelled")
            else:  # another thread has just submitted it
                self._cancelled.append(completion)

    def _admit(self) -> None:
        """Gives slots to those who wait longest, for as long as there are slots and pages."""
        if not self.options.paged and self._sequences:
            return
        while self._waiting and len(self._sequences) < self.options.slots:
            sequence = self._waiting[0]
            free = [s for s in range(self.options.slots) if s not in self._sequences]
            slot = max(free, key=lambda s: (self._pool(s)[0].free_pages, -s))
            pool, within = self._pool(slot)
            found = None
            if self._shares:
                found = pool.share(within, sequence.ids, copies=self._copies)
            try:
                pool.reserve(within, self._needed(sequence, len(sequence.ids)))
            except OutOfPages:
                pool.release(within)
                if not self._sequences and not self._flying:
                    raise AssertionError("a request alone fits the pool") from None
                return
            self._waiting.popleft()
            self._sequences[slot] = sequence
            sequence.slot, sequence.fed, sequence.prompt = slot, 0, len(sequence.ids)
            sequence.rows = sequence.flights = sequence.room = 0
            if found is not None and found.tokens:
                sequence.fed = found.tokens
                if not sequence.completion.tokens:
                    sequence.completion.cached_tokens = found.tokens
                self.statistics.cached_tokens += found.tokens
                if found.copy is not None:
                    self._slots = copy_page(self._slots, *np.array(found.copy, np.int32))
            self._table = None

    def _needed(self, sequence: Running, rows: int) -> int:
        """Rows to reserve for a sequence that has `rows` and takes one step more."""
        most = self._most_rows(sequence.completion.request)
        return min(rows + 1 + self.options.drafts + self.options.beyond, most)

    def _reserve(self, sequence: Running) -> bool:
        """Pages for one more step; False when the sequence had to give its own back."""
        pool, within = self._pool(sequence.slot)
        while True:
            rows = sequence.rows + (1 + self.options.drafts) * sequence.flights
            needed = self._needed(sequence, rows)
            if needed <= sequence.room:
                return True
            try:
                if pool.reserve(within, needed):
                    self._table = None
                sequence.room = len(pool.held(within)) * pool.page
                return True
            except OutOfPages:
                if self._flying:  # who has ended gives pages back
                    while self._flying:
                        self._read()
                    if sequence.slot == NO_PAGE:
                        return False
                    continue
            youngest = [s for s in self._sequences if self._pool(s)[0] is pool][-1]
            self._preempt(self._sequences[youngest])
            if sequence.slot == NO_PAGE:
                return False

    def _preempt(self, sequence: Running) -> None:
        """Back to the head of the queue, to be computed again from what it has written."""
        self._give_back(sequence, sequence.ids[:-1] if sequence.writing else None)
        sequence.completion.preemptions += 1
        self.statistics.preemptions += 1
        self._waiting.appendleft(sequence)

    def _finish(self, sequence: Running, reason: FinishReason) -> None:
        completion = sequence.completion
        if sequence.slot == NO_PAGE:
            self._waiting.remove(sequence)
        else:
            self._give_back(sequence, sequence.ids[:-1] if sequence.writing else None)
        completion.finished = perf_counter()
        self.statistics.requests[reason] += 1
        completion.finish_reason = reason
        if completion.request.on_done is not None:
            completion.request.on_done(completion)

    def _give_back(self, sequence: Running, held: Sequence[int] | None) -> None:
        """Frees a slot whose rows hold these tokens."""
        pool, within = self._pool(sequence.slot)
        if held is not None and self._shares:
            pool.remember(within, held, partly=True)
        pool.release(within)
        del self._sequences[sequence.slot]
        sequence.slot, self._table = NO_PAGE, None

    # What is launched

    def _launch_chunk(self) -> bool:
        options = self.options
        hungry = [s for s in self._sequences.values() if s.fed < s.prompt]
        if not hungry:
            return False
        writing = len(self._sequences) - len(hungry)
        fresh = hungry[0].fed == 0
        alike = [s for s in hungry if (s.fed == 0) == fresh]
        rows = next((n for n in options.chunk_rows if n >= len(alike)), options.chunk_rows[-1])
        chosen = self._spread(alike, rows)
        longest = max(s.prompt - s.fed for s in chosen if s is not None)
        size = options.size_of_chunk(longest, rows, writing)
        chunk = chunk_of(chosen, rows, size, options.slots)
        table = np.full((rows, self._width), NO_PAGE, np.int32)
        for row, sequence in enumerate(chosen):
            if sequence is not None:
                pool, within = self._pool(sequence.slot)
                table[row] = pool.table[within]
        program = self._program(s for s in chosen if s is not None)
        args = (self.variables, self._slots, table, chunk, program)
        self._slots, written = feed(*args, fresh)
        pieces = []
        for row, sequence in enumerate(chosen):
            if sequence is None:
                continue
            taken = int(chunk.valid[row])
            sequence.fed += taken
            self.statistics.prompt_tokens += taken
            pieces.append(Piece(row, sequence, sequence.fed - taken, taken))
            if sequence.writing:
                sequence.rows, self._table = sequence.prompt, None
                sequence.promised = len(sequence.completion.tokens) + 1
                if self._shares:
                    pool, within = self._pool(sequence.slot)
                    pool.remember(within, sequence.ids)
        self.statistics.chunks += 1
        self._fly(Flight(written, pieces, is_step=False))
        return True

    def _spread(self, sequences: list[Running], rows: int) -> list[Running | None]:
        """One sequence or none for each row; a row's devices are those of its sequence."""
        chosen: list[Running | None] = [None] * rows
        if not self.options.paged:  # every slot's row is its own
            for sequence in sequences:
                chosen[sequence.slot] = sequence
            return chosen
        in_group, slots = rows // self._groups, self.options.slots // self._groups
        for group in range(self._groups):
            mine = [s for s in sequences if s.slot // slots == group][:in_group]
            chosen[group * in_group : group * in_group + len(mine)] = mine
        return chosen

    def _launch_step(self) -> bool:
        if self.options.paged:
            for sequence in [*self._sequences.values()]:
                if sequence.unfinished:
                    self._reserve(sequence)
        writing = [s for s in self._sequences.values() if s.unfinished]
        if not writing:
            return False
        if self._table is None:
            table = np.concatenate([pool.table for pool in self.pools])
            for slot, sequence in self._sequences.items():
                if not sequence.writing:
                    table[slot] = NO_PAGE
            self._table = jax.device_put(table) if self._alone else table
        program = self._program(writing)
        step = advance_of(program)
        self._slots, written = step(self.variables, self._slots, self._table, program)
        for sequence in writing:
            sequence.flights += 1
            sequence.promised += 1
        self.statistics.steps += 1
        self._fly(Flight(written, [Piece(s.slot, s) for s in writing], is_step=True))
        return True

    def _program(self, sequences: Iterable[Running]) -> Program:
        return self._programs[any(s.completion.request.temperature > 0 for s in sequences)]

    def _fly(self, flight: Flight) -> None:
        for array in jax.tree.leaves(flight.written):
            array.copy_to_host_async()
        self._flying.append(flight)

    # What is read

    def _read(self) -> float:
        """Takes in what the oldest act wrote; returns the seconds that this waited for devices."""
        flight, began = self._flying.popleft(), perf_counter()
        written: Any = jax.device_get(flight.written)
        waited = perf_counter() - began
        if self.expert_load is not None:
            self.expert_load.add(written.load)
        listed = {name: getattr(written, name) for name in ("tokens", "logprobs", "top")}
        written = written._replace(**jax.tree.map(np.ndarray.tolist, listed))
        for piece in flight.pieces:
            if not piece.sequence.completion.done:
                self._take_in(piece, written, flight.is_step)
        return waited

    def _take_in(self, piece: Piece, written: Any, is_step: bool) -> None:
        row, sequence = piece.row, piece.sequence
        completion, request = sequence.completion, sequence.completion.request
        tokens = tokens_of(written, row)
        made = len(tokens)
        first, count = piece.first, piece.count
        if is_step:
            first, count = sequence.rows, made
            sequence.rows += made
            sequence.flights -= 1
            sequence.promised += made - 1
        if written.experts is not None:
            known = sum(map(len, completion.experts))  # by a sequence that was computed before
            new = written.experts[:, row, max(known - first, 0) : count]
            completion.experts.append(np.moveaxis(new, 1, 0))
        if not made:
            return
        completion.tokens += tokens
        sequence.ids += [token.id for token in tokens]
        self.statistics.new_tokens += made
        completion.started = completion.started or perf_counter()
        completion.steps += is_step
        reason: FinishReason | None = None
        if tokens[-1].id in sequence.ends:
            reason = "stop"
        elif len(completion.tokens) >= request.max_new_tokens:
            reason = "length"
        elif is_step:  # the last step's drafts may have been cut off
            for counts in (completion, self.statistics):
                for place in range(self.options.drafts):
                    counts.drafted[place] += 1
                    counts.accepted[place] += place + 1 < made
        if request.listener is not None and request.listener(tokens):
            reason = "stop"
        if reason is not None:
            self._finish(sequence, reason)
