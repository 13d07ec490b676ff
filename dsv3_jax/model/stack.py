"""Any run of layers: all of a model, those of a pipeline stage, or one.

Layers of one kind are stacked on a leading dim and scanned, so that a deeper model compiles to the
same program. How many there are is what the variables hold. A few layers on one GPU, with weights
that were made for a step, are run in turn instead.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import backend
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import AnyCache, ModelCache, PagedCache, of_layer
from dsv3_jax.model.forward_pass import Pass, Tokens, of_part
from dsv3_jax.model.frozen_products import with_bytes, without_bytes
from dsv3_jax.model.micro_batches import cut, divides, in_halves, in_opposite_phases, joined
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.unstacked import (
    DENSE,
    MOE,
    WITHOUT_LOOP,
    Unstacked,
    has_unstacked,
    is_unstacked,
    layer_at,
    num_layers,
)
from dsv3_jax.quantization.block_scaled import is_step_weight


def run_layers(
    variables: dict[str, Any],
    x: Float[Array, "B T D"],
    tokens: Tokens,
    how: Pass,
    cache: AnyCache | None = None,
    first_layer: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "B T D"], AnyCache | None, MoEStats | None]:
    """x after the layers that `variables` holds, dense ones first; their cache; MoE statistics.

    Of each collection only "dense_layers" and "moe_layers" are read, where they are; each may be a
    share of the model's, cut along the layer dim, or Unstacked. x comes and goes laid out as the
    residual, without a final norm. The cache holds these layers alone (a ModelCache, Unstacked as
    they are), or first_layer is the first one's number in it (a PagedCache). Statistics are
    stacked; None without a MoE layer, and so are the experts that the tokens are told, if they are.
    x stays in the model's dtype. Raises nothing of its own. Source: V3 report, section 2.1;
    DeepSeek-V3:inference/model.py, Transformer.forward.

    >>> import jax, jax.numpy as jnp, dsv3_jax as ds
    >>> how = ds.Pass(ds.load_config("tiny").model)
    >>> run = lambda v, x: ds.run_layers(v, x, ds.Tokens(jnp.zeros((2, 8), int)), how)[0]
    >>> x = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)
    >>> jax.eval_shape(run, ds.abstract_variables(how.config), x).shape
    (2, 8, 128)
    """
    paged = cache if isinstance(cache, PagedCache) else None
    of_kinds = cache if isinstance(cache, ModelCache) else ModelCache(None, None)
    new_caches: dict[str, Any] = {DENSE: None, MOE: None}
    stats = None
    for name, layer_caches in ((DENSE, of_kinds.dense), (MOE, of_kinds.moe)):
        layers = of_part(variables, name)
        if not layers.get("params"):
            continue
        told = tokens._replace(experts=None) if name == DENSE else tokens
        carry, (new_caches[name], of_kind) = _scan(
            layers, x, told, how, name == DENSE, paged, layer_caches, first_layer
        )
        x, paged = carry
        first_layer += num_layers(layers)
        stats = stats if of_kind is None else of_kind
    if isinstance(cache, ModelCache):
        return x, ModelCache(new_caches[DENSE], new_caches[MOE]), stats
    return x, paged, stats


def _scan(
    layers, x: Any, tokens: Tokens, how: Pass, dense: bool, paged, layer_caches, first_layer
) -> Any:
    """((x, paged), (layer_caches, stats)) after the layers of one kind."""
    block = Block(how, dense)
    halved = how.micro_batches == 2 and not dense  # without an exchange nothing lies over it
    overlapped = halved and paged is None and layer_caches is None
    in_two = halved and paged is not None and divides(len(x), how.layout)
    if overlapped:
        x = cut(x, how.layout, "residual")
    layers, sums = _without_sums(layers)
    unroll, made, stacks = _layers_a_step(layers, how), {}, {}
    if how.layout.mesh.size == 1:
        layers, stacks = without_bytes(layers)
    if _one_gpu(how) and unroll == num_layers(layers):
        layers, made = _without_numbers(layers)

    def body(carry, scanned, place=None):
        x, paged = carry
        layer, layer_cache, number, experts = scanned
        told = tokens._replace(experts=experts)
        if sums:
            layer = _with_sums(layer, sums, number - first_layer if place is None else place)
        lain = partial(with_bytes, held=stacks, number=number - first_layer) if stacks else _same
        held = lambda layer: how.gathered(lain(_with_numbers(layer, made, place)))  # noqa: E731
        if paged is not None:
            layer_cache = of_layer(paged, number, how.layout)
        if overlapped:
            apply = how.saving(
                lambda v, x, _: in_opposite_phases(
                    partial(block.apply, held(v)), x, told, how.layout
                )
            )
            x, _, stats = apply(layer, x, None)
        elif in_two:
            of_half = partial(block.apply, held(layer))
            x, layer_cache, stats = in_halves(of_half, x, told, layer_cache, how.layout)
        else:
            apply = how.saving(lambda v, x, c: block.apply(held(v), x, told, c))
            x, layer_cache, stats = apply(layer, x, layer_cache)
        x = how.layout.constrain(x, "batch", "residual")
        if paged is not None:
            paged, layer_cache = layer_cache.with_table(paged.block_table), None
        return (x, paged), (layer_cache, stats)

    numbers = first_layer + jnp.arange(num_layers(layers), dtype=jnp.int32)
    scanned = (layers, layer_caches, numbers, tokens.experts)
    if made or has_unstacked(layers):
        (x, paged), out = _in_turn(body, (x, paged), scanned)
    else:
        (x, paged), out = jax.lax.scan(body, (x, paged), scanned, unroll=unroll)
    if overlapped:
        first, second = x
        x = joined(first, second, how.layout, "residual")
    return (x, paged), out


def _same(layer):
    return layer


def _in_turn(body, carry, scanned):
    """`jax.lax.scan` without a loop; `body` is told the number of its turn, which is a constant.

    From a stack at a constant place a kernel reads its part where it lies.
    """
    results = []
    for place in range(num_layers(scanned)):
        carry, result = body(carry, layer_at(place, scanned), place)
        results.append(result)
    caches, stats = zip(*results)
    stacked = lambda parts: jax.tree.map(lambda *x: jnp.stack(x), *parts)  # noqa: E731
    caches = Unstacked(caches) if is_unstacked(scanned[1]) else stacked(caches)
    return carry, (caches, stacked(stats))


def _layers_a_step(layers, how: Pass) -> int:
    """How many layers a step of the scan has. No result depends on it."""
    # XLA:CPU copies what a step takes from the stack and leaves in it: two layers a step halve
    # that, 10 % of a training step of the default model. Of a frozen base in FP8, which is held as
    # bytes, they would be dequantised together.
    if how.layout.platform == "cpu":
        frozen = any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(layers))
        return 1 if frozen else 2
    # On a GPU a loop fills stacks with zeros, for what layers keep for their backward pass, and
    # writes that into them: 3 % of a step. Without a loop there are none. Not measured on several.
    number = num_layers(layers)
    return number if _one_gpu(how) and number <= WITHOUT_LOOP else 1


def _one_gpu(how: Pass) -> bool:
    return backend.platform() == "gpu" and how.layout.mesh.size == 1


def _without_sums(layers):
    """The layers' stack without the places of their gradients, which no scan cuts; and those."""
    places = {path: w.gradient for path, w in _step_weights(layers) if w.gradient is not None}
    return _replaced(layers, {path: {"gradient": None} for path in places}), places


def _with_sums(layer, sums, place):
    """One layer's weights with the place of its gradients."""
    return _replaced(layer, {path: {"gradient": of.of_layer(place)} for path, of in sums.items()})


def _without_numbers(layers):
    """The layers' stack without what a step made of its weights; and that, by path.

    A layer takes its own of it inside of what is run again for the backward pass. What crosses
    that boundary XLA has as arrays of their own: it would copy each layer's numbers out of the
    stack, for every pass.
    """
    made = {
        path: {"numbers": weight.numbers, "transposed": weight.transposed}
        for path, weight in _step_weights(layers)
    }
    nothing = {"numbers": None, "transposed": None}
    return _replaced(layers, {path: nothing for path in made}), made


def _with_numbers(layer, made, place):
    """One layer's weights with what the step made of them."""
    return _replaced(layer, {path: layer_at(place, stacks) for path, stacks in made.items()})


def _step_weights(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_step_weight)
    return [(path, leaf) for path, leaf in leaves if is_step_weight(leaf)]


def _replaced(tree, fields):
    """The tree with these fields, by path, of its StepWeights."""

    def put(path, weight):
        return replace(weight, **fields[path]) if path in fields else weight

    return jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_step_weight)
