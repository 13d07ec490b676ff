"""Paged latent attention for Hopper, in Pallas Mosaic GPU: split over the keys, then combined."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.hopper import plgpu, swizzled
from dsv3_jax.kernels.mla_decode import columns, hopper_fp8
from dsv3_jax.kernels.mla_decode.combine import combine
from dsv3_jax.kernels.mla_decode.hopper_block import (
    FP8_SLOTS,
    GROUPS,
    HALVES,
    LATENT_TILES,
    ROWS,
    TILES,
    Block,
    Call,
    Inputs,
    Outputs,
    Shared,
    SharedFp8,
    Tuning,
    parts_of,
    row_tiles,
)
from dsv3_jax.kernels.mla_decode.hopper_load import load, load_fp8
from dsv3_jax.kernels.mla_decode.hopper_softmax import LOG2_E, attend
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE, KVSplits, split_kv
from dsv3_jax.kernels.mla_decode.operands import Pages, Results, Rows
from dsv3_jax.quantization.block_scaled import BlockScaled

# Of a thread as it starts, by the number of warpgroups. All of them together have 64 K: asking for
# more in all would wait for ever.
LAUNCH_REGISTERS = {3: 168, 4: 128}


def mla_decode(
    pages: Pages,
    *,
    scale: float,
    schedule: KVSplits | None = None,
    tuning: Tuning | None = None,
) -> Results:
    """Softmax-weighted latents and log-sum-exp; see `api.mla_decode`."""
    q_latent, q_rope, latent, rope, block_table, lengths = pages
    hopper.require()
    batch, new, heads, width = q_latent.shape
    if (width, q_rope.shape[-1]) != (512, 64):
        raise NotImplementedError(
            f"latent and rope widths {width} and {q_rope.shape[-1]} must be 512 and 64"
        )
    if isinstance(latent, BlockScaled):
        pool, fp8 = (latent.values, latent.scales.reshape(latent.shape[0], -1)), True
    else:
        pool, fp8 = (latent,), False
    dtypes = {x.dtype for x in (q_latent, q_rope, rope, *(() if fp8 else pool))}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"{q_latent.dtype} by {latent.dtype} must be bfloat16 throughout")
    if manual.varies(pages):
        raise NotImplementedError("a shard_map around it must have check_vma=False")  # warp_map
    if latent.shape[1] != PAGE:
        raise NotImplementedError(f"pages of {latent.shape[1]} tokens must be of {PAGE}")
    rows = new * heads
    if schedule is None:
        here = jnp.minimum(lengths, block_table.shape[1] * PAGE)
        schedule = split_kv(here, parts_of(rows))
    q_latent, q_rope = (q.reshape(batch, rows, -1) for q in (q_latent, q_rope))
    tuning = tuning or Tuning()
    if row_tiles(rows) % tuning.cluster:
        tuning = dataclasses.replace(tuning, cluster=1)
    operands = (q_latent, q_rope, pool, rope, block_table, lengths, schedule)
    whole, partial = _attend(*operands, scale, new, tuning)
    out, lse = (x[:, :rows] for x in combine(*whole, *partial, schedule))
    return out.reshape(batch, new, heads, width), lse.reshape(batch, new, heads) / LOG2_E


def mla_decode_contiguous(rows: Rows, *, scale: float, schedule: KVSplits | None = None) -> Results:
    """The same for contiguous rows, which are pages in order."""
    hopper.require()
    if rows.latent.shape[1] % PAGE:
        raise NotImplementedError(
            f"a cache of {rows.latent.shape[1]} rows is no whole number of pages of {PAGE}"
        )
    return mla_decode(rows.in_pages(PAGE), scale=scale, schedule=schedule)


def _attend(
    q_latent, q_rope, pool, rope, block_table, lengths, schedule,
    scale, new: int, tuning: Tuning,
):  # fmt: skip
    """Results of sequences that one part reads alone, and partial results; both with log-sum-exp.

    `pool` holds the latents of all pages, or their FP8 values and scales.

    A part's partial result of a sequence that began in an earlier part is at [0, part], and of one
    that it begins and does not end at [1, part].
    """
    batch, rows, width = q_latent.shape
    tiles, parts = row_tiles(rows), schedule.parts
    padded = tiles * ROWS
    if hopper.interpreted():  # TMA reads zeros past the edge, and the interpreter nothing
        q_latent, q_rope = (
            jnp.pad(q, ((0, 0), (0, padded - rows), (0, 0))) for q in (q_latent, q_rope)
        )
    cluster = tuning.cluster
    call = Call(scale, new, rows // new, len(pool) == 2, tuning)
    roles = _roles_fp8() if call.fp8 else _roles()

    def kernel(*refs):
        inputs, refs = Inputs(*refs[: len(Inputs._fields)]), refs[len(Inputs._fields) :]
        outputs, refs = Outputs(*refs[: len(Outputs._fields)]), refs[len(Outputs._fields) :]
        part = lax.axis_index("part")
        tile = lax.axis_index("tile") * cluster + lax.axis_index("cluster")
        row = pl.multiple_of(tile * ROWS, ROWS)
        low, high = inputs.cuts[part], inputs.cuts[part + 1]
        shared = (SharedFp8 if call.fp8 else Shared)(*refs)
        block = Block(call, inputs, outputs, shared, part, row, low, high)
        for number, (registers, act) in enumerate(roles):

            @pl.when(lax.axis_index("warpgroup") == number)
            def _run(registers=registers, act=act):
                more = registers > LAUNCH_REGISTERS[len(roles)]
                plgpu.set_max_registers(registers, action="increase" if more else "decrease")
                act(block)

    struct = jax.ShapeDtypeStruct
    out, lse, partial, partial_lse = hopper.kernel(
        kernel,
        out_type=(
            struct((batch, padded, width), jnp.bfloat16),
            struct((batch, padded), jnp.float32),
            struct((2, parts, padded, width), jnp.float32),
            struct((2, parts, padded), jnp.float32),
        ),
        grid=(tiles // cluster, parts),
        grid_names=("tile", "part"),
        cluster=(cluster, 1),
        cluster_names=("cluster", "alone"),
        num_threads=len(roles),
        thread_name="warpgroup",
        scratch_types=tuple((_scratch_fp8 if call.fp8 else _scratch)()),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # What is shared is handed over by barriers, after `commit_smem` or `synchronize`. With
            # Pallas's own barriers beside them results are the same bits, 1 % later.
            unsafe_no_auto_barriers=True,
        ),
    )(
        q_latent, q_rope, pool, rope, block_table, lengths,
        schedule.starts, schedule.cuts, schedule.first, schedule.last,
    )  # fmt: skip
    return (out, lse), (partial, partial_lse)


def _roles() -> list[tuple[int, Callable[[Block], None]]]:
    """What each warpgroup does, and with how many registers a thread."""
    even, odd = (functools.partial(attend, me=me) for me in range(2))
    return [(232, even), (232, odd), (40, _by_one_warp(load))]


def _roles_fp8() -> list[tuple[int, Callable[[Block], None]]]:
    halves = [(176, functools.partial(hopper_fp8.weigh, me=me)) for me in range(2)]
    return [*halves, (136, hopper_fp8.score), (24, _by_one_warp(load_fp8))]


def _by_one_warp(bring: Callable[[Block], None]) -> Callable[[Block], None]:
    return lambda block: plgpu.warp_map(lambda warp: pl.when(warp == 0)(lambda: bring(block)))


# A barrier over a cluster is arrived at by one thread, one over a block by all 128.
def _released(**sizes):
    return plgpu.ClusterBarrier(collective_axes=("cluster",), **sizes)


def _signal(**sizes):
    return plgpu.ClusterBarrier(collective_axes=("alone",), **sizes)


def _tiles(shape, dtype=jnp.bfloat16):
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def _scratch() -> Shared:
    interpreted = hopper.interpreted()
    return Shared(
        q=_tiles((TILES, ROWS, 64)),
        k=_tiles((2, TILES, PAGE, 64)),
        weights=_tiles((ROWS, PAGE)),
        own_weights=_tiles((2, ROWS, PAGE)) if interpreted else plgpu.SMEM((32,), jnp.float32),
        rows=plgpu.SMEM((4, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=TILES),
        q_empty=_signal(num_arrivals=2),
        k_full=plgpu.Barrier(num_barriers=2 * TILES),
        k_empty=_released(num_barriers=2 * len(GROUPS)),
        weights_ready=_signal(num_barriers=4),
    )


def _scratch_fp8() -> SharedFp8:
    warps = columns.partials()
    return SharedFp8(
        q=_tiles((LATENT_TILES, ROWS, 64)),
        q_rope=_tiles((1, ROWS, 64)),
        k=_tiles((FP8_SLOTS, 4, PAGE, 128), jnp.float8_e4m3fn),
        rope=_tiles((FP8_SLOTS, PAGE, 64)),
        scales=plgpu.SMEM((FP8_SLOTS, PAGE), jnp.float32),
        weights=_tiles((hopper_fp8.BUFFERS, PAGE, ROWS)),
        columns=plgpu.SMEM((warps, ROWS), jnp.float32),
        largest=plgpu.SMEM((warps,), jnp.float32),
        top=plgpu.SMEM((ROWS,), jnp.float32),
        decay=plgpu.SMEM((hopper_fp8.BUFFERS, ROWS), jnp.float32),
        risen=plgpu.SMEM((hopper_fp8.BUFFERS,), jnp.int32),
        q_full=plgpu.Barrier(num_arrivals=TILES),
        q_empty=_signal(),
        k_full=plgpu.Barrier(num_arrivals=6, num_barriers=FP8_SLOTS),
        k_empty=_released(num_barriers=FP8_SLOTS * len(HALVES)),
        weights_ready=_signal(num_barriers=hopper_fp8.BUFFERS),
        weights_free=_signal(num_arrivals=2, num_barriers=hopper_fp8.BUFFERS),
        sums_ready=_signal(),
        sums_free=_signal(num_arrivals=2),
    )
