"""The whole model as functions of plain dicts: init_variables, forward, prefill, decode_step.

variables = {"params": ..., "router": ...}: what the optimizer trains, and the router biases that
it does not. Layers of one kind are stacked on a leading dim and scanned, so that a deeper model
compiles to the same program.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.mla_decode.api import plan
from dsv3_jax.kernels.mla_decode.schedule import Schedule
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import LatentCache, PagedCache, init_cache, of_layer
from dsv3_jax.model.linear import linear
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.placement import gathered, shardings
from dsv3_jax.parallel.sharding import (
    GATHERED,
    Layout,
    constrain,
    in_layout_order,
    in_natural_order,
)
from dsv3_jax.parallel.vocab import embed
from dsv3_jax.quantization.recipe import BF16, Recipe

Variables = dict[str, Any]

# What the backward pass finds saved in each layer; the rest of it is computed again.
REMAT_POLICIES = {
    "none": None,  # everything is saved
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of projections
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}


ENDS = ("embed_tokens", "lm_head")


class Outputs(NamedTuple):
    """What `forward` returns. At MTP depth k, the last k positions mean nothing."""

    # On a mesh whose context axis is a ring, tokens come in the order of `Layout.order`.
    logits: Float[Array, "B T V"]  # f32
    mtp_logits: tuple[Float[Array, "B T V"], ...]  # f32, one per depth
    stats: MoEStats | None  # of the MoE layers, stacked; None without any
    mtp_stats: tuple[MoEStats, ...]
    hidden: Float[Array, "B T D"]  # after the final norm


class ModelCache(NamedTuple):
    """The latent caches of all layers, stacked per kind; None where there are no such layers."""

    dense: LatentCache | None
    moe: LatentCache | None


AnyCache = ModelCache | PagedCache


def init_variables(key: PRNGKeyArray, config: ModelConfig) -> Variables:
    """Fresh f32 variables: normal with std `initializer_range`, ones for norms, zero router biases.

    Shapes are [out, in] with the layer dim first; see docs/architecture.md for the whole tree.
    """
    keys = jax.random.split(key, 5)
    normal = jax.nn.initializers.normal(config.initializer_range)
    vocab_shape = (config.vocab_size, config.hidden_size)
    params = {
        "embed_tokens": normal(keys[0], vocab_shape),
        "norm": jnp.ones(config.hidden_size),
        "lm_head": normal(keys[1], vocab_shape),
    }
    router = {}
    x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
    positions = jnp.zeros((1, 1), jnp.int32)

    def add(name, variables):
        params[name] = variables["params"]
        if "router" in variables:
            router[name] = variables["router"]

    for name, dense, layers, layer_key in (
        ("dense_layers", True, config.num_dense_layers, keys[2]),
        ("moe_layers", False, config.num_moe_layers, keys[3]),
    ):
        if layers:
            init = partial(Block(config, dense).init, x=x, positions=positions)
            add(name, jax.vmap(lambda k, init=init: init(k))(jax.random.split(layer_key, layers)))
    for depth in range(config.num_nextn_predict_layers):
        mtp_key = jax.random.fold_in(keys[4], depth)
        add(f"mtp_{depth}", MTPModule(config).init(mtp_key, x, x, positions))
    return {"params": params, "router": router}


def abstract_variables(config: ModelConfig, layout: Layout | None = None) -> Variables:
    """`init_variables` as shapes and dtypes, with the shardings of a layout; allocates nothing."""
    shapes = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    if layout is None:
        return shapes
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes, layout),
    )


def forward(
    variables: Variables,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    *,
    segments: Int[Array, "B T"] | None = None,
    remat: str = "none",
    recipe: Recipe = BF16,
    layout: Layout | None = None,
) -> Outputs:
    """Logits of the next token, and of the tokens after it by the MTP modules, for whole rows.

    segments are document numbers that attention must not cross; None lets it (V3's way). The
    recipe says what is computed in FP8; by default nothing is. The layout says how the program is
    spread over a mesh; None is a single device.
    """
    params = _gathered_ends(variables["params"], layout)
    length = tokens.shape[1]
    positions, in_order = jnp.arange(length)[None], tokens
    if layout is not None:
        positions, tokens = in_layout_order(positions, layout), in_layout_order(tokens, layout)
        segments = None if segments is None else in_layout_order(segments, layout)
    embedded = _embed(params, tokens, config, layout)
    hidden, _, stats = _layers(
        variables,
        embedded,
        positions,
        config,
        segments=segments,
        remat=remat,
        recipe=recipe,
        layout=layout,
    )
    mtp_logits, mtp_stats = [], []
    previous = hidden
    for depth in range(config.num_nextn_predict_layers):
        # Row i reads token i + depth + 1. The last rows, which have none, read the row's first
        # tokens: causality keeps them from all others, and they are masked.
        if layout is None:
            embedding = jnp.roll(embedded, -(depth + 1), axis=1)
        else:
            # Token ids are shifted, which is cheap between devices, and looked up again.
            shifted = in_layout_order(jnp.roll(in_order, -(depth + 1), axis=1), layout)
            embedding = _embed(params, shifted, config, layout)
        mask = jnp.broadcast_to(positions < length - (depth + 1), tokens.shape)
        module = partial(MTPModule(config, recipe, layout).apply, segments=segments, mask=mask)

        def apply(layer, *inputs, module=module):
            return module(_gathered(layer, layout), *inputs)

        previous, _, depth_stats = _remat(apply, remat, layout)(
            _of_layer(variables, f"mtp_{depth}"), previous, embedding, positions
        )
        mtp_logits.append(_logits(params, previous, layout))
        mtp_stats.append(depth_stats)
    logits = _logits(params, hidden, layout)
    return Outputs(logits, tuple(mtp_logits), stats, tuple(mtp_stats), hidden)


def _logits(params, hidden, layout: Layout | None):
    hidden = constrain(hidden, layout, "batch", "seq")
    return constrain(logits_of(params, hidden), layout, "batch", "seq", "vocab")


def logits_of(params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """The output head's logits in f32, from hidden states after their final norm."""
    return linear(hidden, params["lm_head"]).astype(jnp.float32)


def init_model_cache(config: ModelConfig, batch: int, length: int) -> ModelCache:
    """Empty caches for `batch` sequences of up to `length` tokens."""
    dense, moe = config.num_dense_layers, config.num_moe_layers
    return ModelCache(
        init_cache(config, batch, length, dense) if dense else None,
        init_cache(config, batch, length, moe) if moe else None,
    )


def prefill(
    variables: Variables,
    tokens: Int[Array, "B T"],
    cache: AnyCache,
    config: ModelConfig,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T D"], AnyCache]:
    """Final hidden states of whole prompts, and the empty cache filled with them.

    Shorter prompts are padded at the end; their rows past the end are overwritten before any later
    token sees them. The expanded form of MLA.
    """
    return counted_prefill(variables, tokens, None, cache, config, layout)[:2]


def counted_prefill(
    variables: Variables,
    tokens: Int[Array, "B T"],
    counted: Bool[Array, "B T"] | None,
    cache: AnyCache,
    config: ModelConfig,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T D"], AnyCache, Int[Array, "L E"]]:
    """`prefill`, and how many of the counted tokens' choices each expert of each MoE layer got.

    Without `counted` all tokens count.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _cached(variables, tokens, positions, cache, config, layout, True, counted)


def decode_step(
    variables: Variables,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: AnyCache,
    config: ModelConfig,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T D"], AnyCache]:
    """Final hidden states of T new tokens at rows start[b].. of the cache, and the cache with them.

    The absorbed form of MLA; T = 1 when decoding, a few when verifying drafts, more for a prompt
    that comes in chunks.
    """
    return counted_decode_step(variables, tokens, None, start, cache, config, layout)[:2]


def counted_decode_step(
    variables: Variables,
    tokens: Int[Array, "B T"],
    counted: Bool[Array, "B T"] | None,
    start: Int[Array, " B"],
    cache: AnyCache,
    config: ModelConfig,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T D"], AnyCache, Int[Array, "L E"]]:
    """`decode_step`, and the load of the counted tokens as `counted_prefill` has it."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    return _cached(variables, tokens, positions, cache, config, layout, False, counted)


def _cached(
    variables: Variables,
    tokens,
    positions,
    cache: AnyCache,
    config,
    layout,
    is_prefill: bool,
    counted=None,
) -> tuple[Array, AnyCache, Array]:
    counted = None if counted is None else in_layout_order(counted, layout)
    tokens, positions = in_layout_order(tokens, layout), in_layout_order(positions, layout)
    embedded = _embed(variables["params"], tokens, config, layout)
    schedule = None
    if layout is None and not is_prefill:  # once for all layers
        rows = tokens.shape[1] * config.num_attention_heads
        schedule = plan(positions[:, -1] + 1, rows)
    hidden, new_cache, stats = _layers(
        variables,
        embedded,
        positions,
        config,
        mask=counted,
        cache=cache,
        is_prefill=is_prefill,
        schedule=schedule,
        layout=layout,
    )
    assert new_cache is not None
    none = jnp.zeros((0, config.n_routed_experts), jnp.int32)
    load_LE = none if stats is None else stats.load_E
    return in_natural_order(hidden, layout), new_cache, load_LE


def _embed(params, tokens, config: ModelConfig, layout: Layout | None):
    if layout is not None:
        return embed(params["embed_tokens"], tokens, config.dtype, layout)
    return jnp.take(params["embed_tokens"], tokens, axis=0).astype(config.dtype)


def _layers(
    variables: Variables,
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"],
    config: ModelConfig,
    *,
    segments: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    cache: AnyCache | None = None,
    is_prefill: bool = False,
    schedule: Schedule | None = None,
    remat: str = "none",
    recipe: Recipe = BF16,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T D"], AnyCache | None, MoEStats | None]:
    """The dense layers, the MoE layers and the final norm."""

    paged = cache if isinstance(cache, PagedCache) else None
    stacked = cache if isinstance(cache, ModelCache) else ModelCache(None, None)

    def scan(name, dense, x, paged, layer_caches, first_layer: int, layers: int):
        block = partial(
            Block(config, dense, recipe, layout).apply,
            segments=segments,
            mask=mask,
            prefill=is_prefill,
            schedule=schedule,
        )

        def body(carry, scanned):
            x, paged = carry
            layer, layer_cache, number = scanned
            if paged is not None:
                layer_cache = of_layer(paged, number, config.num_hidden_layers, layout)
            apply = _remat(
                lambda v, x, c: block(_gathered(v, layout), x, positions, cache=c), remat, layout
            )
            x, layer_cache, stats = apply(layer, x, layer_cache)
            x = constrain(x, layout, "batch", "residual")
            if paged is not None:
                paged = layer_cache._replace(block_table=paged.block_table)
                layer_cache = None
            return (x, paged), (layer_cache, stats)

        # XLA:CPU copies what a step takes from the stack and leaves in it: two layers a step halve
        # that, 10 % of a training step of the default model.
        unroll = 2 if jax.default_backend() == "cpu" else 1
        numbers = first_layer + jnp.arange(layers, dtype=jnp.int32)
        scanned = (_of_layer(variables, name), layer_caches, numbers)
        return jax.lax.scan(body, (x, paged), scanned, unroll=unroll)

    dense_layers, moe_layers = config.num_dense_layers, config.num_moe_layers
    stats = dense_cache = moe_cache = None
    if dense_layers:
        (x, paged), (dense_cache, _) = scan(
            "dense_layers", True, x, paged, stacked.dense, 0, dense_layers
        )
    if moe_layers:
        (x, paged), (moe_cache, stats) = scan(
            "moe_layers", False, x, paged, stacked.moe, dense_layers, moe_layers
        )
    final = _gathered({"norm": variables["params"]["norm"]}, layout)
    x = rms_norm(x, final["norm"], config.rms_norm_eps)
    return x, paged or (cache and ModelCache(dense_cache, moe_cache)), stats


def _of_layer(variables: Variables, name: str) -> Variables:
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def _gathered(tree: Any, layout: Layout | None) -> Any:
    """Weights as computing needs them where each layer gathers its own; else they are that."""
    return tree if layout is None or layout.config.state != "fsdp" else gathered(tree, layout)


def _gathered_ends(params: dict[str, Any], layout: Layout | None) -> dict[str, Any]:
    """The parameters with the embedding and the head, which MTP reads again, gathered."""
    return params | {name: _gathered({name: params[name]}, layout)[name] for name in ENDS}


def _remat(function: Any, remat: str, layout: Layout | None) -> Any:
    policy = REMAT_POLICIES[remat]
    if policy is None and layout is not None and layout.config.state == "fsdp":
        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return function if policy is None else jax.checkpoint(function, policy=policy)
