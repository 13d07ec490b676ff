"""Generation for a fixed set of prompts: the simple door to the engine.

`generate` yields the next token of every prompt as it comes; `complete` returns all there is to
know of each: tokens, log-probabilities, experts, why it ended.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.inference.engine import Engine, EngineOptions
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.requests import Completion, Request, check_prompt, seed_of
from dsv3_jax.kernels.mla_decode.api import wants_pages
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.model.transformer import Variables
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout

# Prompts are padded to a multiple, so that prompts of similar lengths share one compilation.
PROMPT_MULTIPLE = 32

Prompts = Sequence[Sequence[int | np.integer]]


def generate(
    variables: Variables,
    prompts: Prompts,
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
    speculative: int = 0,
    expert_load: ExpertLoad | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the next token of every prompt, int32 [B], up to max_new_tokens times.

    A sequence that has ended (with any of eos_token_id) goes on with the first of these; iteration
    ends when all have. Where there are none, none ends. The cache holds cache_length tokens a
    sequence, by default what the longest needs; paged, it holds the pages that each needs, by
    default where the kernel that reads pages runs. With fp8_cache they hold latents as FP8.
    `speculative` tokens are drafted for each step, which changes their number a step and no token.
    Raises UserError for an empty prompt, a token outside the vocabulary, or prompts longer than the
    cache. The layout says how to spread the work over a mesh; the tokens are those of one device,
    but for rounding. To an expert_load are added the choices of all tokens fed: the prompts', those
    of new tokens until their sequence ends, and those of drafts. Source: V3 report, sections 2.1.1
    (absorbed MLA) and 5.4.3 (drafts).

    >>> import dataclasses, jax, dsv3_jax as ds
    >>> tiny = dataclasses.replace(ds.load_config("tiny").model, num_hidden_layers=1, vocab_size=64)
    >>> variables = jax.jit(ds.init, static_argnums=1)(jax.random.key(0), tiny)
    >>> len([ids for ids in ds.generate(variables, [[5, 6]], tiny, max_new_tokens=3)])
    3
    """
    engine, requests = engine_for(
        variables,
        prompts,
        config,
        max_new_tokens=max_new_tokens,
        cache_length=cache_length,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        layout=layout,
        paged=paged,
        fp8_cache=fp8_cache,
        speculative=speculative,
        expert_load=expert_load,
    )
    completions = [engine.submit(request) for request in requests]
    filler = (*config.eos_token_ids, 0)[0]
    for number in range(max_new_tokens):
        while any(not c.done and len(c.tokens) <= number for c in completions):
            engine.step()
        if all(len(c.tokens) <= number for c in completions):
            return
        ids = [c.tokens[number].id if number < len(c.tokens) else filler for c in completions]
        yield np.array(ids, np.int32)


def complete(
    variables: Variables,
    prompts: Prompts,
    config: ModelConfig,
    *,
    max_new_tokens: int,
    experts: bool = False,
    **options,
) -> list[Completion]:
    """The completion of every prompt: its tokens with their log-probabilities, and why it ended.

    Options are those of `generate`. With `experts` each also has the experts of every token fed,
    int32 [n, L, K] in pieces: concatenated, they are the prompt's tokens' and those of the new
    tokens but the last, which is not fed. `forward(experts=...)` routes by them again.
    """
    engine, requests = engine_for(
        variables, prompts, config, max_new_tokens=max_new_tokens, experts=experts, **options
    )
    return engine.run(requests)


def engine_for(
    variables: Variables,
    prompts: Prompts,
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
    speculative: int = 0,
    experts: bool = False,
    expert_load: ExpertLoad | None = None,
) -> tuple[Engine, list[Request]]:
    """An engine with exactly the room that these prompts need, and their requests."""
    cache_length = _checked_cache_length(prompts, config, max_new_tokens, cache_length)
    if paged is None:
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        paged = fp8_cache or (layout.one_device and wants_pages(*widths, config.dtype))
    multiple, slots = PROMPT_MULTIPLE, len(prompts)
    if not layout.one_device:
        multiple = math.lcm(multiple, 2 * layout.size("seq"))
        # Every device needs as many sequences as the others.
        slots += -slots % layout.size("batch")
    longest = max(map(len, prompts))
    padded = -(-longest // multiple) * multiple
    if not paged and layout.one_device:
        padded = min(padded, cache_length)
    options = EngineOptions(
        slots=slots,
        max_length=cache_length,
        chunks=(padded,),
        chunk_rows=(slots,),
        token_budget=slots * padded,
        drafts=speculative,
        paged=paged,
        fp8_cache=fp8_cache,
        share_prefixes=False,
        experts=experts,
        page=PAGE,
    )
    if paged:  # what each prompt needs, not what all could
        needs = [-(-options.most_rows(len(p), max_new_tokens) // PAGE) for p in prompts]
        in_group = slots // layout.size("batch")
        groups = [needs[i : i + in_group] for i in range(0, slots, in_group)]
        options = replace(options, pages=max(map(sum, groups)))
    engine = Engine(variables, config, options, layout, expert_load)
    requests = [
        Request(
            prompt=tuple(map(int, prompt)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed_of(seed, number),
        )
        for number, prompt in enumerate(prompts)
    ]
    return engine, requests


def _checked_cache_length(prompts: Prompts, config: ModelConfig, max_new_tokens, cache_length):
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, config, f"prompt {number}")
    if not len(prompts):
        raise UserError("there is no prompt: one is [[1, 2, 3]]")
    longest = max(map(len, prompts))
    needed = longest + max_new_tokens - 1  # the last token is not fed back
    limit = config.max_position_embeddings
    cache_length = min(needed, limit) if cache_length is None else cache_length
    if needed > cache_length:
        raise UserError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} more are asked "
            f"for, but the cache holds {cache_length}: shorten the prompt, ask for fewer tokens, "
            f"or raise the cache length (at most max_position_embeddings={limit})"
        )
    if cache_length > limit:
        raise UserError(f"cache length {cache_length} exceeds max_position_embeddings={limit}")
    return cache_length
