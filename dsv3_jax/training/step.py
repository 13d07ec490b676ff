"""One optimizer step: gradients over micro-batches, AdamW, the router bias, a guard against NaN."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config, UserError
from dsv3_jax.kernels import backend
from dsv3_jax.model.placement import gathered, gathered_for_step, shardings
from dsv3_jax.model.router import update_router_bias
from dsv3_jax.model.step_weights import StepWeights, as_they_are, made_for_step, made_of_slices
from dsv3_jax.parallel.compiler_options import compiler_options
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.recipe import BF16, recipe_named
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import (
    LossTerms,
    Rows,
    documents,
    mean_nats,
    tokens_of_rows,
    training_loss,
    training_pass,
    with_shares,
)
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.pipelined import pipelined_gradients
from dsv3_jax.training.pipelined_evaluation import pipelined_nats
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import TrainState, variables_of

BIAS = "e_score_correction_bias"


class StepMetrics(NamedTuple):
    """What one step reports; f32 scalars unless said.

    The loss is in nats a token. Source: this project (docs/architecture.md).
    """

    loss: Float[Array, ""]
    terms: LossTerms  # means over the micro-batches; loads are their sums
    grad_norm: Float[Array, ""]  # global, before clipping
    applied: Bool[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


def jit_train_step(
    config: Config,
    layout: Layout,
    state: TrainState,
    extensions: Extensions = NONE,
) -> Any:
    """`train_step` of this config, compiled on its first call; it takes over the state's memory.

    The new state lies as this one, which may be abstract; metrics are whole on every device. Were
    that not pinned, the second call, on the first one's output, would compile anew. Raises as
    `train_step` does, on the first call. Source: this project (docs/architecture.md).

    >>> from functools import partial
    >>> import jax, dsv3_jax as ds
    >>> config, mesh = ds.load_config("tiny"), ds.make_mesh(ds.ParallelConfig())
    >>> layout = ds.make_layout(mesh, config.sharding, config.expert_parallel)
    >>> state = jax.jit(partial(ds.init_state, config=config)).eval_shape(jax.random.key(0))
    >>> here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> on_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    >>> step = ds.jit_train_step(config, layout, jax.tree.map(on_device, state))
    >>> callable(step)
    True
    """
    return jax.jit(
        partial(train_step, config=config, layout=layout, extensions=extensions),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), state.step.sharding),
        compiler_options=compiler_options(layout) or None,
    )


def train_step(
    state: TrainState,
    rows: Rows,
    settings: StepSettings,
    config: Config,
    layout: Layout = ONE_DEVICE,
    base: Any = None,
    extensions: Extensions = NONE,
) -> tuple[TrainState, StepMetrics]:
    """The state after one step on the first num_micro_batches of A micro-batches, and its metrics.

    `base` are the frozen variables that the state's adapters belong to, where it has any. A step
    whose loss or gradient norm is not finite changes nothing but the counters. Raises as
    `training_loss` does. Source: V3 report, section 4.2; arXiv 2408.15664 for the bias.

    >>> from functools import partial
    >>> import jax, numpy as np, dsv3_jax as ds
    >>> config = ds.load_config("tiny")
    >>> state = jax.eval_shape(partial(ds.init_state, config=config), jax.random.key(0))
    >>> one = np.float32(1)
    >>> settings = ds.StepSettings(one, one, one, np.int32(1))
    >>> rows = np.ones((1, 2, 17), np.int32)
    >>> _, metrics = jax.eval_shape(partial(ds.train_step, config=config), state, rows, settings)
    >>> metrics.loss
    ShapeDtypeStruct(shape=(), dtype=float32)
    """
    with layout.compiling():
        loss, terms, grads, grad_norm = gradients(
            state, rows, settings, config, layout, base, extensions
        )
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if extensions.optimizer is None:
        updates, opt_state = make_optimizer(config.optimizer).update(
            *(grads, state.opt_state, state.params),
            norm=grad_norm,
            applied=applied,
            learning_rate=settings.learning_rate,
        )
        rate = settings.learning_rate
    else:
        own = optax.with_extra_args_support(extensions.optimizer)
        updates, opt_state = own.update(
            grads, state.opt_state, state.params, learning_rate=settings.learning_rate
        )
        opt_state = jax.tree.map(partial(jnp.where, applied), opt_state, state.opt_state)
        rate = -1.0  # its updates are added
    params = jax.tree.map(lambda p, u: jnp.where(applied, p - rate * u, p), state.params, updates)
    moved = move_router_biases(state.router, terms.load, settings.bias_update_speed)
    router = jax.tree.map(partial(jnp.where, applied), moved, state.router)
    skipped = jnp.where(applied, state.skipped, state.skipped + 1)
    skipped_in_row = jnp.where(applied, 0, state.skipped_in_row + 1)
    metrics = StepMetrics(loss, terms, grad_norm, applied, skipped, skipped_in_row)
    new = TrainState(state.step + 1, params, router, opt_state, skipped, skipped_in_row)
    return new, metrics


def move_router_biases(router: Any, load: dict[str, Any], speed: Any) -> Any:
    """Every router's bias after the load of a whole step, moved by `speed` towards balance."""

    def moved(path, bias):
        assert path[-1].key == BIAS
        return update_router_bias(bias, load[path[0].key], speed)

    return jax.tree_util.tree_map_with_path(moved, router)


def router_bias(router: Any, name: str) -> Float[Array, "*L E"]:
    """The bias of the routers of one group of layers, "moe_layers" or "mtp_0", ..."""
    layer = router[name]
    return layer.get("block", layer)["mlp"][BIAS]


def eval_step(
    params: Any,
    router: Any,
    rows: Rows,
    config: Config,
    layout: Layout = ONE_DEVICE,
    base: Any = None,
    extensions: Extensions = NONE,
) -> Float[Array, ""]:
    """Mean cross-entropy of the main model, nats a token, of rows of T + 1 tokens: of all of them,
    or of those that count."""
    if layout.mesh.shape["pipe"] > 1:
        held = {"params": params, "router": router}
        with layout.compiling():
            return pipelined_nats(held, rows, config, layout, base, extensions)
    segments = documents(rows, config)
    if base is not None:
        params, base = _gathered_once(params, layout), _gathered_once(base, layout)
    elif not layout.one_device:  # the numbers that training multiplies by
        weights = for_products(params, config, layout)
        params = weights.held(weights.trained)
    variables = variables_of(params, router, base, config)
    how = training_pass(config, layout, extensions)
    how = dataclasses.replace(how, remat="none", micro_batches=1)
    with layout.compiling():
        return mean_nats(variables, rows, how, segments)


def _gathered_once(params: Any, layout: Layout) -> Any:
    """The weights of a whole step; FSDP's are gathered layer by layer instead."""
    return params if layout.gathers_each_layer else gathered(params, layout)


def _in_f32(grads: Any) -> Any:
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _as_stored(grads: Any, layout: Layout) -> Any:
    """Gradients where each device has the slice of them that it will apply."""
    return layout.constrain_tree(grads, shardings(grads, layout, stored=True))


def for_products(
    params: Any, config: Config, layout: Layout = ONE_DEVICE, *, passes: int = 1
) -> StepWeights:
    """The weights of a step, and what was made of them for all of its products.

    passes: backward passes of the step; FP8 numbers are turned for Dgrad once, not in each. One
    device always has both orientations: one kernel makes them.
    Where a mesh holds slices, each device makes it of its own: FSDP's layers gather that when they
    run, ZeRO-1 all of it once. Where nothing is made, products cast and quantise themselves: of
    whole weights on several devices, and under ZeRO-1 in FP8 where `tensor` cuts tiles.
    """
    recipe, dtype = recipe_named(config.quant.preset), config.model.dtype
    if layout.one_device:
        return as_they_are(params)._replace(made=made_for_step(params, recipe, dtype))
    in_parts = recipe != BF16 and layout.mesh.shape["tensor"] > 1
    once = not layout.gathers_each_layer
    if once and (layout.config.state == "replicated" or in_parts):
        return as_they_are(gathered(params, layout))
    stored = shardings(params, layout, stored=True)
    made = made_of_slices(params, stored, recipe, dtype, layout)
    weights = as_they_are(params)._replace(made=made)
    return gathered_for_step(weights, layout, dtype, turned=passes > 1) if once else weights


def gradients(
    state: TrainState,
    rows: Rows,
    settings: StepSettings,
    config: Config,
    layout: Layout = ONE_DEVICE,
    base: Any = None,
    extensions: Extensions = NONE,
) -> tuple[Float[Array, ""], LossTerms, Any, Float[Array, ""]]:
    """(loss, terms, gradients, their global norm): means over the step's micro-batches, and sums of
    the loads."""

    # The backward pass is that of the loss summed over tokens, or of the next lower power of two,
    # which changes no bit without FP8. As shares of a mean, gradients of many tokens lie so far
    # under FP8's floor, 1e-4 for a tile's largest, that E4M3 has few bits or none left for them.
    num_micro_batches, batch, row_len = tokens_of_rows(rows).shape
    per_token = float(1 << ((batch * (row_len - 1)).bit_length() - 1))
    depths = config.model.num_nextn_predict_layers
    rows = with_shares(rows, settings.num_micro_batches.astype(jnp.float32), depths)

    if layout.mesh.shape["pipe"] > 1:
        means = _pipelined(state, rows, settings, config, layout, base, extensions, per_token)
        return *means, optax.tree.norm(means[2])

    # What every micro-batch multiplies by is made before the first of them, and only once.
    if base is None:
        weights = for_products(state.params, config, layout, passes=num_micro_batches)
    else:  # adapters alone, of a base that is frozen
        weights = as_they_are(_gathered_once(state.params, layout))
    # Products leave the gradients of what was made in their places, added up over micro-batches.
    # A loss of one's own may run a layer twice, or leave one out.
    once = num_micro_batches == 1 and extensions.loss is None
    # On a GPU the kernels that make gradients add up their squares as well, for the norm.
    squares = once and backend.platform() == "gpu"
    summing = weights.summing(not once, squares) if layout.one_device else weights

    def loss_of(trained, micro_rows, weights):
        variables = variables_of(weights.held(trained), state.router, base, config)
        weight = settings.mtp_loss_weight
        loss, terms = training_loss(variables, micro_rows, weight, config, layout, extensions)
        return loss * per_token, (loss, terms)

    def gradient(micro_rows, weights=summing):
        compute = jax.value_and_grad(partial(loss_of, weights=weights), has_aux=True)
        (_, value), grads = compute(weights.trained, micro_rows)
        return value, _as_stored(jax.tree.map(lambda g: g / per_token, grads), layout)

    def micro(i):
        return jax.tree.map(lambda x: x[i], rows)

    if num_micro_batches == 1:
        (loss, terms), grads = gradient(micro(0))
        grads = summing.gradients(_in_f32(grads), 1 / per_token)
        return loss, terms, grads, _norm(grads, summing.squares(1 / per_token))

    def body(i, total):
        value, grads = gradient(micro(i))
        return jax.tree.map(jnp.add, total, (value, _in_f32(grads)))

    # The trip count is data: the batch-size ramp compiles nothing anew.
    value, grads = jax.eval_shape(partial(gradient, weights=weights), micro(0))
    grads = summing.of_trained(grads)
    shapes = value, jax.eval_shape(_in_f32, grads)
    zeros, no_grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = zeros, _as_stored(no_grads, layout)
    (loss, terms), grads = jax.lax.fori_loop(0, settings.num_micro_batches, body, zeros)
    count = settings.num_micro_batches.astype(jnp.float32)
    grads = summing.gradients(grads, 1 / per_token)
    means = jax.tree.map(lambda x: x / count, (loss, terms._replace(load={}), grads))
    return means[0], means[1]._replace(load=terms.load), means[2], optax.tree.norm(means[2])


def _norm(grads: Any, squares: Any) -> Float[Array, ""]:
    """The global norm of gradients; those whose sum of squares is known are not read."""
    known = jax.tree.leaves(squares)
    if not known:
        return optax.tree.norm(grads)
    read = jax.tree.map(
        lambda of, g: g if of is None else None, squares, grads, is_leaf=lambda x: x is None
    )
    return jnp.sqrt(optax.tree.norm(read, squared=True) + sum(known))


def _pipelined(
    state, rows, settings, config: Config, layout: Layout, base, extensions, per_token: float
):
    """`gradients` by the ranks of `pipe`."""
    if extensions.loss is not None:
        raise UserError(
            "a loss of your own reads all Outputs, but no stage of a pipeline has all of them "
            f"(mesh.pipe={layout.mesh.shape['pipe']}): use mesh.pipe=1"
        )
    held = {"params": state.params, "router": state.router}
    terms, grads = pipelined_gradients(
        held, rows, settings, config, layout, per_token, base=base, extensions=extensions
    )
    count = settings.num_micro_batches.astype(jnp.float32)
    means = jax.tree.map(lambda x: x / count, terms._replace(load={}))
    balance = config.schedule.balance_loss_weight * means.balance
    loss = means.ce + settings.mtp_loss_weight * means.mtp + balance
    grads = _as_stored(jax.tree.map(lambda g: g / (per_token * count), grads), layout)
    return loss, means._replace(load=terms.load), grads
