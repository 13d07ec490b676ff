"""FP8 numbers with one scale a tile: DeepSeek-V3's 1x128 activations and 128x128 weights.

The one idea: a tensor's last two dims are cut into tiles, each tile is divided by its own scale so
that its largest magnitude becomes E4M3's 448, and the numbers travel with their scales as one
pytree. Every kind of tile is the same code: 1x128 (a token's 128 channels), 128x1 (a channel of
128 tokens, for weight gradients), 128x128 (weights). Scales come from the numbers at hand, not
from a history of earlier ones (V3 report, section 3.3.2). What is quantised when is the model's
choice, and multiplications of these numbers are the kernels' work.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

E4M3_MAX = 448.0
# An all-zero tile would divide by zero; DeepGEMM, DeepEP and DeepSeek's kernel.py share this floor.
AMAX_FLOOR = 1e-4

PER_TOKEN = (1, 128)  # activations, along channels
PER_CHANNEL = (128, 1)  # activations again, along tokens, for the weight gradient
PER_BLOCK = (128, 128)  # weights

# "f32": amax / 448 as it is. "ue8m0": rounded up to a power of two, so that scaling is exact.
ScaleFormat = Literal["f32", "ue8m0"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["tile"]
)
@dataclass(frozen=True)
class BlockScaled:
    """FP8 numbers and their scales: each number is its value times the scale of its tile.

    Fields:
        values: float8_e4m3fn [..., M, K]; or its bytes, see `as_bytes`.
        scales: float32 [..., ceil(M / tile[0]), ceil(K / tile[1])], multipliers like a
            checkpoint's `weight_scale_inv`. The last tile of a row or column may be partial.
            Float32 in either scale format, because that is what Hopper's kernels read; in
            "ue8m0" each is a power of two.
        tile: rows and columns that share a scale; part of the tree's structure, not a leaf.

    Leading dims (layers, experts) are free: `jax.lax.scan` and `jax.tree.map` slice them. Source:
    V3 report, section 3.3.2.
    """

    values: Any
    scales: Any
    tile: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of dims of the numbers."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the values, float8_e4m3fn or, of bytes, uint8."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def mT(self) -> "BlockScaled":
        """The same numbers with the last two dims swapped, tiles and scales with them."""
        return BlockScaled(self.values.mT, self.scales.mT, (self.tile[1], self.tile[0]))


class StraightThrough(NamedTuple):
    """Block-scaled numbers that a gradient flows back from, as if they had never been rounded.

    The cotangent of FP8 values would be FP8 itself. The gradient takes another way: `carrier` has
    the numbers' shape and the gradient's dtype. Its values are zeros that nobody reads; its
    cotangent is the gradient.
    """

    numbers: BlockScaled
    carrier: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return self.carrier.shape

    @property
    def dtype(self) -> Any:
        """The dtype that the numbers would have if they had not been quantised."""
        return self.carrier.dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "numbers", "transposed", "gradient"],
    meta_fields=[],
)
@dataclass(frozen=True)
class StepWeight:
    """A weight and what the products of one step read of it, made once and not in every layer pass.

    Fields:
        master: the weight that is trained, [*E, *N, *K]. A step's products do not read its values;
            its cotangent is the gradient.
        numbers: the matrix [*E, N, K], in tiles of 128 x 128 with zeros up to whole ones; or the
            weight, shaped as the master, in the dtype of the model's activations.
        transposed: the very same BlockScaled numbers as [*E, K, N]; None where they are not that.
        gradient: where products leave the gradient (kernels/sums.py); None: it is the master's
            cotangent, which otherwise is zero.
    """

    master: Any
    numbers: Any
    transposed: Any = None
    gradient: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.master.shape

    @property
    def ndim(self) -> int:
        """Number of dims of the weight."""
        return self.master.ndim

    @property
    def dtype(self) -> Any:
        """The dtype that it is trained in."""
        return self.master.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: Any) -> "StepWeight":
        """Itself: in which format it is multiplied is settled."""
        del dtype
        return self

    def reshape(self, *shape: int) -> "StepWeight":
        """The same matrix known by another shape."""
        scaled = isinstance(self.numbers, BlockScaled)
        numbers = self.numbers if scaled else self.numbers.reshape(*shape)
        return replace(self, master=self.master.reshape(*shape), numbers=numbers)


def is_step_weight(node: Any) -> bool:
    """Whether a node of a tree is a StepWeight, as `is_leaf` of jax.tree."""
    return isinstance(node, StepWeight)


def quantize(
    x: Float[Array | np.ndarray, "*batch M K"],
    tile: tuple[int, int],
    scale_format: ScaleFormat = "f32",
) -> BlockScaled:
    """`x` as E4M3 values with one scale per tile of its last two dims.

    Rounds to nearest even and never overflows. A tile of zeros keeps a positive scale. NaN stays
    NaN, and an infinity, which E4M3 lacks, becomes NaN rather than a plausible 448: a diverging run
    must be seen. Neither spoils the rest of its tile, whose scale comes from the finite numbers. It
    has no useful derivative; callers own theirs.

    Any float dtype, computed in f32. Source: `act_quant` of DeepSeek-V3's inference/kernel.py
    and DeepGEMM's cast helpers; like the latter's it multiplies by 1 / scale.

    Raises ValueError for fewer than two dims, a tile of no elements or an unknown scale format.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> made = ds.quantize(jnp.ones((256, 256)), ds.PER_BLOCK)
    >>> made.values.dtype, made.scales.shape
    (dtype(float8_e4m3fn), (2, 2))
    """
    _check(x.shape, tile)
    tiles = _cut(jnp.asarray(x, jnp.float32), tile)
    finite = jnp.where(jnp.isfinite(tiles), jnp.abs(tiles), 0)
    amax = jnp.max(finite, axis=(-3, -1), keepdims=True)
    scale = scale_of_amax(amax, scale_format)
    values = round_to_e4m3(tiles, scale)
    return BlockScaled(_join(values, x.shape), jnp.squeeze(scale, (-3, -1)), tile)


def round_to_e4m3(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Numbers over their scales, which x's shape takes by broadcasting, as E4M3 values.

    x and scale: float32; the scale is `scale_of_amax` of the largest finite magnitude. What is not
    finite becomes NaN.
    """
    # XLA:GPU takes a cast and the cast back for excess precision and drops both: without this,
    # what is dequantised in the same program would never have been rounded.
    return jax.lax.optimization_barrier(over_scale(x, scale).astype(jnp.float8_e4m3fn))


def over_scale(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """What `round_to_e4m3` casts, float32: numbers that E4M3 reaches, and NaN."""
    # The rounding of `scale` can leave amax one part in 2^23 above 448, hence the clip: on its own
    # the cast turns what is too large into NaN.
    scaled = jnp.clip(x * (1 / scale), -E4M3_MAX, E4M3_MAX)
    return jnp.where(jnp.isfinite(x), scaled, jnp.nan)


def as_bytes(x: BlockScaled) -> BlockScaled:
    """The same numbers with values of uint8, which only `dequantize` reads.

    XLA:CPU knows no float8: to cut a layer from a stack it would widen the whole stack to float16.
    """
    return replace(x, values=jax.lax.bitcast_convert_type(x.values, jnp.uint8))


def dequantize(x: BlockScaled, dtype: Any = jnp.bfloat16) -> Float[Array, "*batch M K"]:
    """The numbers of `x` in `dtype`: the product with the scale in f32, rounded once.

    Raises nothing of its own. Source: DeepSeek-V3:inference/kernel.py, weight_dequant.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> ds.dequantize(ds.quantize(jnp.full((1, 128), 0.1), ds.PER_TOKEN))[0, 0]
    Array(0.100098, dtype=bfloat16)
    """
    values = x.values
    if values.dtype == jnp.uint8:
        values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    tiles = _cut(values.astype(jnp.float32), x.tile)
    return _join(tiles * x.scales[..., :, None, :, None], x.shape).astype(dtype)


def requantize(
    x: BlockScaled, tile: tuple[int, int], scale_format: ScaleFormat = "f32"
) -> BlockScaled:
    """The numbers of `x` rounded a second time, with another tile.

    The weight gradient contracts over tokens, so activations kept as 1x128 become 128x1 (V3
    report, section 3.3.2). With "ue8m0" in both, only what falls among the subnormals of its new
    tile is rounded again.
    """
    return quantize(dequantize(x, jnp.float32), tile, scale_format)


def split_tiles(x: BlockScaled, tile: tuple[int, int]) -> BlockScaled:
    """The very same numbers in smaller tiles, each with the scale of the tile it was part of.

    Lets a kernel for 1x128 operands multiply what was scaled per 128x128 block.

    Raises ValueError when `tile` does not divide that of `x`.
    """
    if x.tile[0] % tile[0] or x.tile[1] % tile[1]:
        raise ValueError(f"{tile=} must divide the tile {x.tile}")
    scales = jnp.repeat(x.scales, x.tile[0] // tile[0], -2)
    scales = jnp.repeat(scales, x.tile[1] // tile[1], -1)
    rows, columns = scales_shape(x.shape, tile)[-2:]
    return BlockScaled(x.values, scales[..., :rows, :columns], tile)


def scale_of_amax(
    amax: Float[Array, "*dims"], scale_format: ScaleFormat = "f32"
) -> Float[Array, "*dims"]:
    """The scale that takes a tile's largest magnitude to 448, or below it in "ue8m0".

    "f32" is amax x f32(1 / 448), which can be one unit in the last place off amax / 448: XLA
    replaces a division by a constant with this product anyway, so the product is the contract.
    "ue8m0" is 2^ceil(log2(amax / 448)), computed exactly on the bits.

    `amax` is float32, floored at 1e-4 here.
    """
    amax = jnp.maximum(amax, AMAX_FLOOR)
    if scale_format == "f32":
        return amax * np.float32(1 / E4M3_MAX)
    if scale_format != "ue8m0":
        raise ValueError(f"{scale_format=} must be 'f32' or 'ue8m0'")
    # 448 = 1.75 x 2^8: a fraction above .75 carries into the exponent, then 2^8 comes off.
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent = ((bits + (0x7FFFFF - 0x600000)) >> 23) - 8
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def scales_shape(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of numbers of `shape`, to plan memory without making any."""
    _check(shape, tile)
    return (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))


def _check(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    if len(shape) < 2:
        raise ValueError(f"tiles cover the last two dims, but {shape=} has {len(shape)}")
    if not isinstance(tile, tuple) or len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"{tile=} must be two positive sizes (rows, columns)")


def _cut(x: Array, tile: tuple[int, int]) -> Array:
    """[..., M, K] as [..., rows of tiles, tile[0], columns of tiles, tile[1]], zeros added."""
    *batch, m_tiles, k_tiles = scales_shape(x.shape, tile)
    rows, columns = m_tiles * tile[0] - x.shape[-2], k_tiles * tile[1] - x.shape[-1]
    if rows or columns:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, rows), (0, columns)])
    return x.reshape(*batch, m_tiles, tile[0], k_tiles, tile[1])


def _join(tiles: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_cut`: back to `shape`, the added zeros dropped."""
    *batch, m_tiles, m_tile, k_tiles, k_tile = tiles.shape
    whole = tiles.reshape(*batch, m_tiles * m_tile, k_tiles * k_tile)
    return whole[..., : shape[-2], : shape[-1]]
