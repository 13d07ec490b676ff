"""How the residual stream lies in a GPU's memory.

XLA chooses the order of an array's dims in memory by what its products read fastest. In a BF16 step
it took [D, tokens] for the residual, in which norms and the gather of experts' rows take four to
eight times as long (docs/log.md).
"""

from jax.experimental.layout import Layout as MemoryOrder
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Float

from dsv3_jax.kernels import backend
from dsv3_jax.parallel.sharding import Layout

_ROWS = MemoryOrder(major_to_minor=(0, 1, 2))


def token_by_token(x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
    """x, and its gradient, with a token's numbers side by side where it is compiled for GPUs.

    On other platforms XLA chooses. x is laid out ("batch", "residual"); raises nothing of its own.
    """
    if backend.platform() != "gpu":
        return x
    spec = layout.spec("batch", "residual")
    return layout.shard_map(lambda x: with_layout_constraint(x, _ROWS), spec, spec)(x)
