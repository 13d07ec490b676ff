"""Generation for prompts of different lengths at once: prefill, then decode from the cache."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.kv_cache import NO_PAGE, pool_for
from dsv3_jax.inference.sampling import sample
from dsv3_jax.kernels.mla_decode.api import wants_pages
from dsv3_jax.kernels.mla_decode.schedule import PAGE
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
    prompts: Sequence[Sequence[int]],
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
    count, multiple = len(prompts), PROMPT_MULTIPLE
    prefill_layout, decode_layout = serving_layouts(layout)
    if not layout.one_device:
        variables = jax.device_put(variables, shardings(variables, prefill_layout))
        multiple = math.lcm(multiple, 2 * prefill_layout.size("seq"))
        # Whole pages on every device, which kernels read.
        whole = math.lcm(multiple, PAGE * prefill_layout.size("cache"))
        cache_length = -(-cache_length // whole) * whole
        # Every device needs as many sequences as the others.
        copies = np.arange(count + -count % prefill_layout.size("batch")) % count
        prompts, lengths = [prompts[int(i)] for i in copies], lengths[copies]
    padded_length = min(-(-lengths.max() // multiple) * multiple, cache_length)
    padded = np.zeros((len(prompts), padded_length), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt

    key = jax.random.key(seed)
    if paged is None:
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        paged = fp8_cache or (layout.one_device and wants_pages(*widths, config.dtype))
    if fp8_cache and not paged:
        raise UserError("an FP8 cache lies in pages: leave paged=False out")
    room = [min(n + max_new_tokens - 1, cache_length) for n in lengths.tolist()]
    room = room if paged else [cache_length] * len(room)
    cache = _empty_cache(config, room, paged, fp8_cache, decode_layout)
    real = np.arange(len(prompts)) < count  # not the copies
    counted = None
    if expert_load is not None:
        counted = (np.arange(padded_length) < lengths[:, None]) & real[:, None]
    how = Pass(config, layout=prefill_layout)
    hidden, cache, load = _prefill(variables, padded, counted, cache, how)
    if expert_load is not None:
        expert_load.add(load)
    hidden = hidden[np.arange(len(prompts)), lengths - 1]
    how = Pass(config, layout=decode_layout)
    ends = config.eos_token_ids
    ended = np.zeros(count, bool)
    for step in range(max_new_tokens):
        tokens = _next_token(
            variables["params"],
            hidden[:count],
            jax.random.fold_in(key, step),
            temperature,
            top_p,
            decode_layout,
        )
        ids = np.where(ended, ends[0] if ends else 0, np.asarray(tokens))
        yield ids
        ended |= np.isin(ids, ends)
        if ended.all() or step + 1 == max_new_tokens:
            return
        fed = np.resize(ids, len(prompts))[:, None]  # the copies again
        start = lengths + step
        if expert_load is not None:
            counted = np.resize(~ended, len(prompts))[:, None] & real[:, None]
        hidden, cache, load = _decode(variables, fed, counted, start, cache, how)
        if expert_load is not None:
            expert_load.add(load)
        hidden = hidden[:, 0]


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


def _empty_cache(
    config: ModelConfig, room: list[int], paged: bool, fp8: bool, layout: Layout
) -> AnyCache:
    """A cache with room for so many tokens of each sequence, where the layout wants it."""
    if not paged:
        make = partial(init_model_cache, config, len(room), room[0])
        return layout.make(make, None, "batch", "cache")
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
    return layout.make(make, "batch")


@partial(jax.jit, static_argnames="how", donate_argnums=3)
def _prefill(variables, tokens, counted, cache, how: Pass):
    filled = prefill(variables, tokens, cache, how, counted)
    return (*filled[:2], None if counted is None else filled.load)  # what nobody reads is not made


@partial(jax.jit, static_argnames="how", donate_argnums=4)
def _decode(variables, tokens, counted, start, cache, how: Pass):
    step = decode_step(variables, tokens, start, cache, how, counted)
    return (*step[:2], None if counted is None else step.load)


@partial(jax.jit, static_argnames="layout")
def _next_token(params, hidden, key, temperature, top_p, layout):
    # Whole on every device, and so for every host to read.
    logits = logits_of(params, layout.constrain(hidden))
    return layout.constrain(sample(logits, key, temperature, top_p))
