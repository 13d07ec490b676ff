"""Dense products of block-scaled FP8 numbers, as the V3 report's linear layers need them.

Letters: M rows, N columns, K the contracted dimension. Both operands hold K last ("K-major"), the
only layout that Hopper's FP8 tensor cores read: a weight is [N, K], as in the checkpoints, and an
operand of a weight gradient is quantised along tokens and transposed first (`BlockScaled.mT`).
"""

from jaxtyping import Array, Float

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.partition import Cut
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled

PACKAGE = "dsv3_jax.kernels.gemm"


def scaled_matmul(
    a: BlockScaled,
    b: BlockScaled,
    *,
    accumulate: Float[Array, "M N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """a @ b.T, with partial sums taken to float32 and scaled after every 128 of K.

    `a` is [M, K] in tiles of 1x128. The tile of `b` [N, K] says which product it is:
      128x128  activations by weights; returns bfloat16 (forward and input gradient).
      1x128    both operands quantised along K; returns float32, added to `accumulate` when given
               (weight gradient: K counts tokens, and sums over micro-batches stay in float32).

    K must be a multiple of 128 and N of 8; M is free. V3 report, section 3.3.2: the tensor core
    keeps about 14 bits while it adds FP8 products, hence the promotion every 128.

    Raises ValueError for shapes, tiles or dtypes that break these rules; NotImplementedError when
    an implementation asked for by name cannot.
    """
    check(a, b, accumulate)
    operands = (a, b) if accumulate is None else (a, b, accumulate)
    return backend.run(
        PACKAGE,
        "scaled_matmul",
        *operands,
        implementation=implementation,
        cut=_cut(b.tile == PER_BLOCK, accumulate is not None),
    )


def scaled_wgrad(
    a: BlockScaled,
    b: BlockScaled,
    total: GradientSum,
    *,
    implementation: str | None = None,
) -> None:
    """Leaves `scaled_matmul` of two operands in tiles of 1x128, a weight's gradient, in `total`."""
    check(a, b, None)
    if b.tile != PER_TOKEN or total.total.shape[1:] != (1, a.shape[0], b.shape[0]):
        raise ValueError(
            f"b has tiles {b.tile}, which must be {PER_TOKEN}; total {total.total.shape} must be "
            f"[layers, 1, {a.shape[0]}, {b.shape[0]}]"
        )
    backend.run(PACKAGE, "scaled_wgrad", a, b, total, implementation=implementation)


def _cut(by_blocks: bool, accumulates: bool) -> Cut:
    """How a product may be cut over devices; partial sums cannot each begin with what is there."""
    scales = ("n/128", "k/128") if by_blocks else ("n", "k/128")
    operands = (("m", "k"), ("m", "k/128"), ("n", "k"), scales)
    whole = {"m": 1, "n": 128 if by_blocks else 8}
    if accumulates:
        return Cut((*operands, ("m", "n")), (("m", "n"),), whole)
    return Cut(operands, (("m", "n"),), {**whole, "k": 128})


def check(a: BlockScaled, b: BlockScaled, accumulate: Array | None) -> None:
    """Raises ValueError, naming values and rule, unless a @ b.T is a product this room has."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {a.shape} and b {b.shape} must be [M, K] and [N, K] with the same K")
    if a.tile != PER_TOKEN or b.tile not in (PER_BLOCK, PER_TOKEN):
        raise ValueError(
            f"tiles {a.tile} by {b.tile} must be {PER_TOKEN} by {PER_BLOCK}, or by {PER_TOKEN} for "
            "a float32 result"
        )
    if a.shape[1] % 128 or b.shape[0] % 8:
        raise ValueError(f"K={a.shape[1]} must be a multiple of 128, and N={b.shape[0]} of 8")
    if accumulate is None:
        return
    if b.tile == PER_BLOCK:
        raise ValueError("accumulate needs b in tiles of 1x128: a product by weights returns bf16")
    expected = (a.shape[0], b.shape[0])
    if accumulate.shape != expected or accumulate.dtype != "float32":
        raise ValueError(
            f"accumulate is {accumulate.dtype} {accumulate.shape}; it must be float32 {expected}"
        )
