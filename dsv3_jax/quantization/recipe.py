"""What is quantised how, per operation of the model: training recipes as data.

A `Recipe` names every linear operation that may run in FP8 and says how each operand of its three
products is cut and scaled. None means the model's own dtype. Embedding, router, norms and
attention itself are not here because they never leave it (V3 report, section 3.3.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_CHANNEL, PER_TOKEN, ScaleFormat


@dataclass(frozen=True)
class TileFormat:
    """E4M3 with a scale a tile. Rows are tokens (or outputs of a weight), columns channels."""

    tile: tuple[int, int]
    scale_format: ScaleFormat = "f32"


@dataclass(frozen=True)
class LinearRecipe:
    """The operands of one linear operation's three products (V3 report, figure 6, section 3.3.2).

    Fprop is input by weight, Dgrad output gradient by weight, Wgrad output gradient by input.
    """

    input: TileFormat = TileFormat(PER_TOKEN)
    weight: TileFormat = TileFormat(PER_BLOCK)
    dgrad: TileFormat = TileFormat(PER_TOKEN)  # the output gradient in Dgrad
    wgrad: TileFormat = TileFormat(PER_CHANNEL)  # both operands of Wgrad, which adds over tokens
    # What Wgrad finds: the input as it was quantised for Fprop, the input in E5M6, or itself.
    saved_input: Literal["quantized", "e5m6", "unquantized"] = "quantized"


@dataclass(frozen=True)
class Recipe:
    """A LinearRecipe for each linear operation; None: in the model's dtype.

    Source: V3 report, section 3.3.
    """

    attention: LinearRecipe | None = None  # q_proj or q_a_proj, q_b_proj; kv_a_proj, kv_b_proj
    o_proj: LinearRecipe | None = None
    gate_up_proj: LinearRecipe | None = None  # of dense layers and shared experts
    down_proj: LinearRecipe | None = None
    experts_gate_up_proj: LinearRecipe | None = None  # of routed experts
    experts_down_proj: LinearRecipe | None = None
    eh_proj: LinearRecipe | None = None  # of MTP modules
    lm_head: LinearRecipe | None = None  # of the loss, MTP's included; generation has it plain


BF16 = Recipe()

_FP8 = LinearRecipe()
# Power-of-two scales survive a round trip through BF16: the token is quantised for dispatch, and
# again, to the same numbers, for the product (V3 report, section 3.3.3).
_DISPATCHED = replace(_FP8, input=TileFormat(PER_TOKEN, "ue8m0"))
_PAPER = Recipe(
    attention=_FP8,
    # This input is also what attention's backward pass reads, and so kept in 12 bits (V3 report,
    # section 3.3.3).
    o_proj=replace(_FP8, saved_input="e5m6"),
    gate_up_proj=_FP8,
    down_proj=_FP8,
    experts_gate_up_proj=_DISPATCHED,
    experts_down_proj=_FP8,
    # The released weights hold eh_proj in BF16, alone among the projections.
    eh_proj=None,
    # So is the head (V3 report, section 3.3.1).
    lm_head=None,
)


def _blockwise_dgrad(recipe: LinearRecipe | None) -> LinearRecipe | None:
    return recipe and replace(recipe, dgrad=TileFormat(PER_BLOCK))


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; ValueError for one that is none of RECIPES."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} must be one of {', '.join(RECIPES)}")
    return RECIPES[name]


RECIPES: Mapping[str, Recipe] = {
    "bf16": BF16,
    "fp8_paper": _PAPER,
    # What the paper says diverges after some 300B tokens: output gradients have outliers in single
    # tokens, which a 128x128 block shares out over 127 others (V3 report, appendix B.2).
    "fp8_blockwise_dgrad": Recipe(
        **{name: _blockwise_dgrad(value) for name, value in vars(_PAPER).items()}
    ),
    # Beyond the paper: the head's three products in FP8, too (docs/numerics.md has what it costs).
    "fp8_head": replace(_PAPER, lm_head=_FP8),
}
