"""The state of a run: what a checkpoint holds, made before the first step, or as shapes alone."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from dsv3_jax.config import Config
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.parallel.mesh import mesh_of
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """All that a checkpoint holds: f32 master weights, router biases, moments and counters."""

    step: Int[Array, ""]
    params: Any
    router: Any
    opt_state: Any
    skipped: Int[Array, ""]  # steps not applied because loss or gradient was not finite
    skipped_in_row: Int[Array, ""]


def init_state(key: PRNGKeyArray, config: Config) -> TrainState:
    """The state before the first step."""
    variables = init_variables(key, config.model)
    params, router = variables["params"], variables["router"]
    counters = [jnp.zeros((), jnp.int32) for _ in range(3)]
    opt_state = make_optimizer(config.optimizer).init(params)
    return TrainState(counters[0], params, router, opt_state, counters[1], counters[2])


def create_state(config: Config, abstract: TrainState) -> TrainState:
    """`init_state` of the run's seed: every leaf is made where the abstract one lies."""
    key = jax.random.key(config.seed)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    lowered = jax.jit(partial(init_state, config=config), out_shardings=places).lower(key)
    # XLA:CPU spends 1.2 s on optimising each leaf's random numbers, which are drawn once.
    on_cpu = mesh_of(abstract.step).devices.flat[0].platform == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
    return lowered.compile(compiler_options=options)(key)


def abstract_state(config: Config, layout: Layout) -> TrainState:
    """The TrainState as shapes, dtypes and shardings; allocates nothing."""
    shapes = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    places = shardings(shapes, layout, stored=True)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
