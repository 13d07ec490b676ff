"""Attention of a few new tokens over a paged cache of latents: MLA's absorbed form, for decoding.

Every head reads the same key, a latent of C numbers with R rotated ones, and the value is that
latent: one page serves all heads. Letters: B sequences, T new tokens of each, N heads, C latent and
R rope width, P pages in the pool, S pages in a sequence's table.
"""

from typing import Any

from jaxtyping import Array, Int

from dsv3_jax.kernels import backend, hopper
from dsv3_jax.kernels.attention.api import Bias
from dsv3_jax.kernels.mla_decode.hopper_block import parts_of, reads
from dsv3_jax.kernels.mla_decode.kv_splits import KVSplits, split_kv
from dsv3_jax.kernels.mla_decode.operands import Pages, Results, Rows, check

PACKAGE = "dsv3_jax.kernels.mla_decode"


def mla_decode(
    pages: Pages,
    *,
    scale: float,
    schedule: KVSplits | None = None,
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

    `latent` may be E4M3 numbers with a scale for each token, a power of two, over which `k_rope` is
    then, in the queries' dtype: `operands.fp8_latents` and `scaled_keys`. Hopper's kernel then
    multiplies FP8 by FP8: a block's 64 rows of latent queries lose bits that are 2^-18 of the
    largest query, and their logits are within 2^-11 of themselves.

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
    schedule: KVSplits | None = None,
    bias: Bias | None = None,
    implementation: str | None = None,
) -> Results:
    """`mla_decode` for a cache that holds each sequence's rows one after the other.

    A bias is that of `mla_attention`, computed by `reference`.
    """
    check(rows)
    if bias is not None:
        how = {"scale": scale, "bias": bias}
        how |= {"implementation": backend.only_reference(implementation, "an attention bias")}
        return backend.run(PACKAGE, "mla_decode_contiguous", rows, **how)
    return backend.run(
        PACKAGE,
        "mla_decode_contiguous",
        rows,
        scale=scale,
        schedule=schedule,
        implementation=implementation,
    )


def plan(lengths: Int[Array, " B"], rows: int) -> KVSplits | None:
    """How a GPU's multiprocessors share the pages of sequences of these lengths; None elsewhere.

    `rows` is new tokens x heads of one device. The plan holds for every layer of a step.
    """
    return split_kv(lengths, parts_of(rows)) if _on_hopper() else None


def wants_pages(width: int, rope: int, dtype: Any) -> bool:
    """Whether the kernel that runs here reads pages of rows of `width` and `rope` numbers."""
    return _on_hopper() and reads(width, rope, dtype)


def _on_hopper() -> bool:
    """Whether Hopper's kernel would be tried here and can be compiled."""
    if "pallas_gpu" not in backend.candidates(backend.DEFAULT_ORDER):
        return False
    try:
        hopper.require()
    except NotImplementedError:
        return False  # `mla_decode` will say so
    return True
