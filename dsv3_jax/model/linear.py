"""The linear map of every projection; the one place that decides in which format it multiplies."""

import jax
from jaxtyping import Array, Float


def linear(x: Float[Array, "*B K"], weight: Float[Array, "*N K"]) -> Float[Array, "..."]:
    """x times the transposed weight, in x's dtype: [*B, K] by [*N, K] gives [*B, *N].

    The weight keeps its leading dims, so a [N, H, D] projection yields heads without a reshape.
    """
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), contract)
