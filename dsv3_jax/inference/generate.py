"""Generation for prompts of different lengths at once: prefill, then decode from the cache.

`State` is what there is between two steps; `start`, `choose` and `step` are what an engine calls,
and `generate` is the loop over them for a fixed set of prompts.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.kv_cache import NO_PAGE, pool_for
from dsv3_jax.inference.sampling import sample
from dsv3_jax.kernels.mla_decode.api import wants_pages
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.model.cache import AnyCache, init_model_cache, init_paged_cache
from dsv3_jax.model.decode import decode_step, prefill
from dsv3_jax.model.ends import logits_of
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import Variables
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout, serving_layouts

# Prompts are padded to a multiple, so that prompts of similar lengths share one compilation.
PROMPT_MULTIPLE = 32


def generate(
    variables: Variables,
    prompts: Sequence[Sequence[int | np.integer]],
    config: ModelConfig,
    *,
    max_new_tokens: int,
    cache_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    layout: Layout = ONE_DEVICE,
    paged: bool | None = None,
    fp8_cache: bool = False,
    expert_load: ExpertLoad | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the next token of every prompt, int32 [B], up to max_new_tokens times.

    A sequence that has ended (with any of eos_token_id) goes on with the first of these; iteration
    ends when all have. Where there are none, none ends. The cache holds cache_length tokens a
    sequence, by default what the longest needs; paged, it holds the pages that each needs, by
    default where the kernel that reads pages runs. With fp8_cache they hold latents as FP8. Raises
    UserError for an empty prompt, a token outside the vocabulary, or prompts longer than the cache.
    The layout says how to spread the work over a mesh; the tokens are those of one device, but for
    rounding. To an expert_load are added the choices of all tokens fed: the prompts', and those of
    new tokens until their sequence ends.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache_length = _checked_cache_length(prompts, lengths, config, max_new_tokens, cache_length)
    if paged is None:
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        paged = fp8_cache or (layout.one_device and wants_pages(*widths, config.dtype))
    if fp8_cache and not paged:
        raise UserError("an FP8 cache lies in pages: leave paged=False out")
    of_prompts, of_steps = (Pass(config, layout=each) for each in serving_layouts(layout))
    count, multiple = len(prompts), PROMPT_MULTIPLE
    if not layout.one_device:
        variables = jax.device_put(variables, shardings(variables, of_prompts.layout))
        multiple = math.lcm(multiple, 2 * layout.size("seq"))
        # Whole pages on every device, which kernels read.
        whole = math.lcm(multiple, PAGE * layout.size("cache"))
        cache_length = -(-cache_length // whole) * whole
        # Every device needs as many sequences as the others: copies of the first ones.
        lengths = np.resize(lengths, count + -count % layout.size("batch"))
    padded_length = min(-(-lengths.max() // multiple) * multiple, cache_length)
    padded = np.zeros((len(lengths), padded_length), np.int32)
    for number, row in enumerate(padded):
        row[: lengths[number]] = prompts[number % count]
    real = np.arange(len(lengths)) < count  # not the copies

    def counted(whether):
        """The load of these tokens is wanted, if one is to be added up."""
        return None if expert_load is None else whether & real[:, None]

    room = [min(n + max_new_tokens - 1, cache_length) for n in lengths.tolist()]
    room = room if paged else [cache_length] * len(room)
    cache = empty_cache(config, room, paged, fp8_cache, of_steps.layout)
    in_prompt = np.arange(padded_length) < lengths[:, None]
    state = start(variables, padded, lengths, cache, of_prompts, counted(in_prompt))
    key, ends, ended = jax.random.key(seed), config.eos_token_ids, np.zeros(count, bool)
    for number in range(max_new_tokens):
        if expert_load is not None:
            expert_load.add(state.load)
        tokens = choose(
            variables["params"],
            state.hidden[:count],
            jax.random.fold_in(key, number),
            temperature,
            top_p,
            of_steps.layout,
        )
        ids = np.where(ended, ends[0] if ends else 0, np.asarray(tokens))
        yield ids
        ended |= np.isin(ids, ends)
        if ended.all() or number + 1 == max_new_tokens:
            return
        fed, going_on = (np.resize(each, len(lengths))[:, None] for each in (ids, ~ended))
        state = step(variables, state, fed, of_steps, counted(going_on))


class State(NamedTuple):
    """Sequences in a cache between two steps."""

    cache: AnyCache
    lengths: Int[Array, " B"]  # tokens of each in the cache
    hidden: Float[Array, "B D"]  # of the last of them, after the final norm
    load: Int[Array, "L E"] | None = None  # of the counted tokens of the last step alone


@partial(jax.jit, static_argnames="how", donate_argnames="cache")
def start(
    variables: Variables,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: AnyCache,
    how: Pass,
    counted: Bool[Array, "B T"] | None = None,
) -> State:
    """The state after prompts of so many tokens, padded at the end; takes over an empty cache.

    The Pass has a layout for prompts, see `serving_layouts`. The load is that of the counted
    tokens; without any it is None.
    """
    hidden, cache, load = prefill(variables, ids, cache, how, counted)
    last = hidden[jnp.arange(len(lengths)), lengths - 1]
    return _state(cache, lengths, last, load if counted is not None else None, how)


@partial(jax.jit, static_argnames="how", donate_argnames="state")
def step(
    variables: Variables,
    state: State,
    ids: Int[Array, "B 1"],
    how: Pass,
    counted: Bool[Array, "B 1"] | None = None,
) -> State:
    """The state after one more token of each sequence; takes over the one before.

    The Pass has a layout for decoding, see `serving_layouts`.
    """
    hidden, cache, load = decode_step(variables, ids, state.lengths, state.cache, how, counted)
    load = load if counted is not None else None
    return _state(cache, state.lengths + 1, hidden[:, 0], load, how)


def _state(cache, lengths, hidden, load, how: Pass) -> State:
    # Pinned, so that a step's state lies where the one before did, whose memory it takes.
    lengths, hidden = (how.layout.constrain(x, "batch") for x in (lengths, hidden))
    return State(cache, lengths, hidden, None if load is None else how.layout.constrain(load))


@partial(jax.jit, static_argnames="layout")
def choose(
    params: Variables,
    hidden: Float[Array, "B D"],
    key: PRNGKeyArray,
    temperature: float | Float[Array, ""],
    top_p: float | Float[Array, ""],
    layout: Layout = ONE_DEVICE,
) -> Int[Array, " B"]:
    """The next token of each sequence, by `sample`, whole on every device and so for every host."""
    logits = logits_of(params, layout.constrain(hidden))
    return layout.constrain(sample(logits, key, temperature, top_p))


def empty_cache(
    config: ModelConfig, room: Sequence[int], paged: bool, fp8: bool, layout: Layout = ONE_DEVICE
) -> AnyCache:
    """A cache with room for so many tokens of each sequence, where the layout wants it.

    Contiguous, all sequences have the first one's room; paged, each has its own pages.
    """
    if not paged:
        make = partial(init_model_cache, config, len(room), room[0])
        return layout.make(make, layout.sharding(None, "batch", "cache"))
    # Every device has a pool for its own sequences, all of one size.
    devices = layout.size("batch")
    pools = [pool_for(part.tolist(), PAGE) for part in np.split(np.array(room), devices)]
    pages = max(int(pool.table.max()) + 1 for pool in pools)
    width = max(pool.table.shape[1] for pool in pools)
    table = np.concatenate(
        [
            np.pad(p.table, [(0, 0), (0, width - p.table.shape[1])], constant_values=NO_PAGE)
            for p in pools
        ]
    )
    make = partial(init_paged_cache, config, table, pages * devices, PAGE, fp8)
    return layout.make(make, layout.sharding("batch"))


def _checked_cache_length(prompts, lengths, config: ModelConfig, max_new_tokens, cache_length):
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(
                f"prompt {number} has token ids from {min(prompt)} to {max(prompt)}; the model's "
                f"vocabulary is 0 to {config.vocab_size - 1}"
            )
    needed = int(lengths.max()) + max_new_tokens - 1  # the last token is not fed back
    limit = config.max_position_embeddings
    cache_length = min(needed, limit) if cache_length is None else cache_length
    if needed > cache_length:
        raise UserError(
            f"the longest prompt has {lengths.max()} tokens and {max_new_tokens} more are asked "
            f"for, but the cache holds {cache_length}: shorten the prompt, ask for fewer tokens, "
            f"or raise the cache length (at most max_position_embeddings={limit})"
        )
    if cache_length > limit:
        raise UserError(f"cache length {cache_length} exceeds max_position_embeddings={limit}")
    return cache_length
