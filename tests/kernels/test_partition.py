"""Kernels under a mesh that XLA cuts by itself: the same numbers, from pieces, not copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv3_jax.kernels.fused import api as fused
from dsv3_jax.kernels.fused import reference as fused_reference
from dsv3_jax.kernels.gemm import api as gemm
from dsv3_jax.kernels.gemm import reference as gemm_reference
from dsv3_jax.kernels.partition import cut_by
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled
from tests.kernels.conftest import normal, quantize, relative_error


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices, which tests have on CPUs only")
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def seen(function, shapes):
    """`function`, which notes the shapes of its operands' leaves; the last are what it runs on."""

    def noting(*operands):
        shapes.append([leaf.shape for leaf in jax.tree.leaves(operands)])
        return function(*operands)

    return noting


def placed(mesh, x, *spec):
    """x cut over the mesh; of block-scaled numbers the values, which the scales must follow."""
    values = jax.device_put(getattr(x, "values", x), NamedSharding(mesh, PartitionSpec(*spec)))
    return BlockScaled(values, x.scales, x.tile) if isinstance(x, BlockScaled) else values


def by_weights(rng):
    return quantize(normal(rng, 64, 512), PER_TOKEN), quantize(normal(rng, 256, 512), PER_BLOCK)


CASES = {
    "rows and columns": (("data", None), ("tensor", None), (16, 512), (128, 512)),
    "rows and the contracted dim": (("data", "tensor"), (None, "tensor"), (16, 256), (256, 256)),
    "columns that would cut a tile": ((None, None), ("data", None), (64, 512), (256, 512)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_device_multiplies_its_pieces(case, mesh, rng):
    a_spec, b_spec, a_piece, b_piece = CASES[case]
    a, b = by_weights(rng)
    shapes = []
    function = seen(gemm_reference.scaled_matmul, shapes)
    cut = gemm._cut(True, False)
    out = jax.jit(lambda a, b: cut_by(cut, function, a, b))(
        placed(mesh, a, *a_spec), placed(mesh, b, *b_spec)
    )
    # Partial sums and their total are rounded to bfloat16, 1.7e-3 each.
    assert relative_error(out, gemm_reference.scaled_matmul(a, b)) < 4e-3
    assert (shapes[-1][0], shapes[-1][2]) == (a_piece, b_piece)


def test_weight_gradients_of_all_devices_are_added_up(mesh, rng):
    a, b = (quantize(normal(rng, n, 1024), PER_TOKEN) for n in (64, 128))
    shapes = []
    function = seen(gemm_reference.scaled_matmul, shapes)
    out = jax.jit(lambda a, b: cut_by(gemm._cut(False, False), function, a, b))(
        placed(mesh, a, None, "data"), placed(mesh, b, None, "data")
    )
    np.testing.assert_allclose(out, gemm_reference.scaled_matmul(a, b), rtol=1e-5, atol=1e-4)
    assert shapes[-1][0] == (64, 256)


def test_both_forms_of_a_gradient_come_from_each_devices_tokens(mesh, rng):
    x = normal(rng, 512, 256)
    shapes = []
    function = seen(fused_reference.quantize_both_ways, shapes)
    cut = fused.Cut(fused.BY_TOKEN[:1], (*fused.BY_TOKEN, *fused.BY_CHANNEL), fused.TILES)
    out = jax.jit(lambda x: cut_by(cut, function, x))(placed(mesh, x, "data", "tensor"))
    jax.tree.map(np.testing.assert_array_equal, out, fused_reference.quantize_both_ways(x))
    assert shapes[-1] == [(128, 128)]


def test_inside_a_shard_map_nothing_is_cut(mesh, rng):
    x, shapes = normal(rng, 512, 256), []
    function = seen(fused_reference.quantize_rows, shapes)
    cut = fused.Cut(fused.BY_TOKEN[:1], fused.BY_TOKEN, fused.TILES)
    tokens = PartitionSpec("data")
    out = jax.jit(
        jax.shard_map(
            lambda x: cut_by(cut, function, x).values, mesh=mesh, in_specs=tokens, out_specs=tokens
        )
    )(x)
    np.testing.assert_array_equal(out, fused_reference.quantize_rows(x).values)
    assert jnp.asarray(shapes).tolist() == [[[128, 256]]]


def test_a_kernel_may_be_mapped_over_layers(rng):
    """As when stacked layers are initialised together."""
    cut = fused.Cut(fused.BY_TOKEN[:1], fused.BY_TOKEN, {"t": 1, "d": 128})
    x = normal(rng, 3, 16, 256)
    one_by_one = jax.jit(lambda x: cut_by(cut, fused_reference.quantize_rows, x))
    got = jax.jit(jax.vmap(one_by_one))(x)
    for layer in range(3):
        for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(one_by_one(x[layer]))):
            np.testing.assert_array_equal(
                np.asarray(leaf[layer], np.float32), np.asarray(expected, np.float32)
            )
