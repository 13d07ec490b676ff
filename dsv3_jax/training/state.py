"""The state of a run: what a checkpoint holds, made before the first step, or as shapes alone."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from dsv3_jax.config import Config, UserError
from dsv3_jax.model.adapters import init_adapters, with_adapters
from dsv3_jax.model.placement import placed, shardings
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.parallel.mesh import mesh_of
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.restore import read_state


class TrainState(NamedTuple):
    """All that a checkpoint holds: f32 master weights, router biases, moments and counters.

    Of a LoRA run the weights are its adapters, and the router biases are the frozen base's. Source:
    V3 report, section 3.3.3.
    """

    step: Int[Array, ""]
    params: Any
    router: Any
    opt_state: Any
    skipped: Int[Array, ""]  # steps not applied because loss or gradient was not finite
    skipped_in_row: Int[Array, ""]


def init_state(key: PRNGKeyArray, config: Config, extensions: Extensions = NONE) -> TrainState:
    """The state before the first step; of a LoRA run, of the adapters alone.

    Weights are f32, moments of `optimizer.moment_dtype`. Raises ValueError as the optimizer does.
    Source: V3 report, section 3.3.3.

    >>> import jax, dsv3_jax as ds
    >>> start = lambda key: ds.init_state(key, ds.load_config("tiny"))
    >>> jax.eval_shape(start, jax.random.key(0)).params["lm_head"].shape
    (1024, 128)
    """
    if config.lora.rank:
        params, router = init_adapters(key, config.model, config.lora), {}
    else:
        variables = init_variables(key, config.model)
        params, router = variables["params"], variables["router"]
    counters = [jnp.zeros((), jnp.int32) for _ in range(3)]
    opt_state = _optimizer(config, extensions).init(params)
    return TrainState(counters[0], params, router, opt_state, counters[1], counters[2])


def variables_of(params: Any, router: Any, base: Any, config: Config) -> Any:
    """What the model is given: the trained weights, or a frozen base with its adapters."""
    if base is None:
        return {"params": params, "router": router}
    adapted = with_adapters(base["params"], params, config.lora)
    return {"params": adapted, "router": base.get("router", {})}


def _optimizer(config: Config, extensions: Extensions) -> optax.GradientTransformation:
    if extensions.optimizer is None:
        return make_optimizer(config.optimizer)
    if config.optimizer.average_decay:
        raise UserError(
            "optimizer.average_decay needs the package's own optimizer, whose state holds the "
            "average of the weights: leave it out"
        )
    return extensions.optimizer


def create_state(config: Config, abstract: TrainState, extensions: Extensions = NONE) -> TrainState:
    """`init_state` of the run's seed: every leaf is made where the abstract one lies."""
    init = partial(init_state, config=config, extensions=extensions)
    return _made(init, abstract, config.seed)


def fresh_variables(config: Config, abstract: TrainState, parts: Collection[str]) -> Any:
    """The parts of `create_state`'s variables that are named, such as "mtp_0"; no others."""

    def pick(params, router):
        trees = {"params": params, "router": router}
        return {
            kind: {name: tree[name] for name in parts if name in tree}
            for kind, tree in trees.items()
        }

    def make(key):
        variables = init_variables(key, config.model)
        return pick(variables["params"], variables["router"])

    return _made(make, pick(abstract.params, abstract.router), config.seed)


def state_from(
    params: Any, router: Any, config: Config, abstract: TrainState, extensions: Extensions = NONE
) -> TrainState:
    """The state before the first step with these weights, which lie as the abstract ones."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    begin = jax.jit(_optimizer(config, extensions).init, out_shardings=places.opt_state)
    zeros = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=places.step)
    return TrainState(zeros(), params, router, begin(params), zeros(), zeros())


def _made(make: Callable[[Any], Any], abstract: Any, seed: int) -> Any:
    """What `make` draws from the seed's key, each leaf where the abstract one lies."""
    key = jax.random.key(seed)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    lowered = jax.jit(make, out_shardings=places).lower(key)
    # XLA:CPU spends 1.2 s on optimising each leaf's random numbers, which are drawn once.
    on_cpu = mesh_of(jax.tree.leaves(abstract)[0]).devices.flat[0].platform == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
    return lowered.compile(compiler_options=options)(key)


def averaged_variables(folder: Path, step: int, config: Config) -> dict[str, Any]:
    """The variables of a run's valid checkpoint with the moving average of the weights in their
    place, on the first device."""
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
    wanted = {"opt_state": shapes.opt_state, "router": shapes.router}
    found, _ = read_state(folder, step, wanted, partial=True)
    return {"params": found["opt_state"][-1].average, "router": found["router"]}


def abstract_adapters(config: Config, layout: Layout) -> Any:
    """A LoRA run's adapters as shapes and dtypes, with shardings where the layout has devices."""
    make = partial(init_adapters, model=config.model, lora=config.lora)
    return placed(jax.eval_shape(lambda: make(jax.random.key(0))), layout)


def abstract_state(config: Config, layout: Layout, extensions: Extensions = NONE) -> TrainState:
    """The TrainState as shapes, dtypes and shardings; allocates nothing."""
    init = partial(init_state, config=config, extensions=extensions)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    places = shardings(shapes, layout, stored=True)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
