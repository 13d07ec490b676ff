"""Attention of a few new tokens over a paged cache of latents: MLA's absorbed form, for decoding.

Every head reads the same key, a latent of C numbers with R rotated ones, and the value is that
latent: one page serves all heads. Letters: B sequences, T new tokens of each, N heads, C latent and
R rope width, P pages in the pool, S pages in a sequence's table.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.mla_decode.schedule import Schedule, make_schedule
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled

PACKAGE = "dsv3_jax.kernels.mla_decode"


def mla_decode(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "P page C"] | BlockScaled,
    k_rope: Float[Array, "P page R"],
    block_table: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    schedule: Schedule | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N C"]:
    """The latents that each new token sees, weighted by its softmax, in the queries' dtype.

    The new tokens are already in the pages. Sequence b holds lengths[b] tokens, the T new ones
    last; its token i is row i % page of the pool's page block_table[b, i // page]. New token t sees
    tokens up to itself. A token that sees none (length 0) gets zeros. What lies past a sequence's
    end must be finite, and its table entries past its last page are not read.

    `latent` may be E4M3 numbers with a scale for 128 of them (a pool [P, page, C] quantised per
    token); `k_rope` stays in the queries' dtype.

    `schedule` is what `plan` returned for these lengths: give it when several layers share it.
    Softmax and sums are float32; weights are rounded to the queries' dtype before they meet the
    latents. DeepSeek-V3:inference/model.py, `attn_impl="absorb"`; V3 report, section 2.1.1.

    Raises ValueError for shapes that do not fit together; NotImplementedError when an
    implementation asked for by name cannot.
    """
    check(q_latent, q_rope, latent, k_rope, block_table, lengths)
    return backend.run(
        PACKAGE,
        "mla_decode",
        q_latent,
        q_rope,
        latent,
        k_rope,
        block_table,
        lengths,
        scale=scale,
        schedule=schedule,
        implementation=implementation,
    )


def mla_decode_contiguous(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    schedule: Schedule | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N C"]:
    """`mla_decode` for a cache that holds each sequence's rows one after the other."""
    check(q_latent, q_rope, latent, k_rope, jnp.zeros((len(latent), 1), jnp.int32), lengths)
    return backend.run(
        PACKAGE,
        "mla_decode_contiguous",
        q_latent,
        q_rope,
        latent,
        k_rope,
        lengths,
        scale=scale,
        schedule=schedule,
        implementation=implementation,
    )


def plan(lengths: Int[Array, " B"], rows: int) -> Schedule | None:
    """How a GPU's multiprocessors share the pages of sequences of these lengths; None elsewhere.

    `rows` is new tokens x heads of one device. The plan holds for every layer of a step.
    """
    kernel = _on_hopper()
    return None if kernel is None else make_schedule(lengths, kernel.parts_of(rows))


def wants_pages(width: int, rope: int, dtype: Any) -> bool:
    """Whether the kernel that runs here reads pages of rows of `width` and `rope` numbers."""
    kernel = _on_hopper()
    return kernel is not None and kernel.reads(width, rope, dtype)


def _on_hopper() -> Any:
    """The module of Hopper's kernel where it would be tried and can be compiled, else None."""
    if "pallas_gpu" not in backend.candidates(backend.DEFAULT_ORDER):
        return None
    try:
        hopper.require()
    except NotImplementedError:
        return None  # `mla_decode` will say so
    from dsv3_jax.kernels.mla_decode import pallas_gpu

    return pallas_gpu


def check(q_latent, q_rope, latent, k_rope, block_table, lengths) -> None:
    """Raises ValueError, naming values and rule, unless the operands fit together."""
    batch, new, heads, width = q_latent.shape
    if q_rope.shape[:3] != (batch, new, heads):
        raise ValueError(f"q_rope {q_rope.shape} must begin as q_latent {q_latent.shape} does")
    if latent.shape[2] != width or k_rope.shape != (*latent.shape[:2], q_rope.shape[3]):
        raise ValueError(
            f"pages of latents {latent.shape} and of rope {k_rope.shape} must be [P, page, {width}]"
            f" and [P, page, {q_rope.shape[3]}], as the queries are"
        )
    if block_table.ndim != 2 or block_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"block_table {block_table.shape} and lengths {lengths.shape} must be [{batch}, S] and "
            f"[{batch}]"
        )
    if isinstance(latent, BlockScaled) and latent.tile != PER_TOKEN:
        raise ValueError(f"latents in tiles of {latent.tile} must be in tiles of {PER_TOKEN}")
