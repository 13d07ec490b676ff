"""What a layer keeps for its backward pass; the rest of it is computed again."""

import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dsv3_jax.kernels.attention.api import RESULTS
from dsv3_jax.parallel.phases import MARK

PRODUCT = "product"

# MLA's products from latents to heads are 16 and 64 times as wide as what they read (V3), a dense
# layer's gate and up 5 times: what is wider than this is large to keep and cheap to make again.
WIDE = 8


def named_product(y: Array, weight_shape: tuple[int, ...]) -> Array:
    """A product's result that no policy sees to be one, named for `v3` unless it is wide."""
    return y if _is_wide(weight_shape) else checkpoint_name(y, PRODUCT)


def _is_wide(weight_shape: tuple[int, ...]) -> bool:
    *_, outputs, inputs = weight_shape
    return outputs > WIDE * inputs


def _narrow_dots(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether it is a projection, one without batch dims, whose result is not wide."""
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batch, _) = params["dimension_numbers"]
    x, weight = operands
    inputs = math.prod(x.shape[dim] for dim in contracted)
    return not batch and not _is_wide((math.prod(weight.shape) // inputs, inputs))


def _and_marks(policy: Any) -> Any:
    marks = jax.checkpoint_policies.save_only_these_names(MARK)
    return jax.checkpoint_policies.save_from_both_policies(policy, marks)


# None: everything is saved. The others save marks of order, 4 bytes each (parallel/phases.py).
POLICIES: dict[str, Any] = {
    "none": None,
    # Of projections that are plain products, what they return.
    "dots": _and_marks(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    # The paper's choice (V3 report, section 3.2.3): norms, MLA's up-projections and SwiGLU are
    # computed again, and the results of attention and of other products are kept.
    "v3": jax.checkpoint_policies.save_from_both_policies(
        _narrow_dots, jax.checkpoint_policies.save_only_these_names(PRODUCT, RESULTS, MARK)
    ),
    "full": jax.checkpoint_policies.save_only_these_names(MARK),  # the layer's input alone
}
