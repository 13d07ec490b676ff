"""The loops that the GEMMs of this room share on TPUs, in Pallas.

Rows are cut into tiles that never span two experts, so that a product is a list of (row tile,
expert) pairs, known to the pipeline before it starts (scalar prefetch). All of K is in a tile:
while consecutive row tiles meet the same expert, its block of weights stays in VMEM. The idea is
megablox's (jax.experimental.pallas.ops.tpu.megablox); groups that start at multiples of a tile
need none of its masks.

Scales multiply each 128 of K of the float32 sum, as on the GPU. The one for a step is picked out of
a small block by a mask, because a TPU cannot index lanes at run time.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import manual, tpu
from dsv3_jax.kernels.tpu import pltpu

SLAB = 128  # of K under one scale
# A weight block, of which there are two buffers, and the largest that 128 columns may be.
WEIGHT_BYTES, LARGEST_BYTES = 4 << 20, 8 << 20
# A kernel may use 16 MiB of VMEM unless it asks for more; what scales, results and the compiler
# take beside the blocks, of which there are two each.
VMEM_BYTES, BESIDE_BYTES = 16 << 20, 2 << 20


def require(*dtypes: Any) -> None:
    """Raises NotImplementedError, saying why, unless these operands can be multiplied here."""
    tpu.require()
    for dtype in dtypes:
        if dtype not in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn):
            raise NotImplementedError(f"operands must be bfloat16, float32 or E4M3, not {dtype}")


def matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "E N K"] | Float[Array, "E K N"],
    tile_expert: Int[Array, " T"],
    used_tiles: Int[Array, "1"],
    rows: int,
    *,
    a_scales: Float[Array, "M KB"] | None = None,
    b_scales: Float[Array, "E NB KB"] | None = None,
    b_rows_first: bool = False,
) -> Float[Array, "M N"]:
    """Row tile t of `rows` rows times b[tile_expert[t]].T; zeros from tile `used_tiles` on.

    The result is bfloat16 for scaled operands, else of a's dtype. `b_rows_first`: b is [E, K, N].
    """
    operands = a, b, tile_expert, used_tiles, a_scales, b_scales
    a, b, tile_expert, used_tiles, a_scales, b_scales = manual.vary(operands)
    m, k = a.shape
    n = b.shape[2] if b_rows_first else b.shape[1]
    scaled = a_scales is not None
    columns = _columns(n, k * b.dtype.itemsize)

    def kernel(tile_expert, used, a_ref, b_ref, *refs):
        del tile_expert
        *scale_refs, out, total = refs
        row_tile, column_tile = pl.program_id(1), pl.program_id(0)

        @pl.when(row_tile >= used[0])
        def _():
            out[...] = jnp.zeros_like(out)

        @pl.when(row_tile < used[0])
        def _():
            if not scaled:
                contract = (((1,), (0 if b_rows_first else 1,)), ((), ()))
                out[...] = _dot(a_ref[...], b_ref[0], contract).astype(out.dtype)
                return
            total[...] = jnp.zeros_like(total)

            @pl.loop(0, k // SLAB)
            def _(slab):
                ks = pl.ds(pl.multiple_of(slab * SLAB, SLAB), SLAB)
                product = _dot(a_ref[:, ks], b_ref[0, :, ks], (((1,), (1,)), ((), ())))
                a_scale, by_block = (_lane(ref, slab) for ref in scale_refs)
                total[...] += product * a_scale * _block_scales(by_block, column_tile, columns)

            out[...] = total[...].astype(out.dtype)

    def weights_at(column, row, experts, used):
        del row, used
        return (experts, 0, column) if b_rows_first else (experts, column, 0)

    in_specs = [
        pl.BlockSpec((rows, k), lambda column, row, experts, used: (row, 0)),
        pl.BlockSpec(
            (1, k, columns) if b_rows_first else (1, columns, k),
            lambda column, row, experts, used: weights_at(column, row, experts[row], used),
        ),
    ]
    inputs: list[Any] = [a, b]
    if a_scales is not None and b_scales is not None:
        in_specs += [
            pl.BlockSpec((rows, k // SLAB), lambda column, row, experts, used: (row, 0)),
            pl.BlockSpec(
                (1, *b_scales.shape[1:]), lambda column, row, experts, used: (experts[row], 0, 0)
            ),
        ]
        inputs += [a_scales, b_scales]
    return pl.pallas_call(
        kernel,
        out_shape=manual.result((m, n), jnp.bfloat16 if scaled else a.dtype, a),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(n, columns), pl.cdiv(m, rows)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(
                (rows, columns), lambda column, row, experts, used: (row, column)
            ),
            scratch_shapes=[pltpu.VMEM((rows, columns) if scaled else (8, 128), jnp.float32)],
        ),
        compiler_params=_with_vmem(k * (rows * a.dtype.itemsize + columns * b.dtype.itemsize)),
    )(tile_expert, used_tiles, *inputs)


def wgrad(
    a: Float[Array, "N M"],
    b: Float[Array, "K M"],
    tile_expert: Int[Array, " T"],
    used_tiles: Int[Array, "1"],
    start: Float[Array, "E N K"],
    *,
    a_scales: Float[Array, "N MB"] | None = None,
    b_scales: Float[Array, "MB K"] | None = None,
) -> Float[Array, "E N K"]:
    """start[e] plus the sum of a[:, tile] @ b[:, tile].T over e's tiles of 128 tokens, float32."""
    operands = a, b, tile_expert, used_tiles, start, a_scales, b_scales
    a, b, tile_expert, used_tiles, start, a_scales, b_scales = manual.vary(operands)
    n, k, scaled = a.shape[0], b.shape[0], a_scales is not None
    tiles = a.shape[1] // SLAB
    rows, columns = (min(size, pl.cdiv(dim, 128) * 128) for size, dim in ((256, n), (512, k)))
    # Interpreted, an operand that becomes the result must be whole blocks.
    start = jnp.pad(start, ((0, 0), (0, -n % rows), (0, -k % columns)))

    def kernel(experts, used, a_ref, b_ref, start_ref, *refs):
        *scale_refs, out = refs
        tile = pl.program_id(2)

        @pl.when((tile == 0) | (experts[tile] != experts[lax.max(tile - 1, 0)]))
        def _():
            out[...] = start_ref[...]

        @pl.when(tile < used[0])
        def _():
            product = _dot(a_ref[...], b_ref[...], (((1,), (1,)), ((), ())))
            if scaled:
                product *= _lane(scale_refs[0], tile) * _sublane(scale_refs[1], tile)
            out[0] += product

    at_expert = pl.BlockSpec((1, rows, columns), lambda i, j, t, experts, used: (experts[t], i, j))
    in_specs = [
        pl.BlockSpec((rows, SLAB), lambda i, j, t, experts, used: (i, t)),
        pl.BlockSpec((columns, SLAB), lambda i, j, t, experts, used: (j, t)),
        at_expert,
    ]
    inputs: list[Any] = [a, b, start]
    if a_scales is not None and b_scales is not None:
        in_specs += [
            pl.BlockSpec((rows, tiles), lambda i, j, t, experts, used: (i, 0)),
            pl.BlockSpec((tiles, columns), lambda i, j, t, experts, used: (0, j)),
        ]
        inputs += [a_scales, b_scales]
    out = pl.pallas_call(
        kernel,
        out_shape=manual.result(start.shape, jnp.float32, a),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(n, rows), pl.cdiv(k, columns), tiles),
            in_specs=in_specs,
            out_specs=at_expert,
        ),
        # The blocks of an expert without tokens are never visited, and keep what they start with.
        input_output_aliases={4: 0},
    )(tile_expert, used_tiles, *inputs)
    return out[:, :n, :k]


def expert_of_tile(
    group_sizes: Int[Array, " E"], tiles: int, rows: int
) -> tuple[Int[Array, " T"], Int[Array, "1"]]:
    """Each row tile's expert (the last one in use for a tile of nobody), and the tiles in use."""
    ends = jnp.cumsum(group_sizes) // rows
    used = ends[-1]
    tile = jnp.minimum(jnp.arange(tiles, dtype=jnp.int32), jnp.maximum(used - 1, 0))
    expert = (tile[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    last = group_sizes.shape[0] - 1
    return jnp.minimum(expert, last), jnp.reshape(used, 1).astype(jnp.int32)


def _columns(n: int, column_bytes: int) -> int:
    """Columns of a weight block: as many of 512, 256, 128 as fit."""
    for columns, most in ((512, WEIGHT_BYTES), (256, WEIGHT_BYTES), (128, LARGEST_BYTES)):
        if columns * column_bytes <= most:
            return min(columns, pl.cdiv(n, 128) * 128)
    raise NotImplementedError(f"a block of 128 columns of {column_bytes} bytes exceeds VMEM")


def _with_vmem(block_bytes: int) -> Any:
    """Parameters that ask for two buffers of blocks, where VMEM is not given as much."""
    needed = 2 * block_bytes + BESIDE_BYTES
    return pltpu.CompilerParams(vmem_limit_bytes=needed if needed > VMEM_BYTES else None)


def _dot(a: Any, b: Any, contract: Any) -> Any:
    # Float32 operands are those of tests and small models: exact products, not bfloat16's.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _lane(ref: Any, index: Any) -> Any:
    """Column `index` of the last dim, which is kept with size 1."""
    values = ref[...]
    lanes = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.sum(jnp.where(lanes == index, values, 0.0), axis=-1, keepdims=True)


def _sublane(ref: Any, index: Any) -> Any:
    """Row `index` of two dims, [1, N]."""
    values = ref[...]
    sublanes = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.sum(jnp.where(sublanes == index, values, 0.0), axis=0, keepdims=True)


def _block_scales(by_block: Any, column_tile: Any, columns: int) -> Any:
    """[1, columns]: each column's scale, of [1, N/128, 1] scales of blocks of 128."""
    block = lax.broadcasted_iota(jnp.int32, by_block.shape[1:], 0)
    pieces = [
        jnp.sum(
            jnp.where(block == column_tile * (columns // SLAB) + i, by_block[0], 0.0),
            axis=0,
            keepdims=True,
        )
        for i in range(columns // SLAB)
    ]
    return jnp.concatenate([jnp.broadcast_to(piece, (1, SLAB)) for piece in pieces], axis=1)
