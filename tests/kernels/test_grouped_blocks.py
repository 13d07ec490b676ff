"""Products over aligned blocks against NumPy in f64: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.grouped_gemm import blocks
from tests.helpers import TOLERANCE, relative_error

# Blocks of each group, of 8 in all: what is left over belongs to nobody.
GROUPS = {
    "even": [2, 2, 2, 2],
    "empty_groups": [0, 3, 0, 1],
    "all_to_the_last": [0, 0, 0, 8],
    "no_rows_at_all": [0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype, limit", [("float32", "f32_op"), ("bfloat16", "bf16_op")])
@pytest.mark.parametrize("alignment", [4, blocks.TRANSPOSED_FROM])
def test_blocks_equal_each_groups_products_in_f64(alignment, dtype, limit):
    rng = np.random.default_rng(0)
    rows, d_out = (jnp.asarray(rng.normal(size=(8 * alignment, n)), dtype) for n in (10, 6))
    weights = jnp.asarray(rng.normal(size=(4, 6, 10)), dtype)

    @jax.jit
    def products(rows, weights, d_out, group_sizes):
        def product(rows, weights):
            return blocks.grouped_matmul(rows, weights, group_sizes, alignment=alignment)

        out, pull_back = jax.vjp(product, rows, weights)
        return out, *pull_back(d_out)

    for name, number in GROUPS.items():
        sizes = alignment * np.array(number)
        used = int(sizes.sum())
        got = products(rows, weights, d_out, jnp.asarray(sizes, jnp.int32))
        want = products_in_f64(*(np.asarray(x, np.float64) for x in (rows, weights, d_out)), sizes)
        assert got[0].dtype == dtype
        assert relative_error(got, want) < TOLERANCE[limit], name
        assert not np.asarray(got[0][used:], np.float32).any(), name
        assert not np.asarray(got[1][used:], np.float32).any(), name


def products_in_f64(rows, weights, d_out, sizes):
    """(out, d_rows, d_weights), group by group. An f32 reference's own rounding is as large as what
    is looked for: two sums of 512 products in different orders differ by 2e-6."""
    out, d_rows, d_weights = np.zeros_like(d_out), np.zeros_like(rows), np.zeros_like(weights)
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        of = slice(start, end)
        out[of] = rows[of] @ weights[group].T
        d_rows[of] = d_out[of] @ weights[group]
        d_weights[group] = d_out[of].T @ rows[of]
    return out, d_rows, d_weights


def test_rows_that_are_no_multiple_of_the_alignment_are_refused():
    with pytest.raises(NotImplementedError, match="6 rows are no multiple of alignment=4"):
        blocks.grouped_matmul(
            jnp.ones((6, 3)), jnp.ones((2, 2, 3)), jnp.array([4, 2], jnp.int32), alignment=4
        )
