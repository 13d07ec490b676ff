"""Paged latent attention: every implementation against a float64 softmax, page by page."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsv3_jax.kernels import backend, tpu
from dsv3_jax.kernels.mla_decode import pallas_tpu
from dsv3_jax.kernels.mla_decode.api import (
    Pages,
    Rows,
    mla_decode,
    mla_decode_contiguous,
    wants_pages,
)
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE, split_kv
from dsv3_jax.kernels.mla_decode.operands import fp8_latents, rotated_keys, scaled_keys
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.mla import mla_absorb
from dsv3_jax.parallel.sharding import RULES, Layout
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize, quantize
from tests.cases import in_every_run, matrix
from tests.kernels.conftest import IMPLEMENTATIONS, INTERPRETER_IS_NEWER, relative_error

SCALE = 1 / math.sqrt(192)
# Weights rounded to bfloat16 before the second product, and the result after it: 2.1e-3 seen. A
# token too many or too few among 70 is 0.1.
BF16_LIMIT = 4e-3
# FP8 pages against the numbers that they stand for. The reference rounds these to bfloat16.
# Hopper's kernel rounds weights to float16, so that the result's own rounding is most of it: 1.7e-3
# seen where it is interpreted. A tensor core adds scores up in 14 bits, which takes 2^-11 of a
# logit: 2.2e-3 seen.
ON_GPU = jax.default_backend() == "gpu"
FP8_LIMIT = {"reference": BF16_LIMIT, "pallas_gpu": 3e-3 if ON_GPU else 2e-3}

F32 = jnp.float32

TPU = pytest.param("pallas_tpu", marks=INTERPRETER_IS_NEWER)
EVERY = [  # implementations, and what the cache holds; the TPU kernel reads no FP8
    ("reference", "bf16"),
    ("reference", "fp8"),
    pytest.param("pallas_gpu", "bf16", marks=INTERPRETER_IS_NEWER),
    pytest.param("pallas_gpu", "fp8", marks=INTERPRETER_IS_NEWER),
    pytest.param("pallas_tpu", "bf16", marks=INTERPRETER_IS_NEWER),
]


def logits_limit(cache: str) -> float:
    """How far the log-sum-exp of logits of up to 8 may be off."""
    return 5e-3 if ON_GPU and cache == "fp8" else 1e-4


def random_work(rng, new, heads, lengths, spare=1, cache="bf16") -> Pages:
    """Sequences whose pages lie in any order in a pool; tables have `spare` entries too many.

    128 latents of a row are as large as each other, and no others are.
    """
    slots = max(math.ceil(n / PAGE) for n in lengths) + spare
    pool = len(lengths) * slots

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    table = rng.permutation(pool).reshape(len(lengths), slots)
    sizes = jnp.asarray(np.exp2(rng.integers(-2, 2, (pool, PAGE, 4))), jnp.bfloat16)
    latent = draw(pool, PAGE, 512) * jnp.repeat(sizes, 128, axis=-1)
    if cache == "fp8":
        latent = fp8_latents(latent)
    return Pages(
        draw(len(lengths), new, heads, 512),
        draw(len(lengths), new, heads, 64),
        latent,
        scaled_keys(latent, draw(pool, PAGE, 64)),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )


def numbers(latent, implementation: str):
    """The latents that an implementation multiplies."""
    if not isinstance(latent, BlockScaled):
        return latent
    return dequantize(latent, jnp.bfloat16 if implementation == "reference" else F32)


def exact(work: Pages, implementation: str = "reference"):
    """Results and log-sum-exp from one row of keys a sequence, in float64."""
    ropes = rotated_keys(work.latent, work.k_rope)
    work = work._replace(latent=numbers(work.latent, implementation), k_rope=ropes)
    q_latent, q_rope, latent, k_rope = (np.asarray(x, np.float64) for x in work[:4])
    out, lse = np.zeros(q_latent.shape), np.full(q_latent.shape[:3], -np.inf)
    new = work.q_latent.shape[1]
    for b, (pages, length) in enumerate(zip(np.asarray(work.block_table), work.lengths)):
        values, ropes = (x[pages].reshape(-1, x.shape[-1]) for x in (latent, k_rope))
        for t in range(new):
            seen = int(length) - (new - 1 - t)
            if seen <= 0:
                continue
            logits = q_latent[b, t] @ values[:seen].T + q_rope[b, t] @ ropes[:seen].T
            largest = logits.max(-1, keepdims=True)
            weights = np.exp(SCALE * (logits - largest))
            total = weights.sum(-1, keepdims=True)
            out[b, t] = weights / total @ values[:seen]
            lse[b, t] = (SCALE * largest + np.log(total))[:, 0]
    return out, lse


WORK = [
    pytest.param(1, 16, (130, 0), id="ragged"),
    pytest.param(2, 64, (70,), id="two rows of blocks"),
    pytest.param(4, 8, (2, 67), id="verifying drafts"),
    pytest.param(3, 16, (66,), id="three sixteens of rows"),
]


@pytest.mark.parametrize("implementation, cache, new, heads, lengths", matrix(EVERY, WORK))
def test_new_tokens_see_what_came_before(implementation, cache, new, heads, lengths, rng, running):
    work = random_work(rng, new, heads, lengths, cache=cache)
    with running(implementation):
        out, lse = mla_decode(work, scale=SCALE, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and out.shape == work.q_latent.shape
    want, want_lse = exact(work, implementation)
    assert relative_error(out, want) < BF16_LIMIT
    unseen = np.isneginf(want_lse)
    assert not np.asarray(out, np.float32)[unseen].any()
    assert (np.asarray(lse)[unseen] < -1e29).all()
    # Logits of the reference are the exact products, of the kernels, too.
    assert np.abs(np.asarray(lse) - want_lse)[~unseen].max() < logits_limit(cache)


@pytest.mark.parametrize("implementation, cache", in_every_run(EVERY, EVERY[0], EVERY[3]))
def test_pieces_of_a_cache_are_put_together_by_their_log_sum_exp(
    implementation, cache, rng, running
):
    """The late piece of two holds nothing of a sequence, or only what the last new token sees."""
    work = random_work(rng, 2, 8, (40, 65, 100), spare=0, cache=cache)
    table, results = work.block_table, []
    with running(implementation):
        for piece in range(2):
            part = work._replace(
                block_table=table[:, piece : piece + 1], lengths=work.lengths - piece * PAGE
            )
            results.append(mla_decode(part, scale=SCALE, implementation=implementation))
    outs, lses = (np.stack([np.asarray(x, np.float64) for x in pair]) for pair in zip(*results))
    weights = np.exp(lses - lses.max(0))[..., None]
    out = (weights * outs).sum(0) / weights.sum(0)
    want, want_lse = exact(work, implementation)
    assert relative_error(out, want) < BF16_LIMIT
    assert np.abs(np.logaddexp(*lses) - want_lse).max() < logits_limit(cache)


@pytest.mark.parametrize("implementation", ["reference", TPU])
def test_contiguous_rows_are_pages_in_order(implementation, rng, running):
    work = random_work(rng, 1, 8, (70, 3), spare=0)
    in_order = work._replace(block_table=jnp.arange(4, dtype=jnp.int32).reshape(2, 2))
    rows = tuple(x.reshape(2, 128, -1) for x in work[2:4])
    with running(implementation):
        out, _ = mla_decode_contiguous(
            Rows(*work[:2], *rows, work.lengths), scale=SCALE, implementation=implementation
        )
    assert relative_error(out, exact(in_order)[0]) < BF16_LIMIT


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fp8_latents_are_those_they_stand_for(implementation, rng, running):
    """Not rounded beside what rounds the result; the reference's are bfloat16."""
    work = random_work(rng, 1, 4, (70, 3), cache="fp8")
    with running(implementation):
        out, lse = mla_decode(work, scale=SCALE, implementation=implementation)
    assert isinstance(work.latent, BlockScaled)
    want, want_lse = exact(work, "pallas_gpu")
    assert relative_error(out, want) < FP8_LIMIT[implementation]
    # Logits of up to 8, and the reference's numbers are off by up to 2^-9 of themselves.
    assert np.abs(np.asarray(lse) - want_lse).max() < 5e-3


def scaled(work: Pages, factor) -> Pages:
    """The same with tokens' latents times a factor, a power of two."""
    assert isinstance(work.latent, BlockScaled)
    ropes = rotated_keys(work.latent, work.k_rope)
    scales = (work.latent.scales * factor).astype(F32)
    latent = BlockScaled(work.latent.values, scales, work.latent.tile)
    return work._replace(latent=latent, k_rope=scaled_keys(latent, ropes))


@INTERPRETER_IS_NEWER
def test_scales_of_any_size_meet_in_one_page(rng, running):
    """Tokens 2^-15 and 2^15 times as large, and one of zeros that most look at."""
    work = random_work(rng, 1, 4, (70,), cache="fp8")
    factors = jnp.exp2(rng.integers(-15, 16, work.k_rope.shape[:2]))[..., None]
    page = work.block_table[0, 0]
    work = scaled(work, factors.at[page, 5].set(2.0**-40))
    latent = work.latent
    ropes = rotated_keys(latent, work.k_rope).at[page, 5].set(4 * work.q_rope[0, 0, 0])
    work = work._replace(
        latent=BlockScaled(latent.values.at[page, 5].set(0), latent.scales, latent.tile),
        q_latent=work.q_latent * jnp.bfloat16(2.0**-12),
        q_rope=work.q_rope.at[:, :, 0].multiply(jnp.bfloat16(32)),
        k_rope=scaled_keys(latent, ropes),
    )
    with running("pallas_gpu"):
        out, lse = mla_decode(work, scale=SCALE, implementation="pallas_gpu")
    want, want_lse = exact(work, "pallas_gpu")
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert relative_error(out, want) < BF16_LIMIT
    assert np.abs(np.asarray(lse) - want_lse).max() < (5e-2 if ON_GPU else 1e-3)


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize("size", [2.0**36, 1.0, 2.0**-60, 0.0])
def test_queries_of_any_size_are_exact_pairs(size, rng, running):
    """And no result is plausible where one of them is not finite."""
    work = random_work(rng, 1, 4, (70, 65), cache="fp8")
    work = scaled(work, 1 / size if size else 2.0**-20)
    queries = (work.q_latent * size).at[1, 0, 2, 3].set(jnp.inf)
    work = work._replace(q_latent=queries.astype(jnp.bfloat16))
    with running("pallas_gpu"):
        out, lse = mla_decode(work, scale=SCALE, implementation="pallas_gpu")
    assert np.isnan(np.asarray(out, np.float32)[1, 0, 2]).all()
    finite = jax.tree.map(lambda x: x[:1], (work.q_latent, work.q_rope))
    first = work._replace(
        q_latent=finite[0], q_rope=finite[1],
        block_table=work.block_table[:1], lengths=work.lengths[:1],
    )  # fmt: skip
    want, want_lse = exact(first, "pallas_gpu")
    assert relative_error(out[:1], want) < BF16_LIMIT
    assert np.abs(np.asarray(lse)[:1] - want_lse).max() < logits_limit("fp8")


scheduled = jax.jit(split_kv, static_argnums=1)


@pytest.mark.parametrize(
    "lengths, parts",
    [((0,), 3), ((1, 640, 0, 63, 65, 2000), 1), ((1, 640, 0, 63, 65, 2000), 66), ((1,) * 100, 7)],
)
def test_a_schedule_reads_every_page_once(parts, lengths):
    schedule = jax.tree.map(np.asarray, scheduled(jnp.array(lengths), parts))
    read = [set() for _ in lengths]
    for p in range(parts):
        low, high = schedule.cuts[p : p + 2]
        for b in range(schedule.first[p], schedule.last[p] if high > low else schedule.first[p]):
            start, stop = schedule.starts[b : b + 2]
            pages = set(range(max(low, start) - start, min(high, stop) - start))
            assert pages and not pages & read[b]
            assert schedule.begin[b] <= p < schedule.end[b]
            read[b] |= pages
    for b, length in enumerate(lengths):
        assert read[b] == set(range(max(-(-length // PAGE), 1)))
        owners = range(schedule.begin[b], schedule.end[b])
        # The combination reads a partial result of each of these.
        assert all(schedule.cuts[p] < schedule.cuts[p + 1] for p in owners)


def test_a_schedule_keeps_all_parts_busy():
    def longest(lengths, parts):
        cuts = np.asarray(scheduled(jnp.array(lengths), parts).cuts)
        return int(np.diff(cuts).max())

    assert longest((32768,), 66) == 8  # 7.76 pages a part, in pairs
    assert longest((4096,) * 128, 66) <= 128  # 124.1: two whole sequences are worth a little more
    assert longest((4096,) * 128, 132) <= 64


@INTERPRETER_IS_NEWER
def test_the_tpu_kernel_lowers_ahead_of_time(rng):
    shapes = jax.eval_shape(lambda: random_work(rng, 2, 128, (4096, 100)))
    device = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        function = jax.jit(functools.partial(pallas_tpu.mla_decode, scale=SCALE))
        lowered = function.trace(shapes).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@INTERPRETER_IS_NEWER
def test_the_gpu_kernel_lowers_with_sequences_heads_and_rows_cut_over_a_mesh():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    names = ("data", "node", "local", "context", "tensor")
    mesh = AbstractMesh((2, 1, 1, 2, 2), names, (AxisType.Auto,) * 5, abstract_device=device)
    layout = Layout(mesh, rules=RULES["decode"])

    def attend(q_nope, q_rope, latent, k_rope, lengths, weight):
        cache = LatentCache(latent, k_rope)
        return mla_absorb(q_nope, q_rope, cache, lengths, weight, SCALE, layout=layout)

    shapes = ((4, 1, 32, 128), (4, 1, 32, 64), (4, 256, 512), (4, 256, 64), (4,), (32, 256, 512))
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.bfloat16)
        for shape in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(attend).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@INTERPRETER_IS_NEWER
def test_pages_are_wanted_where_hoppers_kernel_reads_them(running):
    assert wants_pages(512, 64, jnp.bfloat16) == (jax.default_backend() == "gpu")
    with running("pallas_gpu"), backend.use("pallas_gpu"):
        assert wants_pages(512, 64, "bfloat16")
        assert not wants_pages(512, 64, "float32") and not wants_pages(256, 64, "bfloat16")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q_rope=jnp.zeros((1, 1, 2, 64))), r"q_rope \(1, 1, 2, 64\)"),
        (dict(k_rope=jnp.zeros((4, 64, 32))), r"must be \[P, page, 512\] and \[P, page, 64\]"),
        (dict(lengths=jnp.zeros(2, jnp.int32)), r"lengths \(2,\)"),
        (
            dict(latent=quantize(jnp.zeros((4, 128, 512)), (128, 128))),
            r"tiles of \(128, 128\)",
        ),
    ],
)
def test_refuses_what_does_not_fit(change, message, rng):
    work = random_work(rng, 1, 4, (100,), spare=0)
    if "latent" in change:
        work = work._replace(k_rope=jnp.zeros((4, 128, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match=message):
        mla_decode(work._replace(**change), scale=SCALE)


def test_the_other_context_is_none():
    """Nothing here leaves an interpreter switched on."""
    with contextlib.suppress(ValueError), tpu.interpreting():
        raise ValueError
    assert not tpu.interpreted()
