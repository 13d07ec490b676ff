"""What a generation step is made of: the model's own step, the engine's program, kernels, gaps.

Each is a chain of calls that nobody waits for until the last, on an engine that is idle. The
model's own step is `decode_step`, the head and an argmax, which feeds the next call. `trace` reads
the profiler: how long kernels ran, and how long the GPU had nothing to do.
"""

import glob
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.inference.acts import advance_of
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.kv_cache import NO_PAGE
from dsv3_jax.model.cache import PagedCache
from dsv3_jax.model.decode import decode_step
from dsv3_jax.model.ends import logits_of
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import forward

STEPS = 32


class Trace(NamedTuple):
    """What the profiler saw of a GPU."""

    window: float  # s from the first kernel's start to the last one's end
    busy: float  # s of it in which some kernel or copy ran
    launches: int


def trace(run: Callable[[], Any]) -> Trace | None:
    """The GPU's time while `run` runs; None where the profiler sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data: Any = jax.profiler.ProfileData
        spans = sorted(
            (event.start_ns, event.start_ns + event.duration_ns)
            for plane in data.from_file(file).planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        )
    if not spans:
        return None
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return Trace((until - spans[0][0]) * 1e-9, busy * 1e-9, len(spans))


@partial(jax.jit, static_argnames="how", donate_argnames="cache")
def model_step(variables, cache, fed, start, how: Pass):
    """The model alone: (cache, the likeliest next tokens, the rows after)."""
    out = decode_step(variables, fed, start, cache, how)
    drawn = jnp.argmax(logits_of(variables["params"], out.hidden), axis=-1).astype(jnp.int32)
    return out.cache, drawn, start + fed.shape[1]


def table_of(engine: Engine) -> Any:
    """Pages for every slot of an idle engine: as many as it has, in turn."""
    table = np.full((engine.options.slots, engine._width), NO_PAGE, np.int32)
    pages = min(engine.pools[0].pages // len(table), table.shape[1])
    table[:, :pages] = np.arange(len(table) * pages).reshape(len(table), pages)
    return jax.device_put(table)


def queued_model(engine: Engine, context: int) -> float:
    """Seconds of the model's own step, of as many tokens as the engine's; it writes the cache."""
    slots, how = engine._slots, engine._programs[False].steps
    cache = slots.cache
    if isinstance(cache, PagedCache):
        cache = cache.with_table(table_of(engine))
    count = engine.options.slots

    def chain():
        nonlocal cache
        fed = jnp.ones((count, 1 + engine.options.drafts), jnp.int32)
        start = jnp.full(count, context, jnp.int32)
        for _ in range(STEPS):
            cache, fed, start = model_step(engine.variables, cache, fed, start, how)
        return fed

    seconds = _median_seconds(chain, 3) / STEPS
    if isinstance(cache, PagedCache):
        cache = cache.with_table(jnp.zeros((count, 0), jnp.int32))
    engine._slots = slots._replace(cache=cache)
    return seconds


def queued_steps(engine: Engine, context: int) -> Callable[[], Any]:
    """A call that launches the engine's own step STEPS times, for sequences of so many rows."""
    table, program = table_of(engine), engine._programs[False]

    def chain():
        slots = engine._slots
        asked = slots.asked._replace(
            limit=jnp.full_like(slots.asked.limit, 2**30), ends=jnp.full_like(slots.asked.ends, -1)
        )
        slots = slots._replace(
            lengths=jnp.full_like(slots.lengths, context),
            number=jnp.zeros_like(slots.number),
            open=jnp.ones_like(slots.open),
            asked=asked,
        )
        for _ in range(STEPS):
            slots, written = advance_of(program)(engine.variables, slots, table, program)
        engine._slots = slots._replace(open=jnp.zeros_like(slots.open))
        return written.tokens

    return chain


def queued_engine(engine: Engine, context: int) -> float:
    """Seconds of the engine's own step where nobody reads what it writes."""
    return _median_seconds(queued_steps(engine, context), 3) / STEPS


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of calls that are waited for, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def training_forward(variables, config, length: int) -> float:
    """Seconds of `forward` of one row without a gradient: what training computes of a prompt."""
    run = jax.jit(lambda v, ids: forward(v, ids, Pass(config)).logits[:, -1])
    ids = jnp.asarray(np.random.default_rng(1).integers(2, config.vocab_size, (1, length)))
    return _median_seconds(lambda: run(variables, ids), 5)
