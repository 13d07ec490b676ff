"""Products over aligned blocks against ragged_dot: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.grouped_gemm import blocks, reference
from tests.helpers import TOLERANCE, relative_error

# Blocks of each group, of 8 in all: what is left over belongs to nobody.
GROUPS = {
    "even": [2, 2, 2, 2],
    "empty_groups": [0, 3, 0, 1],
    "all_to_the_last": [0, 0, 0, 8],
    "no_rows_at_all": [0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype, limit", [("float32", "f32_op"), ("bfloat16", "bf16_op")])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("alignment", [4, blocks.BATCHED_FROM], ids=["looped", "batched"])
def test_blocks_equal_the_reference(alignment, sizes, dtype, limit):
    rng = np.random.default_rng(0)
    rows, d_out = (jnp.asarray(rng.normal(size=(8 * alignment, n)), dtype) for n in (10, 6))
    weights = jnp.asarray(rng.normal(size=(4, 6, 10)), dtype)
    sizes = alignment * jnp.asarray(sizes, jnp.int32)
    used = int(sizes.sum())

    def run(implementation):
        def product(rows, weights):
            return implementation.grouped_matmul(rows, weights, sizes, alignment=alignment)

        out, pull_back = jax.vjp(product, rows, weights)
        d_rows, d_weights = pull_back(d_out)
        return out, d_rows, d_weights

    (got, *got_gradients), (want, *want_gradients) = run(blocks), run(reference)
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[limit]
    assert not np.asarray(got[used:], np.float32).any()
    assert relative_error(got_gradients, want_gradients) < TOLERANCE[limit]
    assert not np.asarray(got_gradients[0][used:], np.float32).any()


def test_rows_that_are_no_multiple_of_the_alignment_are_refused():
    with pytest.raises(NotImplementedError, match="6 rows are no multiple of alignment=4"):
        blocks.grouped_matmul(
            jnp.ones((6, 3)), jnp.ones((2, 2, 3)), jnp.array([4, 2], jnp.int32), alignment=4
        )
