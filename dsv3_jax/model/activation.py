"""SwiGLU, in a module of its own: the FP8 products fuse it with the quantising of their input."""

import jax
from jaxtyping import Array, Float


def swiglu(gate_up: Float[Array, "*B 2 F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
