"""What one pass over tokens is told: `Pass`, what is static, and `Tokens`, what is traced.

Both go whole to every act and module of the model, so that a new option is a field here and no
parameter on the way. What is scanned or returned (hidden states, caches, statistics) is neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode.kv_splits import KVSplits
from dsv3_jax.model.checks import check_nothing_is_replaced
from dsv3_jax.model.placement import sliced
from dsv3_jax.model.remat import POLICIES
from dsv3_jax.parallel.sharding import GATHERED, ONE_DEVICE, Layout
from dsv3_jax.quantization.recipe import BF16, Recipe


@dataclass(frozen=True)
class Pass:
    """A pass' settings, which are compiled in: hashable, a static argument of jit.

    Fields:
        config: the architecture.
        recipe: what is computed in FP8; by default nothing is.
        layout: how the program is spread over a mesh; by default it is that of one device.
        remat: what each layer saves for its backward pass, a key of remat.POLICIES.
        prefill: a cache that comes along is empty: the tokens attend to each other alone, in the
            expanded form of MLA, and not to the cache in the absorbed form.
        micro_batches: 2 takes both halves of every device's sequences through a MoE layer together,
            so that the rows of one travel while the other computes: layers of training, whose
            sequences must be even in number, and of decoding, where they can be cut and lie in
            pages; see micro_batches.py.
        mtp_detached: MTP modules send no gradient to the hidden states and embeddings they read.
        score, select: the router's own functions, see `route`; None: those of the config.
        attention_bias: see `mla_attention`; called with positions, None: causal attention alone.
            Positions are rows of the sequence: query positions [T, 1], key positions [1, S].

    The three functions are compared by identity: make each once, not at every call. Raises
    ValueError for an unknown remat and for a config, recipe or layout of another type. Source: this
    project (docs/architecture.md).
    """

    config: ModelConfig
    recipe: Recipe = BF16
    layout: Layout = ONE_DEVICE
    remat: str = "none"
    prefill: bool = False
    micro_batches: int = 1
    mtp_detached: bool = False
    score: Callable[..., Any] | None = None
    select: Callable[..., Any] | None = None
    attention_bias: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.remat not in POLICIES:
            raise ValueError(f"remat={self.remat!r} must be one of {', '.join(POLICIES)}")
        for name, kind in (("config", ModelConfig), ("recipe", Recipe), ("layout", Layout)):
            if not isinstance(getattr(self, name), kind):
                what = type(getattr(self, name)).__name__
                hint = "; recipe_named('fp8_paper') is one" if name == "recipe" else ""
                raise ValueError(f"{name} must be a {kind.__name__}, not {what}{hint}")
        check_nothing_is_replaced()

    def saving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's function that saves for its backward pass what `remat` says."""
        policy = POLICIES[self.remat]
        if policy is None and self.layout.gathers_each_layer:
            policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return function if policy is None else jax.checkpoint(function, policy=policy)

    def gathered(self, variables: Any) -> Any:
        """Variables as computing needs them, where each layer gathers its own; else they are that.

        A tree of paths as in docs/architecture.md, or one layer's slice of it.
        """
        if not self.layout.gathers_each_layer:
            return variables
        return sliced(variables, self.layout, self.config.dtype)


class Tokens(NamedTuple):
    """What the layers are told of each token besides its hidden state; traced.

    Tokens come in the layout's order (`Layout.in_order`). Fields:
        positions: of each token in its sequence.
        segments: numbers of documents that attention must not cross; None: it crosses.
        counted: which tokens load and balance loss count; None: all.
        decode_schedule: the decode kernel's plan for the lengths that a cache then has.
        experts: what each MoE layer is to choose in place of its router (routing replay); a layer
            is given its own [B, T, K].
        wanted: the one row of each sequence that the layer's output is wanted of, where rows attend
            to a cache; the others are in the cache and nowhere else. None: all rows.

    Source: this project (docs/architecture.md).
    """

    positions: Int[Array, "#B T"]
    segments: Int[Array, "B T"] | None = None
    counted: Bool[Array, "B T"] | None = None
    decode_schedule: KVSplits | None = None
    experts: Int[Array, "*L B T K"] | None = None
    wanted: Int[Array, " B"] | None = None

    def of_wanted(self, x: Any) -> Any:
        """The wanted row of each sequence, [B, 1, ...] of [B, T, ...]; or x, where all are."""
        if self.wanted is None:
            return x
        return x[jnp.arange(len(x)), self.wanted][:, None]


def as_pass(config: ModelConfig | Pass) -> Pass:
    """A Pass itself, or that of a config in which nothing is special."""
    return config if isinstance(config, Pass) else Pass(config)


def of_part(variables: dict[str, Any], name: str) -> dict[str, Any]:
    """The variables of one part of the model, such as "moe_layers", by collection."""
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}
