"""Attention of a few new tokens over a paged cache of latents: MLA's absorbed form, for decoding.

Every head reads the same key, a latent of C numbers with R rotated ones, and the value is that
latent: one page serves all heads. Letters: B sequences, T new tokens of each, N heads, C latent and
R rope width, P pages in the pool, S pages in a sequence's table.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend, hopper
from dsv3_jax.kernels.mla_decode.schedule import Schedule, make_schedule
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled

PACKAGE = "dsv3_jax.kernels.mla_decode"


class Pages(NamedTuple):
    """Queries of the new tokens, and a pool of pages that sequences hold by number."""

    q_latent: Float[Array, "B T N C"]
    q_rope: Float[Array, "B T N R"]
    latent: Float[Array, "P page C"] | BlockScaled
    k_rope: Float[Array, "P page R"]
    block_table: Int[Array, "B S"]
    lengths: Int[Array, " B"]


class Rows(NamedTuple):
    """The same with each sequence's rows one after the other."""

    q_latent: Float[Array, "B T N C"]
    q_rope: Float[Array, "B T N R"]
    latent: Float[Array, "B S C"]
    k_rope: Float[Array, "B S R"]
    lengths: Int[Array, " B"]

    def in_pages(self, page: int) -> Pages:
        """The rows as pages in order; `page` divides their number."""
        batch, count = self.latent.shape[0], self.latent.shape[1] // page
        latent, k_rope = (x.reshape(batch * count, page, -1) for x in (self.latent, self.k_rope))
        table = jnp.arange(batch * count, dtype=jnp.int32).reshape(batch, count)
        return Pages(self.q_latent, self.q_rope, latent, k_rope, table, self.lengths)


# Of the context, in the queries' dtype, and of its log-sum-exp, in float32.
Results = tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]


def mla_decode(
    pages: Pages,
    *,
    scale: float,
    schedule: Schedule | None = None,
    implementation: str | None = None,
) -> Results:
    """The latents that each new token sees, weighted by its softmax, and its log-sum-exp.

    The new tokens are already in the pages. Sequence b holds lengths[b] tokens, the T new ones
    last; its token i is row i % page of the pool's page block_table[b, i // page]. New token t sees
    tokens up to itself. A token that sees none (length 0) gets zeros, and a log-sum-exp below
    -1e29. What lies past a sequence's end must be finite, and its table entries past its last page
    are not read.

    A length may exceed the rows of the table, or be negative, where the cache is a piece of a
    longer one: results of pieces are put together by their log-sum-exp.

    `latent` may be E4M3 numbers with a scale for 128 of them (a pool [P, page, C] quantised per
    token); `k_rope` stays in the queries' dtype.

    `schedule` is what `plan` returned for these lengths: give it when several layers share it.
    Softmax and sums are float32; weights are rounded to the queries' dtype before they meet the
    latents. DeepSeek-V3:inference/model.py, `attn_impl="absorb"`; V3 report, section 2.1.1.

    Raises ValueError for shapes that do not fit together; NotImplementedError when an
    implementation asked for by name cannot.
    """
    check(pages)
    return backend.run(
        PACKAGE,
        "mla_decode",
        pages,
        scale=scale,
        schedule=schedule,
        implementation=implementation,
    )


def mla_decode_contiguous(
    rows: Rows,
    *,
    scale: float,
    schedule: Schedule | None = None,
    implementation: str | None = None,
) -> Results:
    """`mla_decode` for a cache that holds each sequence's rows one after the other."""
    check(rows)
    return backend.run(
        PACKAGE,
        "mla_decode_contiguous",
        rows,
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


def check(work: Pages | Rows) -> None:
    """Raises ValueError, naming values and rule, unless the operands fit together."""
    q_latent, q_rope, latent, k_rope = work[:4]
    batch, new, heads, width = q_latent.shape
    if q_rope.shape[:3] != (batch, new, heads):
        raise ValueError(f"q_rope {q_rope.shape} must begin as q_latent {q_latent.shape} does")
    if latent.shape[2] != width or k_rope.shape != (*latent.shape[:2], q_rope.shape[3]):
        raise ValueError(
            f"pages of latents {latent.shape} and of rope {k_rope.shape} must be [P, page, {width}]"
            f" and [P, page, {q_rope.shape[3]}], as the queries are"
        )
    if work.lengths.shape != (batch,):
        raise ValueError(f"lengths {work.lengths.shape} must be [{batch}]")
    if isinstance(work, Pages) and work.block_table.shape[:-1] != (batch,):
        raise ValueError(f"block_table {work.block_table.shape} must be [{batch}, S]")
    if isinstance(latent, BlockScaled) and latent.tile != PER_TOKEN:
        raise ValueError(f"latents in tiles of {latent.tile} must be in tiles of {PER_TOKEN}")
