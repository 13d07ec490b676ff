"""AdamW over f32 master weights, both moments in f32 or bf16 (V3 report, sections 3.3.3, 4.2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.config.weights import find_weight
from dsv3_jax.model.adapters import A, B


class AdamState(NamedTuple):
    """Steps taken, and the two moments, shaped as the parameters."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, Adam, and decoupled weight decay of matrices.

    The learning rate is not in it: the caller subtracts rate times update, so that a schedule is
    data. Epsilon and the decay mask are not published; norms are left out, as is common.

    `update` may be given `norm`, the gradients' global norm, and `applied`: where that is false the
    state stays as it is, and the updates mean nothing. With average_decay, it must be given
    `learning_rate` too: the last part of the state is an AverageState. Raises ValueError for a
    parameter that config/weights.py has no row for. Source: V3 report, sections 4.2 and 3.3.3
    (moments in BF16); arXiv 1711.05101.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> params = {"lm_head": jnp.ones((2, 2))}
    >>> optimizer = ds.make_optimizer(ds.OptimizerConfig(weight_decay=0.0))
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["lm_head"][0].round(3).tolist()
    [1.0, 1.0]
    """
    parts: list[optax.GradientTransformation] = [
        clip_by_norm(config.clip_norm),
        scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    ]
    if config.average_decay:
        parts.append(average_weights(config.average_decay))
    return optax.with_extra_args_support(optax.chain(*parts))


class AverageState(NamedTuple):
    """The moving average of the weights, f32, shaped as they are."""

    average: Any


def average_weights(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps average = decay x average + (1 - decay) x weights, after each step; begins with the
    first weights. The updates pass through."""

    def init(params):
        return AverageState(jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params))

    def update(updates, state, params=None, *, learning_rate=None, applied=True, **extra):
        del extra
        assert params is not None and learning_rate is not None

        def moved(average, param, direction):
            new = param.astype(jnp.float32) - learning_rate * direction
            return jnp.where(applied, decay * average + (1 - decay) * new, average)

        return updates, AverageState(jax.tree.map(moved, state.average, params, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` that need not compute the norm again."""

    def update(updates, state, params=None, *, norm=None, **extra):
        del params, extra
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_adam(
    b1: float, b2: float, eps: float, moment_dtype: jnp.dtype
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction (Kingma & Ba 2015), both moments held in moment_dtype, computed in f32.

    optax's own can hold only the first moment in another dtype.
    """

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, moment_dtype), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None, *, applied=True, **extra):
        del params, extra
        count = jnp.where(applied, state.count + 1, state.count)
        steps = count.astype(jnp.float32)

        # Chosen here, not after the step: were the old moments read again then, XLA:CPU would copy
        # them before it writes the new ones in place.
        def moment(decay, old, new):
            old = old.astype(jnp.float32)
            return jnp.where(applied, decay * old + (1 - decay) * new.astype(jnp.float32), old)

        mu = jax.tree.map(lambda m, g: moment(b1, m, g), state.mu, updates)
        nu = jax.tree.map(lambda v, g: moment(b2, v, jnp.square(g)), state.nu, updates)
        # The direction comes from the f32 moments; only what is kept is rounded.
        correct_mu, correct_nu = 1 / (1 - b1**steps), 1 / (1 - b2**steps)
        direction = jax.tree.map(
            lambda m, v: (m * correct_mu) / (jnp.sqrt(v * correct_nu) + eps), mu, nu
        )
        held_mu, held_nu = jax.tree.map(lambda x: x.astype(moment_dtype), (mu, nu))
        return direction, AdamState(count, held_mu, held_nu)

    return optax.GradientTransformationExtraArgs(init, update)


def decayed(params: Any) -> Any:
    """True for every leaf that weight decay applies to, as the table of weights says.

    ValueError for a leaf that the table does not have.
    """

    def applies(path, _):
        if str(path[-1].key) in (A, B):  # of an adapter: matrices
            return True
        weight = find_weight([str(entry.key) for entry in path])
        if weight is None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} has no row in config/weights.py, which says what decays")
        return weight.decayed

    return jax.tree_util.tree_map_with_path(applies, params)
