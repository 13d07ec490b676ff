"""What latent attention reads and returns, paged or with rows in order; letters as in `api.py`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.quantization.block_scaled import BlockScaled, quantize


def latent_tile(width: int) -> tuple[int, int]:
    """The tile of FP8 latents of `width` numbers: a token's share one scale.

    E4M3 keeps its four bits over 15 powers of two, and a normed latent's numbers lie closer: off by
    2.66 % where they are normal, 2.57 if each 128 had a scale in float32; with heavy tails 2.7 and
    2.2 (docs/log.md, 2026-12-01).
    """
    return 1, width


def fp8_latents(latent: Float[Array, "*B T C"]) -> BlockScaled:
    """Latents as an FP8 cache holds them: E4M3, and a power of two for each token."""
    return quantize(latent, latent_tile(latent.shape[-1]), "ue8m0")


def scaled_keys(
    latent: Float[Array, "*B T C"] | BlockScaled, k_rope: Float[Array, "*B T R"]
) -> Float[Array, "*B T R"]:
    """Rotated keys as a cache holds them beside such latents.

    Over a token's scale where that is FP8, so that both parts of a score are added up by one
    product: exactly, as the scale is a power of two.
    """
    if not isinstance(latent, BlockScaled):
        return k_rope
    return (k_rope.astype(jnp.float32) / latent.scales).astype(k_rope.dtype)


def rotated_keys(
    latent: Float[Array, "*B T C"] | BlockScaled, k_rope: Float[Array, "*B T R"]
) -> Float[Array, "*B T R"]:
    """Rotated keys as they were before `scaled_keys`."""
    if not isinstance(latent, BlockScaled):
        return k_rope
    return (k_rope.astype(jnp.float32) * latent.scales).astype(k_rope.dtype)


class Pages(NamedTuple):
    """Queries of the new tokens, and a pool of pages that sequences hold by number.

    Latents are as they are or as `fp8_latents` makes them, and `k_rope` as `scaled_keys` does.
    """

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
        return Pages(
            q_latent=self.q_latent,
            q_rope=self.q_rope,
            latent=latent,
            k_rope=k_rope,
            block_table=table,
            lengths=self.lengths,
        )


# Of the context, in the queries' dtype, and of its log-sum-exp, in float32.
Results = tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]


def check(work: Pages | Rows) -> None:
    """Raises ValueError, naming values and rule, unless the operands fit together."""
    q_latent, q_rope, latent, k_rope = work.q_latent, work.q_rope, work.latent, work.k_rope
    batch, new, heads, width = q_latent.shape
    if q_rope.shape[:3] != (batch, new, heads):
        raise ValueError(
            f"q_rope {q_rope.shape} and q_latent {q_latent.shape} must share [B, T, N]"
        )
    if latent.shape[2] != width or k_rope.shape != (*latent.shape[:2], q_rope.shape[3]):
        raise ValueError(
            f"pages of latents {latent.shape} and of rope {k_rope.shape} must be [P, page, {width}]"
            f" and [P, page, {q_rope.shape[3]}], as the queries are"
        )
    if work.lengths.shape != (batch,):
        raise ValueError(f"lengths {work.lengths.shape} must be [{batch}]")
    if isinstance(work, Pages) and work.block_table.shape[:-1] != (batch,):
        raise ValueError(f"block_table {work.block_table.shape} must be [{batch}, S]")
    if isinstance(latent, BlockScaled) and latent.tile != latent_tile(width):
        raise ValueError(
            f"latents in tiles of {latent.tile} must be in tiles of {latent_tile(width)}"
        )
