"""A part of bench_multi_gpu: many exchanges in a row, each with another routing, and the worst."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.errors import relative_error
from benchmarks.multi_gpu_exchange import SPLIT
from benchmarks.multi_gpu_timing import AXES, Options, compile_all, failure, mesh_of
from dsv3_jax.config import ExpertParallelConfig
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.exchange import make_exchange
from dsv3_jax.parallel.expert import combine, dispatch

EXPERTS, CHOICES = 256, 8
TOGETHER = 25  # exchanges before the results are looked at
TOLERANCE = 1e-2  # of results that are rounded to BF16 on their way


def soak(options: Options) -> None:
    """`steps` exchanges and their backward pass, random routings, then all tokens to one GPU.

    In each a token must come back times the sum of its gate weights, and the gradients of tokens
    and weights must be those of that. Some routings are even, some send most rows to few GPUs.
    Raises RuntimeError where a result is off, or where the same exchange twice gives other bits.
    """
    quick = bool(options.virtual)
    tokens, dim, steps = (32, 512, 50) if quick else (4096, 7168, 1000)
    tokens = (options.tokens or [tokens])[0]
    ways = options.ways or ["pallas", "padded"]
    built = compile_all({way: partial(_programs, way, tokens, dim) for way in ways})
    for way, programs in built.items():
        if isinstance(programs, Exception):
            print(f"{way:10} {failure(programs)}", flush=True)
            continue
        draw, run = programs
        start, worst = time.perf_counter(), 0.0
        together = 1 if quick else TOGETHER  # virtual devices wait for each other's threads
        for first in range(0, steps, together):
            errors = [run(*draw(first + i, False)) for i in range(together)]
            worst = max(worst, *(float(error.max()) for error, _ in errors))
        took = (time.perf_counter() - start) / steps
        operands = draw(0, True)
        (error, bits), (_, again) = run(*operands), run(*operands)
        same = bool((bits == again).all())
        worst = max(worst, float(error.max()))
        print(
            f"{way:10} {steps} random routings, {1e3 * took:.2f} ms each with their drawing, and "
            f"all tokens to one GPU: largest error {worst:.1e}, the same bits twice: {same}",
            flush=True,
        )
        if not (worst <= TOLERANCE and same):
            raise RuntimeError(f"{way}: largest error {worst}, the same bits twice: {same}")


def _programs(transport: Any, tokens: int, dim: int) -> tuple[Any, Any]:
    """What draws a step's operands, and what says how far an exchange of them is off."""
    mesh = mesh_of()
    sharding = NamedSharding(mesh, SPLIT)
    # Room for all tokens of all devices: what does not fit at once is `rounds`' business.
    config = ExpertParallelConfig(transport=transport, capacity_factor=mesh.size)
    way = make_exchange(
        config, dict(mesh.shape), AXES, tokens=tokens, per_token=CHOICES, num_experts=EXPERTS
    )

    def draw(step, worst):
        keys = jax.random.split(jax.random.key(step), 4)
        shape = (tokens * mesh.size, EXPERTS)
        # Even in every third step; otherwise some experts are liked by all.
        liked = jax.random.normal(keys[0], (EXPERTS,)) * (step % 3)
        liked += jnp.where(worst & (jnp.arange(EXPERTS) < EXPERTS // mesh.size), 100.0, 0.0)
        scores = liked + jax.random.normal(keys[1], shape)
        x = jax.random.normal(keys[2], (shape[0], dim)).astype(jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (shape[0], CHOICES))
        return x, weights, jax.lax.top_k(scores, CHOICES)[1].astype(jnp.int32)

    def exchange(x, weights, experts):
        x, weights, experts = vary((x, weights, experts), AXES)

        def both(x, weights):
            rows: Any
            rows, _, handle = dispatch(x, weights, experts, way, 64)
            return combine(rows, handle, way)

        y, pull_back = jax.vjp(both, x, weights)
        d_x, d_weights = pull_back(x)
        wide, factor = x.astype(jnp.float32), weights.sum(1, keepdims=True)
        squares = jnp.broadcast_to(jnp.square(wide).sum(1, keepdims=True), weights.shape)
        pairs = ((y, wide * factor), (d_x, wide * factor), (d_weights, squares))
        errors = jnp.stack([jnp.asarray(relative_error(got, want)) for got, want in pairs])
        bits = [jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) for a in (y, d_x)]
        place = jnp.arange(bits[0].size, dtype=jnp.uint32).reshape(bits[0].shape)
        return errors[None], jnp.stack([(each * (2 * place + 1)).sum() for each in bits])[None]

    drawn = jax.jit(draw, out_shardings=(sharding,) * 3)
    operands = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(draw, np.int32(0), np.bool_(False)),
    )
    spread = jax.shard_map(exchange, mesh=mesh, in_specs=(SPLIT,) * 3, out_specs=SPLIT)
    run = jax.jit(spread).lower(*operands).compile()
    draws = drawn.lower(np.int32(0), np.bool_(False)).compile()
    return lambda step, worst: draws(np.int32(step), np.bool_(worst)), run
