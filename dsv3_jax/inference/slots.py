"""Sequences between two steps, as they lie on the devices, and what an act takes and returns."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.kv_cache import PagePool
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import MAX_STOP_IDS
from dsv3_jax.inference.sampling import Settings
from dsv3_jax.inference.speculative import Drafting
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.model.cache import (
    AnyCache,
    LatentCache,
    ModelCache,
    init_cache,
    init_model_cache,
    init_paged_cache,
)
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.unstacked import unstack
from dsv3_jax.parallel.sharding import Layout


@dataclass(frozen=True)
class Program:
    """What is static in both acts.

    Fields:
        prompts, steps: the passes, with the layouts of `serving_layouts`.
        drafts: how many tokens are drafted for a step.
        sampled: whether any sequence has a temperature; without, picking is an argmax.
        top: how many of the likeliest tokens are returned with each.
        small: whether this is a model on a CPU whose layers are Unstacked.
        experts, load: whether each token's experts and the load of each expert are returned.
    """

    prompts: Pass
    steps: Pass
    drafts: int = 0
    sampled: bool = True
    top: int = 0
    small: bool = False
    experts: bool = False
    load: bool = False


class Asked(NamedTuple):
    """What a request asks for, by sequence."""

    settings: Settings
    limit: Int[Array, " B"]  # tokens to write
    ends: Int[Array, "B E"]  # ids that end it; -1 for none


class Slots(NamedTuple):
    """A batch of sequences; what slots that are not open hold means nothing."""

    cache: AnyCache
    drafting: Drafting | None
    lengths: Int[Array, " B"]  # rows in the cache
    tokens: Int[Array, "B T"]  # the newest token, not in the cache yet, and drafts of the next ones
    number: Int[Array, " B"]  # tokens written
    open: Bool[Array, " B"]
    asked: Asked


class Chunk(NamedTuple):
    """A piece of a prompt for each of R slots; a slot that does not exist stands for none."""

    slot: Int[Array, " R"]
    ids: Int[Array, "R T"]  # padded at the end
    start: Int[Array, " R"]  # rows that the slot has before
    valid: Int[Array, " R"]  # tokens that are no padding, at least one
    following: Int[Array, " R"]  # the token after the piece, where there is one
    last: Bool[Array, " R"]  # the prompt ends with it
    number: Int[Array, " R"]  # tokens written before, by a sequence that comes back
    asked: Asked


class Written(NamedTuple):
    """What an act returns to the host, the same on every device."""

    tokens: Int[Array, "B T"]  # -1 where none was written
    logprobs: Float[Array, "B T"]
    top: tuple[Int[Array, "B T N"], Float[Array, "B T N"]] | None
    experts: Int[Array, "L B T K"] | None  # of the tokens fed
    load: Int[Array, "L E"] | None


def pools_of(options: EngineOptions, layout: Layout) -> tuple[list[PagePool], int]:
    """A pool for each group of devices that shares sequences, and the rows of a sequence.

    A contiguous cache has one page for each slot, which holds as many rows as a sequence may have.
    """
    groups, most = layout.size("batch"), options.max_length + options.beyond
    in_group = options.slots // groups
    if options.paged:
        width = -(-most // options.page)
        pages = options.pages or in_group * width
        return [PagePool(pages, in_group, width, options.page) for _ in range(groups)], most
    if not layout.one_device:
        # Whole pages on every device, which kernels read, and room for a padded prompt.
        whole = PAGE * layout.size("cache")
        most = -(-max(most, *options.chunks) // whole) * whole
    return [PagePool(in_group, in_group, 1, most) for _ in range(groups)], most


def empty_slots(
    config: ModelConfig,
    options: EngineOptions,
    pages: int,
    length: int,
    layout: Layout,
    unstacked: bool = False,
) -> Slots:
    """All slots closed, and caches for them: so many pages, or contiguous rows for `length` tokens.

    Each MTP module that drafts has a cache of its own, with the same pages. Contiguous rows lie
    Unstacked where the model's layers do.
    """
    count, drafts = options.slots, options.drafts
    modules = min(drafts, config.num_nextn_predict_layers)

    def where(*dims):
        return layout.sharding(*dims) if layout.has_devices else None

    if options.paged:
        table, sizes = np.zeros((count, 0), np.int32), (pages, options.page, options.fp8_cache)
        init = partial(init_paged_cache, config, table, *sizes)
        cache = layout.make(init, where("batch"))
        caches = [layout.make(partial(init, layers=1), where("batch")) for _ in range(modules)]
    else:
        init = partial(init_model_cache, config, count, length)
        cache = layout.make(init, where(None, "batch", "cache"))
        if unstacked:
            cache = ModelCache(*(rows and unstack(rows) for rows in cache))

        def of_module():
            return LatentCache(*(rows[0] for rows in init_cache(config, count, length, 1)))

        caches = [layout.make(of_module, where("batch", "cache")) for _ in range(modules)]

    make = partial(closed_slots, config, count, drafts, modules)
    hidden, *others = layout.make(make, where("batch"))
    return Slots(cache, Drafting(tuple(caches), hidden) if drafts else None, *others)


def closed_slots(config: ModelConfig, count: int, drafts: int, modules: int) -> tuple[Any, ...]:
    """What `Slots` has besides caches: carried hidden states, and then its fields in order."""

    def zeros(*dims, dtype=jnp.int32):  # of their own each: an act takes their memory
        return jnp.zeros((count, *dims), dtype)

    settings = Settings(
        zeros(dtype=jnp.float32), jnp.ones(count, jnp.float32), zeros(dtype=jnp.uint32)
    )
    return (
        tuple(zeros(config.hidden_size, dtype=config.dtype) for _ in range(1, modules)),
        zeros(),
        zeros(1 + drafts),
        zeros(),
        zeros(dtype=jnp.bool_),
        Asked(settings, zeros(), zeros(MAX_STOP_IDS) - 1),
    )
