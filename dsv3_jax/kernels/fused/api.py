"""Quantisers fused with what comes before them, and the router: each input is read once.

Letters: T tokens, D channels, F expert hidden, E experts, K experts of a token. Values are E4M3 in
1x128 tiles, what a GEMM reads as its first operand; their scales lie rows last in memory, as the
GPU kernels want them. Of rows that are grouped by expert, with room for more, the first `used` are
quantised, up to whole tiles; what the result has for others is unspecified.
"""

from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.partition import Cut
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat
from dsv3_jax.quantization.e5m6 import E5M6

PACKAGE = "dsv3_jax.kernels.fused"
# The router has no kernel on TPUs, and needs none there: XLA makes one of it.
ROUTER_ORDER = {**backend.DEFAULT_ORDER, "tpu": ("reference",)}

# Dims of values and scales, and what of them may not be cut apart: see `kernels.partition`.
BY_TOKEN = (("t", "d"), ("t", "d/128"))
BY_CHANNEL = (("d", "t"), ("d", "t/128"))
PACKED = (("t", "word", "d/8"), ("t", "d/128"))  # E5M6
TILES = {"t": 128, "d": 128}
_BOTH = (("t", "both"), ("t", "both/128"))


def quantize_rows(
    x: Float[Array, "T D"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> BlockScaled:
    """x quantised per token, [T, D] in 1x128 tiles."""
    cut = Cut(BY_TOKEN[:1], BY_TOKEN, {"t": 1, "d": 128})
    return _run(
        "quantize_rows",
        x,
        implementation=implementation,
        cut=cut,
        used=used,
        scale_format=scale_format,
    )


def quantize_rows_in_two_formats(
    x: Float[Array, "T D"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> tuple[BlockScaled, E5M6]:
    """x quantised per token, and x in E5M6 (`e5m6.encode`), both from one read.

    What the projection after attention multiplies, and what is kept of it (V3 report, section
    3.3.3).
    """
    cut = Cut(BY_TOKEN[:1], (*BY_TOKEN, *PACKED), {"t": 1, "d": 128})
    return _run(
        "quantize_rows_in_two_formats",
        x,
        implementation=implementation,
        cut=cut,
        scale_format=scale_format,
    )


def quantize_both_ways(
    x: Float[Array, "T D"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[BlockScaled, BlockScaled]:
    """x quantised per token, and x.T [D, T] quantised along tokens, both from one read.

    The first feeds the input gradient's product, the second the weight gradient's, which contracts
    over tokens and must find them last in memory (V3 report, section 3.3.2).
    """
    cut = Cut((BY_TOKEN[0],), (*BY_TOKEN, *BY_CHANNEL), TILES)
    return _run(
        "quantize_both_ways",
        x,
        implementation=implementation,
        cut=cut,
        used=used,
        scale_format=scale_format,
    )


def gather_quantize_both_ways(
    x: Float[Array, "T D"],
    tokens: Int[Array, " M"],
    weights: Float[Array, " M"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[BlockScaled, BlockScaled]:
    """x[tokens[m]] times weights[m] as row m, rounded to x's dtype, as by `quantize_both_ways`.

    Zeros where tokens[m] is T. Weights are float32. The gradient of what a token's experts make,
    for those that sum it up by weights: the M rows are never an array.
    """
    return _run(
        "gather_quantize_both_ways",
        x,
        tokens,
        weights,
        implementation=implementation,
        cut=None,  # tokens are rows of one device
        used=used,
        scale_format=scale_format,
    )


def quantize_blocks(
    x: Float[Array, "*E N K"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> tuple[BlockScaled, BlockScaled]:
    """A weight in tiles of 128 x 128, and the same numbers transposed [*E, K, N], from one read.

    The first is what forward products read, the second what the input gradient's does: FP8 tensor
    cores find the contracted dim last in memory. Leading dims are free: layers, experts.
    """
    *lead, rows, columns = x.shape
    cut = None
    if not lead:
        numbers, scales = ("e", "n", "k"), ("e", "n/128", "k/128")
        turned = ("e", "k", "n"), ("e", "k/128", "n/128")
        cut = Cut((numbers,), (numbers, scales, *turned), {"n": 128, "k": 128})
    # A stack of one matrix has the kernel of a matrix: kernels take their time to compile.
    stack = x.reshape(-1, rows, columns)
    as_is, turned_over = _run(
        "quantize_blocks", stack, implementation=implementation, cut=cut, scale_format=scale_format
    )

    def of_lead(one: BlockScaled) -> BlockScaled:
        values, scales = (x.reshape(*lead, *x.shape[1:]) for x in (one.values, one.scales))
        return BlockScaled(values, scales, one.tile)

    return of_lead(as_is), of_lead(turned_over)


def quantize_transposed(
    x: Float[Array, "T D"] | BlockScaled | E5M6,
    scale_format: ScaleFormat = "f32",
    *,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> BlockScaled:
    """x.T [D, T] quantised along tokens; x may have been quantised along channels, or be E5M6.

    What a weight gradient needs of an activation, kept as it was or as its product read it.
    """
    operands = BY_TOKEN[:1]
    if isinstance(x, BlockScaled):
        _check_per_token(x)
        operands = BY_TOKEN
    elif isinstance(x, E5M6):
        operands = PACKED
    return _run(
        "quantize_transposed",
        x,
        implementation=implementation,
        cut=Cut(operands, BY_CHANNEL, TILES),
        used=used,
        scale_format=scale_format,
    )


def swiglu_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    scale_format: ScaleFormat = "f32",
    *,
    transposed: bool = False,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> BlockScaled:
    """silu(gate) x up quantised per token, [T, F]; gate is the first half of the channels.

    `transposed`: [F, T] instead, quantised along tokens, for a weight gradient. Computed in float32
    and rounded once to the input's dtype (bfloat16 for a block-scaled one) before it is quantised.
    """
    _check_gate_up(gate_up)
    # Gate and up lie side by side: a piece of the channels would have only one of them.
    operands = _BOTH if isinstance(gate_up, BlockScaled) else _BOTH[:1]
    cut = Cut(operands, BY_CHANNEL if transposed else BY_TOKEN, {"t": 128 if transposed else 1})
    return _run(
        "swiglu_quantize",
        gate_up,
        implementation=implementation,
        cut=cut,
        used=used,
        scale_format=scale_format,
        transposed=transposed,
    )


def swiglu_backward_quantize(
    gate_up: Float[Array, "T F2"] | BlockScaled,
    d_out: Float[Array, "T F"],
    scale_format: ScaleFormat = "f32",
    *,
    used: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[BlockScaled, BlockScaled]:
    """The gradient of `gate_up` for that of silu(gate) x up, as `quantize_both_ways` gives it.

    Computed in float32 and rounded once to the input's dtype (bfloat16 for a block-scaled one)
    before it is quantised.
    """
    _check_gate_up(gate_up)
    if d_out.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"d_out {d_out.shape} must be half as wide as gate_up {gate_up.shape}")
    operands = _BOTH if isinstance(gate_up, BlockScaled) else _BOTH[:1]
    results = (*_BOTH, ("both", "t"), ("both", "t/128"))
    return _run(
        "swiglu_backward_quantize",
        gate_up,
        d_out,
        implementation=implementation,
        used=used,
        cut=Cut((*operands, BY_TOKEN[0]), results, {"t": 128}),
        scale_format=scale_format,
    )


def rms_norm_quantize(
    x: Float[Array, "T D"],
    weight: Float[Array, " D"],
    eps: float,
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> BlockScaled:
    """x over its root mean square, times weight, quantised per token.

    Float32 throughout: unlike the unfused form, the normalised numbers are never rounded to x's
    dtype.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {weight.shape} must have one number for each channel of {x.shape}"
        )
    return _run(
        "rms_norm_quantize",
        x,
        weight,
        implementation=implementation,
        cut=Cut((BY_TOKEN[0], ("d",)), BY_TOKEN, {"t": 1}),
        eps=eps,
        scale_format=scale_format,
    )


def permute_quantize(
    x: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    tokens: Int[Array, " M"],
    scale_format: ScaleFormat = "f32",
    *,
    implementation: str | None = None,
) -> BlockScaled:
    """x quantised per token and sent to its experts: token t's numbers in rows slots[t] of M.

    The same twice: slots are int32, all different and below M; tokens[m] is the token of row m, T
    for rows that none is sent to, which are zeros. x is read once, however many experts a token
    has.
    """
    if slots.ndim != 2 or slots.shape[0] != x.shape[0] or slots.size > tokens.size:
        raise ValueError(
            f"slots {slots.shape} must have a row for each token of {x.shape}, and no more entries "
            f"than the {tokens.size} rows"
        )
    return _run(
        "permute_quantize",
        x,
        slots,
        tokens,
        implementation=implementation,
        cut=None,  # slots are rows of one device
        scale_format=scale_format,
    )


def route_top_k(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    best_of_group: int = 2,
    implementation: str | None = None,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Each token's K experts, best first, with their scores; and the scores of all experts.

    Scores are sigmoids of the logits, float32. Experts are chosen by score + bias among those of
    the topk_group best groups, a group counting for the sum of its best_of_group best (V3 report,
    eqs. 12-16). What is returned knows no bias. The first of equals wins.
    """
    experts = logits.shape[1]
    if logits.dtype != "float32" or bias.shape != (experts,):
        raise ValueError(f"logits must be float32, and are {logits.dtype}; bias {bias.shape}")
    if experts % n_group or not top_k <= topk_group * (experts // n_group) <= experts:
        raise ValueError(
            f"{experts} experts in {n_group=} groups, {topk_group=} of them kept: {top_k=} experts "
            "must fit in these, and groups must be of one size"
        )
    return _run(
        "route_top_k",
        logits,
        bias,
        implementation=implementation,
        cut=Cut((("t", "e"), ("e",)), (("t", "k"), ("t", "k"), ("t", "e")), {"t": 1}),
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        best_of_group=best_of_group,
        order=ROUTER_ORDER,
    )


def _check_per_token(x: BlockScaled) -> None:
    if x.ndim != 2 or x.tile != PER_TOKEN:
        raise ValueError(f"x {x.shape} in tiles {x.tile} must be [T, D] in tiles of {PER_TOKEN}")


def _check_gate_up(gate_up: Array | BlockScaled) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up {gate_up.shape} must hold gate and up, an even number of channels"
        )
    if isinstance(gate_up, BlockScaled):
        _check_per_token(gate_up)


def _run(op: str, *arrays, implementation: str | None, cut: Cut | None, **options):
    if options.get("used") is not None:
        cut = None  # rows of experts are one device's
    return backend.run(PACKAGE, op, *arrays, implementation=implementation, cut=cut, **options)
