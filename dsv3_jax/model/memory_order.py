"""How the residual stream lies in a GPU's or a TPU's memory.

XLA chooses the order of an array's dims in memory by what its products read fastest. On GPUs it
took [D, tokens] for the residual in a BF16 step, in which norms and the gather of experts' rows
take four to eight times as long. On TPUs it took [tokens, D, sequences] for half of a batch: of one
sequence a device, which is filled up to the 128 lanes of a tile, 7 GiB in place of 56 MiB
(docs/log.md).
"""

from jax.experimental.layout import Layout as MemoryOrder
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Float

from dsv3_jax.kernels import backend
from dsv3_jax.parallel.sharding import Layout

_ROWS = MemoryOrder(major_to_minor=(0, 1, 2))


def token_by_token(x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
    """x, and its gradient, with a token's numbers side by side, compiled for GPUs and TPUs.

    On other platforms XLA chooses, and where TPUs decode one token of each sequence. x is laid out
    ("batch", "residual"); raises nothing of its own.
    """
    platform = backend.platform()
    one_token = x.shape[1] == 1  # a TPU's tile has eight: sequences fill it, in another order
    if platform != "gpu" and (platform != "tpu" or one_token):
        return x
    spec = layout.spec("batch", "residual")
    return layout.shard_map(lambda x: with_layout_constraint(x, _ROWS), spec, spec)(x)
