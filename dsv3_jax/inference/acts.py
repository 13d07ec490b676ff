"""The two acts that an engine has for sequences on the devices.

`feed` puts a chunk of prompts into slots, `advance` takes every open slot a step further. Tokens
are picked, drafts made and checked, and sequences closed here, so that the next act can be
launched before the host has seen what the last one wrote.
"""

import dataclasses
import inspect
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsv3_jax.inference.kv_cache import NO_PAGE
from dsv3_jax.inference.sampling import draw, log_probability
from dsv3_jax.inference.slots import Asked, Chunk, Program, Slots, Written
from dsv3_jax.inference.speculative import Drafting, Rows, agreeing, propose
from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.decode import Decoded, decode_step, prefill
from dsv3_jax.model.ends import logits_of
from dsv3_jax.model.transformer import Variables
from dsv3_jax.parallel.compiler_options import ONE_CORE_OPTIONS, overlap_options
from dsv3_jax.parallel.sharding import Layout

_of_slots = partial(jax.jit, static_argnames="program", donate_argnames="slots")


@_of_slots
def advance(
    variables: Variables, slots: Slots, table: Int[Array, "B S"], program: Program
) -> tuple[Slots, Written]:
    """Every open slot after one more step, and what it wrote: a token, and drafts that agree.

    `table` are the pages of each slot; one whose first is NO_PAGE is closed, so that the host ends
    sequences by it. A contiguous cache reads nothing else from it.
    """
    how, layout, fed = program.steps, program.steps.layout, slots.tokens
    is_open = slots.open & (table[:, 0] != NO_PAGE)
    held = jnp.where(is_open[:, None], table, NO_PAGE)
    # No rows and none seen, where a slot is closed.
    start = jnp.where(is_open, slots.lengths, -fed.shape[1])
    cache, caches = _with_pages(slots, held)
    counted = jnp.broadcast_to(is_open[:, None], fed.shape)
    out = decode_step(variables, fed, start, cache, how, counted)
    logits = logits_of(variables["params"], layout.constrain(out.hidden))
    drawn = draw(logits, slots.asked.settings, slots.number, program.sampled)
    drawn = layout.constrain(drawn)
    # The drafts that agree are written, and the token after them, up to what ends the sequence.
    made = agreeing(fed[:, 1:], drawn) + 1
    places = jnp.arange(fed.shape[1], dtype=jnp.int32)
    ending = _ends(drawn, slots.number, slots.asked)
    first_end = jnp.where(ending.any(1), jnp.argmax(ending, axis=1), fed.shape[1])
    made = jnp.where(is_open, jnp.minimum(made, first_end + 1), 0).astype(jnp.int32)
    last = jnp.maximum(made - 1, 0)
    number = slots.number + made
    newest = jnp.take_along_axis(drawn, last[:, None], axis=1)
    drafting = slots.drafting
    if drafting is not None:
        rows = Rows(out.hidden, drawn, start, last)
        drafts, drafting = propose(
            variables,
            drafting._replace(caches=caches),
            rows,
            slots.asked.settings,
            number,
            how,
            how,
            program.drafts,
            program.sampled,
        )
        newest = jnp.concatenate([newest, drafts], axis=1)
    written = jnp.where(places < made[:, None], drawn, -1)
    slots = slots._replace(
        cache=out.cache,
        drafting=drafting,
        lengths=slots.lengths + made,
        tokens=newest,
        number=number,
        open=is_open & (first_end >= made),
    )
    return _pinned(slots, layout), _written(written, drawn, logits, out, program)


def advance_of(program: Program) -> Any:
    """`advance` for this program, compiled as it wants.

    With two micro-batches XLA is told what training's overlap is, and of a small model on a CPU to
    keep each operation on one core.
    """
    steps = program.steps
    options = overlap_options(steps.layout.platform) if steps.micro_batches == 2 else {}
    if program.small:
        options = ONE_CORE_OPTIONS
    return _advance_told(tuple(options.items())) if options else advance


@cache
def _advance_told(options: tuple[tuple[str, Any], ...]) -> Any:
    return _of_slots(inspect.unwrap(advance), compiler_options=dict(options))


@partial(jax.jit, static_argnames=("program", "fresh"), donate_argnames="slots")
def feed(
    variables: Variables,
    slots: Slots,
    table: Int[Array, "R S"],
    chunk: Chunk,
    program: Program,
    fresh: bool,
) -> tuple[Slots, Written]:
    """The slots with a piece of a prompt in some of them; `table` are these slots' pages.

    A slot whose prompt ends with its piece has its first token written and is open. With `fresh`
    all pieces begin their prompts and see nothing but themselves, in the expanded form of MLA; else
    they see what the cache holds. A contiguous cache takes fresh pieces of all slots, in order.
    """
    how, layout = program.steps, program.steps.layout
    count = len(slots.lengths)
    here = chunk.slot < count
    held = jnp.where(here[:, None], table, NO_PAGE)
    cache, caches = _with_pages(slots, held)
    counted = (jnp.arange(chunk.ids.shape[1]) < chunk.valid[:, None]) & here[:, None]
    if fresh:
        how, start = dataclasses.replace(program.prompts, prefill=True), jnp.zeros_like(chunk.start)
        out = prefill(variables, chunk.ids, cache, program.prompts, counted)
    else:
        start = jnp.where(here, chunk.start, -chunk.ids.shape[1])
        out = decode_step(variables, chunk.ids, start, cache, how, counted)
    rows, last = jnp.arange(len(chunk.slot)), chunk.valid - 1
    hidden = layout.constrain(out.hidden[rows, last])[:, None]
    logits = logits_of(variables["params"], hidden)
    drawn = draw(logits, chunk.asked.settings, chunk.number, program.sampled)
    drawn = layout.constrain(drawn)
    number = chunk.number + 1
    newest, drafting = drawn, slots.drafting
    if drafting is not None:
        following = jnp.roll(chunk.ids, -1, axis=1)
        following = following.at[rows, last].set(
            jnp.where(chunk.last, drawn[:, 0], chunk.following)
        )
        carried = tuple(x[jnp.minimum(chunk.slot, count - 1)] for x in drafting.carried)
        drafts, of_rows = propose(
            variables,
            Drafting(caches, carried),
            Rows(out.hidden, following, start, last),
            chunk.asked.settings,
            number,
            how,
            program.steps,
            program.drafts,
            program.sampled,
        )
        newest = jnp.concatenate([newest, drafts], axis=1)
        carried = [_put(a, chunk.slot, b) for a, b in zip(drafting.carried, of_rows.carried)]
        drafting = Drafting(of_rows.caches, tuple(carried))
    is_open = chunk.last & ~_ends(drawn, chunk.number, chunk.asked)[:, 0]
    slots = slots._replace(
        cache=out.cache,
        drafting=drafting,
        lengths=_put(slots.lengths, chunk.slot, chunk.start + chunk.valid),
        tokens=_put(slots.tokens, chunk.slot, newest),
        number=_put(slots.number, chunk.slot, number),
        open=_put(slots.open, chunk.slot, is_open),
        asked=jax.tree.map(lambda a, b: _put(a, chunk.slot, b), slots.asked, chunk.asked),
    )
    written = jnp.where((here & chunk.last)[:, None], drawn, -1)
    return _pinned(slots, layout), _written(written, drawn, logits, out, program)


@partial(jax.jit, donate_argnames="slots")
def copy_page(slots: Slots, source: Int[Array, ""], to: Int[Array, ""]) -> Slots:
    """The slots with one page of every pool copied onto another; on one device."""

    def copied(cache: LatentCache | PagedCache) -> PagedCache:
        assert isinstance(cache, PagedCache)
        pages = cache.k_rope.shape[0] // cache.layers
        first = pages * jnp.arange(cache.layers, dtype=jnp.int32)

        def copy(pool):
            return pool.at[first + to].set(pool[first + source])

        latent, k_rope = jax.tree.map(copy, (cache.latent, cache.k_rope))
        return dataclasses.replace(cache, latent=latent, k_rope=k_rope)

    drafting = slots.drafting
    if drafting is not None:
        drafting = drafting._replace(caches=tuple(map(copied, drafting.caches)))
    assert isinstance(slots.cache, PagedCache)
    return slots._replace(cache=copied(slots.cache), drafting=drafting)


def _with_pages(slots: Slots, held):
    """The model's cache and the MTP modules', as sequences with these pages see them."""
    caches = () if slots.drafting is None else slots.drafting.caches
    if not isinstance(slots.cache, PagedCache):
        return slots.cache, caches
    return _tabled((slots.cache, caches), held)


def _tabled(caches: Any, table: Int[Array, "B S"]) -> Any:
    """A tree of caches with this table in each."""
    paged = lambda x: isinstance(x, PagedCache)  # noqa: E731
    return jax.tree.map(lambda x: x.with_table(table) if paged(x) else x, caches, is_leaf=paged)


def _ends(drawn: Int[Array, "B T"], number: Int[Array, " B"], asked: Asked) -> Bool[Array, "B T"]:
    """Whether a sequence ends with each of these tokens, the first being token number[b]."""
    by_id = (drawn[..., None] == asked.ends[:, None]).any(-1)
    count = number[:, None] + 1 + jnp.arange(drawn.shape[1], dtype=number.dtype)
    return by_id | (count >= asked.limit[:, None])


def _put(array: Array, slot: Int[Array, " R"], rows: Array) -> Array:
    return array.at[slot].set(rows.astype(array.dtype), mode="drop")


def _pinned(slots: Slots, layout: Layout) -> Slots:
    """Where the slots before lay, whose memory these take; a table is the next act's to give."""
    cache, drafting = slots.cache, slots.drafting
    if isinstance(cache, PagedCache):
        no_table = jnp.zeros((len(slots.lengths), 0), jnp.int32)
        cache, drafting = _tabled((cache, drafting), no_table)
    of_batch = slots._replace(cache=None, drafting=None)
    of_batch = layout.constrain(of_batch, "batch")
    if drafting is not None:
        drafting = drafting._replace(carried=layout.constrain(drafting.carried, "batch"))
    return of_batch._replace(cache=cache, drafting=drafting)


def _written(tokens, drawn, logits, out: Decoded, program: Program) -> Written:
    layout, top = program.steps.layout, None
    if program.top:
        values, ids = jax.lax.top_k(logits, program.top)
        top = (ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    written = Written(
        tokens,
        log_probability(logits, drawn),
        top,
        out.experts if program.experts else None,
        out.load if program.load else None,
    )
    return layout.constrain(written)
