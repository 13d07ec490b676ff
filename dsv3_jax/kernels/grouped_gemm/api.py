"""Products of rows grouped by expert: each group of rows meets the weights of its own expert.

Letters: M rows, N columns, K the contracted dimension, E experts (groups). Rows of a group are
contiguous and groups follow each other in order; a group's size is a multiple of `alignment`, its
padding included, and may be 0. Sizes live on the device, so one compiled step serves any routing.
Rows beyond the last group belong to nobody: their results are zero.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.sums import GradientSum
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled

PACKAGE = "dsv3_jax.kernels.grouped_gemm"

# XLA:CPU computes the reference's ragged_dot densely over all experts; blocks.py does not.
ORDER: Mapping[str, tuple[str, ...]] = {**backend.DEFAULT_ORDER, "cpu": ("blocks", "reference")}

# A GEMM tile of a GPU or TPU kernel never spans two experts, and 128 rows are the smallest tile
# whose weights are read often enough to keep the matrix units busy.
KERNEL_ALIGNMENT = 128


def row_alignment(entries: int, experts: int, implementation: str | None = None) -> int:
    """Rows that each group should be padded to a multiple of, for `entries` rows in all.

    128 for the kernels of accelerators. The plain implementations work with any: the loop over
    blocks takes as many rows as make a product worth its overhead (up to 64, half a group at
    most), and padding only costs the reference time (8 at most, fewer when groups are small).
    """
    first = backend.candidates(ORDER, implementation)[0]
    if first.startswith("pallas"):
        return KERNEL_ALIGNMENT
    per_expert = max(entries // max(experts, 1), 1)
    if first == "blocks":
        return min(64, 1 << (max(per_expert // 2, 1).bit_length() - 1))
    return min(8, 1 << (per_expert.bit_length() - 1))


def grouped_matmul(
    rows: Float[Array, "M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = KERNEL_ALIGNMENT,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Each row times its group's weights, rows @ weights[group].T.

    Plain operands share a dtype, which is the result's, and sums are float32; this form can be
    differentiated in both. Block-scaled operands are 1x128 rows by 128x128 weights, the result is
    bfloat16 and the derivative is the caller's (its operands must be quantised again).

    `group_sizes` is int32, each a multiple of `alignment`, with a sum of at most M; values that
    break this are not seen before the kernel runs and give wrong rows, never wrong memory.
    The contiguous layout is that of DeepGEMM's m_grouped_fp8_gemm_nt_contiguous.
    """
    _check_rows_and_weights(rows, weights, group_sizes)
    return backend.run(
        PACKAGE,
        "grouped_matmul",
        rows,
        weights,
        group_sizes,
        alignment=alignment,
        order=ORDER,
        implementation=implementation,
    )


def grouped_dgrad(
    d_out: Float[Array, "M N"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    alignment: int = KERNEL_ALIGNMENT,
    implementation: str | None = None,
) -> Float[Array, "M K"]:
    """The rows' gradient of `grouped_matmul` of plain operands: d_out @ weights[group].

    Weights are read as they lie; operands share a dtype, which is the result's.
    """
    if d_out.ndim != 2 or weights.ndim != 3 or d_out.shape[1] != weights.shape[1]:
        raise ValueError(f"d_out {d_out.shape} and weights {weights.shape} must share N")
    if d_out.dtype != weights.dtype:
        raise ValueError(f"d_out is {d_out.dtype} and weights {weights.dtype}; they must agree")
    return backend.run(
        PACKAGE,
        "grouped_dgrad",
        d_out,
        weights,
        group_sizes,
        alignment=alignment,
        order=ORDER,
        implementation=implementation,
    )


def masked_grouped_matmul(
    rows: Float[Array, "E M K"] | BlockScaled,
    weights: Float[Array, "E N K"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "E M N"]:
    """Each expert's first group_sizes[e] rows times its weights; rows beyond them are unspecified.

    The decode form: every expert owns a buffer of M rows, of which some hold tokens. Any size from
    0 to M. Reading the weights of the experts in use is nearly all of its time. The layout is that
    of DeepGEMM's m_grouped_fp8_gemm_nt_masked.
    """
    if rows.ndim != 3 or rows.shape[0] != weights.shape[0]:
        raise ValueError(f"rows {rows.shape} must be [E, M, K] with {weights.shape[0]} experts")
    _check_rows_and_weights(rows, weights, group_sizes)
    return backend.run(
        PACKAGE,
        "masked_grouped_matmul",
        rows,
        weights,
        group_sizes,
        implementation=implementation,
    )


def grouped_wgrad(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    *,
    accumulate: Float[Array, "E N K"] | None = None,
    alignment: int = KERNEL_ALIGNMENT,
    implementation: str | None = None,
) -> Float[Array, "E N K"]:
    """Each expert's weight gradient a[:, group] @ b[:, group].T in float32, plus `accumulate`.

    The contracted dimension is the rows, cut into groups as in `grouped_matmul`; an empty group
    gives zeros. Operands hold it last: `a` is the output's gradient and `b` the input, both
    transposed, and both quantised in 1x128 tiles along rows when block-scaled (`alignment` must
    then be a multiple of 128). DeepGEMM's k_grouped_fp8_gemm.
    """
    _check_wgrad(a, b, alignment)
    expected = (group_sizes.shape[0], a.shape[0], b.shape[0])
    if accumulate is not None and (accumulate.shape != expected or accumulate.dtype != "float32"):
        raise ValueError(
            f"accumulate is {accumulate.dtype} {accumulate.shape}; it must be float32 {expected}"
        )
    return backend.run(
        PACKAGE,
        "grouped_wgrad",
        a,
        b,
        group_sizes,
        accumulate=accumulate,
        alignment=alignment,
        order=ORDER,
        implementation=implementation,
    )


def grouped_wgrad_into(
    a: Float[Array, "N M"] | BlockScaled,
    b: Float[Array, "K M"] | BlockScaled,
    group_sizes: Int[Array, " E"],
    into: GradientSum,
    *,
    alignment: int = KERNEL_ALIGNMENT,
    implementation: str | None = None,
) -> None:
    """Leaves `grouped_wgrad`, a layer's gradient, in its place."""
    _check_wgrad(a, b, alignment)
    expected = (group_sizes.shape[0], a.shape[0], b.shape[0])
    if into.total.shape[1:] != expected:
        dims = ", ".join(map(str, expected))
        raise ValueError(f"total {into.total.shape} must be [layers, {dims}]")
    backend.run(
        PACKAGE,
        "grouped_wgrad_into",
        a,
        b,
        group_sizes,
        into,
        alignment=alignment,
        order=ORDER,
        implementation=implementation,
    )


def _check_wgrad(a: Array | BlockScaled, b: Array | BlockScaled, alignment: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {a.shape} and b {b.shape} must be [N, M] and [K, M] with the same M")
    if isinstance(a, BlockScaled) != isinstance(b, BlockScaled):
        raise ValueError("a and b must both be block-scaled, or neither")
    if isinstance(a, BlockScaled) and isinstance(b, BlockScaled):
        if not a.tile == b.tile == PER_TOKEN:
            raise ValueError(f"tiles {a.tile} and {b.tile} must both be {PER_TOKEN}")
        if alignment % 128:
            raise ValueError(f"{alignment=} must be a multiple of 128: scales may not span groups")


def _check_rows_and_weights(
    rows: Array | BlockScaled, weights: Array | BlockScaled, group_sizes: Array
) -> None:
    if rows.ndim < 2 or weights.ndim != 3 or rows.shape[-1] != weights.shape[-1]:
        raise ValueError(f"rows {rows.shape} and weights {weights.shape} must share their last dim")
    if group_sizes.shape != weights.shape[:1] or group_sizes.dtype != "int32":
        raise ValueError(
            f"group_sizes is {group_sizes.dtype} {group_sizes.shape}; it must be int32 with one "
            f"size for each of the {weights.shape[0]} experts"
        )
    if isinstance(rows, BlockScaled) != isinstance(weights, BlockScaled):
        raise ValueError("rows and weights must both be block-scaled, or neither")
    if isinstance(rows, BlockScaled) and isinstance(weights, BlockScaled):
        if rows.tile != PER_TOKEN or weights.tile != PER_BLOCK:
            raise ValueError(
                f"tiles {rows.tile} by {weights.tile} must be {PER_TOKEN} by {PER_BLOCK}"
            )
        if rows.shape[-1] % 128 or weights.shape[1] % 8:
            raise ValueError(
                f"K={rows.shape[-1]} must be a multiple of 128, and N={weights.shape[1]} of 8"
            )
    elif rows.dtype != weights.dtype:
        raise ValueError(f"rows are {rows.dtype} and weights {weights.dtype}; they must agree")
