"""The engine: whatever the schedule, each request's text is that of the request alone."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsv3_jax.config import UserError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request
from dsv3_jax.model.cache import init_paged_cache
from tests.helpers import random_tokens, random_variables, tiny_model

CONFIG = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1, eos_token_id=())
VARIABLES = random_variables(CONFIG)
OPTIONS = EngineOptions(
    slots=6,
    max_length=40,
    pages=44,
    chunks=(6,),
    chunk_rows=(1,),
    token_budget=24,
    drafts=2,
    page=4,
)
TEXT = [row.tolist() for row in random_tokens(CONFIG, 3, 20)]
# Prompts of 1 to 19 tokens, several with the same beginnings, whole pages and parts of them.
PROMPTS = [
    TEXT[0][:1], TEXT[0][:9], TEXT[0][:10], TEXT[0], [*TEXT[0][:9], *TEXT[1][:5]], TEXT[1][:4],
    TEXT[1][:17], [*TEXT[1][:6], *TEXT[2][:9]], TEXT[2][:12], TEXT[2][:13],
]  # fmt: skip
REQUESTS = [
    Request(
        tuple(prompt),
        max_new_tokens=3 + 4 * number % 17,
        temperature=0.9 * (number % 2),
        top_p=0.8 + 0.1 * (number % 3),
        seed=number,
        stop_ids=(number, 22) if number % 3 == 0 else (number,),
    )
    for number, prompt in enumerate(PROMPTS)
]


@cache
def engine_of(**options) -> Engine:
    """One engine for all examples: it must be as good as new whenever nothing is left to do."""
    return Engine(VARIABLES, CONFIG, dataclasses.replace(OPTIONS, **options))


PLAIN = dict(drafts=0, slots=1, chunks=(24,), share_prefixes=False, fp8_cache=False)


@cache
def alone(number: int, fp8_cache: bool = False):
    """A request by itself: no drafts, the prompt whole, nothing shared."""
    (done,) = engine_of(**PLAIN | {"fp8_cache": fp8_cache}).run([REQUESTS[number]])
    return done.ids, done.finish_reason


def all_pages_are_back(engine: Engine):
    assert not engine.running and not engine.waiting
    engine.step()  # reads what was launched before the last one had ended
    assert not engine.busy
    assert [pool.free_pages for pool in engine.pools] == [OPTIONS.pages]


ARRIVALS = st.lists(
    st.tuples(st.integers(0, len(REQUESTS) - 1), st.integers(0, 3), st.integers(0, 30)),
    min_size=1,
    max_size=32,
)


def check_a_schedule(arrivals, fewer_pages: int, fp8_cache: bool):
    """Requests come some steps apart, some are cancelled after some steps; a few pages are gone."""
    engine = engine_of(fp8_cache=fp8_cache)
    pool, kept, running = engine.pools[0], [], []
    for _ in range(fewer_pages):
        kept.append(pool._take())
    for number, pause, patience in arrivals:
        for _ in range(pause):
            engine.step()
        # Those with patience left over are never cancelled.
        running.append((number, engine.submit(REQUESTS[number]), patience))
        for _, completion, left in running[-3:]:
            if left == pause and not completion.done:
                engine.cancel(completion)
    for _ in range(2000):
        if not engine.busy:
            break
        engine.step()
    for number, completion, _ in running:
        want, reason = alone(number, fp8_cache)
        if completion.finish_reason == "cancelled":
            assert completion.ids == want[: len(completion.ids)]
        else:
            assert (completion.ids, completion.finish_reason) == (want, reason)
    for page in kept:
        pool._holders[page] = 0
        pool._free.append(page)
    all_pages_are_back(engine)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("fp8_cache", [False, True])
@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # an engine that failed is none to shrink with
)
@given(ARRIVALS, st.integers(0, 30))
def test_any_schedule_writes_what_each_request_writes_alone(fp8_cache, arrivals, fewer_pages):
    check_a_schedule(arrivals, fewer_pages, fp8_cache)


@pytest.mark.slow
def test_the_schedules_had_chunks_shared_prefixes_preemptions_and_cancellations():
    engine = engine_of(fp8_cache=False)
    for fewer_pages in (0, 30):
        check_a_schedule([(n % 10, n % 3, n) for n in range(32)], fewer_pages, fp8_cache=False)
    counts = engine.statistics
    assert counts.preemptions and counts.cached_tokens and counts.chunks > counts.requests["length"]
    assert counts.requests["cancelled"] and counts.requests["stop"]
    assert counts.drafted[0] > counts.accepted[0] > 0


@pytest.mark.slow
def test_nothing_compiles_while_serving(monkeypatch):
    engine, compiled = engine_of(fp8_cache=False), []
    engine.warm_up()
    listen = lambda name, *_, **__: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + len(compiled))(np.float32(1))
        assert compiled, "compilations are seen"
        compiled.clear()
        engine.run(REQUESTS)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_next_step_is_launched_before_the_last_one_is_read(monkeypatch):
    """When a step's tokens are asked for, the step after it is already on its way; and no step is
    launched for a text that the steps before have ended."""
    engine, log = engine_of(**PLAIN), []
    launch, read = engine._launch_step, engine._read

    def launches():
        launched = launch()
        if launched:
            log.append("launch")
        return launched

    def reads():
        if engine._flying[0].is_step:
            log.append("read")
        return read()

    monkeypatch.setattr(engine, "_launch_step", launches)
    monkeypatch.setattr(engine, "_read", reads)
    engine.run([dataclasses.replace(REQUESTS[3], max_new_tokens=18, stop_ids=())])
    assert log == ["launch", *["launch", "read"] * 16, "read"]
    log.clear()
    engine.run([dataclasses.replace(REQUESTS[3], max_new_tokens=1, stop_ids=())])
    assert not log, "the prompt alone gives the first token"


def test_requests_wait_for_pages_and_none_is_lost():
    engine = engine_of(fp8_cache=False)
    long = dataclasses.replace(REQUESTS[3], max_new_tokens=20, stop_ids=(), temperature=0.0)
    completions = [engine.submit(long) for _ in range(12)]
    engine.step()
    assert engine.waiting == 6
    while engine.busy:
        engine.step()
    assert len({tuple(c.ids) for c in completions}) == 1 and len(completions[0].ids) == 20
    assert all(c.finish_reason == "length" for c in completions)
    all_pages_are_back(engine)


def test_a_listener_hears_every_token_once_and_may_end_the_text():
    engine, heard, done = engine_of(fp8_cache=False), [], []

    def listen(tokens):
        heard.extend(token.id for token in tokens)
        return len(heard) >= 7

    request = dataclasses.replace(REQUESTS[3], max_new_tokens=18, stop_ids=())
    (whole,) = engine.run([request])
    (cut,) = engine.run([dataclasses.replace(request, listener=listen, on_done=done.append)])
    assert heard == cut.ids and done == [cut] and cut.finish_reason == "stop"
    assert 7 <= len(cut.ids) < 10 and cut.ids == whole.ids[: len(cut.ids)]
    all_pages_are_back(engine)


def test_what_was_written_before_is_found_again():
    engine = engine_of(fp8_cache=False)
    first = dataclasses.replace(REQUESTS[3], prompt=(5, 4, 3, 2, 1, 0, 9), temperature=0.0)
    (done,) = engine.run([first])
    talk = (*first.prompt, *done.ids[:-1], 3, 1)
    (then,) = engine.run([dataclasses.replace(first, prompt=talk, max_new_tokens=2)])
    assert then.cached_tokens == len(talk) - 2
    (plain,) = engine_of(**PLAIN).run([dataclasses.replace(first, prompt=talk, max_new_tokens=2)])
    assert then.ids == plain.ids


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1.5, 2.0)}, "the prompt must be a sequence of token ids"),
        ({"prompt": (1, 37)}, "token ids from 1 to 37; the model's vocabulary is 0 to 36"),
        ({"prompt": (1,) * 39, "max_new_tokens": 3}, "39 tokens and 3 more .* room for 40"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_ids": tuple(range(9))}, "9 ids end the text"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_with_the_numbers(change, message):
    with pytest.raises(UserError, match=message):
        engine_of(fp8_cache=False).submit(dataclasses.replace(REQUESTS[0], **change))


def test_a_request_larger_than_the_pool_is_refused():
    small = Engine(VARIABLES, CONFIG, dataclasses.replace(OPTIONS, pages=5))
    with pytest.raises(UserError, match="19 more are asked for, but all 5 pages hold 20"):
        small.submit(Request((1, 2), 19))


def test_the_cache_has_the_bytes_of_v3():
    """1,152 bytes a token and layer in BF16, 70,272 for the 61 layers: from the arrays."""
    model = dataclasses.replace(
        CONFIG, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=61, dtype="bfloat16"
    )
    pool = init_paged_cache(model, np.zeros((1, 2), np.int32), pages=2)
    held = sum(array.nbytes for array in (pool.latent, pool.k_rope))
    assert held / (2 * 64) == 70_272 == 61 * 1_152
