"""The programs that `compile` compiles, built by the functions that a run on the devices calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config, UserError
from dsv3_jax.frozen import abstract_base
from dsv3_jax.inference.acts import advance_of, feed
from dsv3_jax.inference.kv_cache import NO_PAGE
from dsv3_jax.inference.slots import Chunk, Program, Slots, closed_slots
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.model.cache import init_model_cache, init_paged_cache
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.micro_batches import check_micro_batches
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout, make_layout, serving_layouts
from dsv3_jax.starting import Weights
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.stages import plan_stages
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step_program import lowered_step

ROUNDS = r"/experts/.*while$"  # the loop over rounds of an exchange, by what it comes from


def rounds_in_loop(config: Config) -> int:
    """How often an exchange's loop over rounds runs where all rows fit into the first."""
    return int(config.expert_parallel.overflow == "loop")


@dataclasses.dataclass(frozen=True)
class Serving:
    """What a prefill or decode program is compiled for.

    Fields:
        batch: sequences on all devices.
        context: tokens of a prompt, or of the cache when decoding.
        redundant_experts: places for experts beyond one each (ISCA paper, section 2.3).
        fp8_weights: projections held in FP8, as published.
        fp8_cache: latents held in FP8, in pages.
        micro_batches: of a decoding step; see model/micro_batches.py.
    """

    batch: int
    context: int = 4096
    redundant_experts: int = 0
    fp8_weights: bool = True
    fp8_cache: bool = False
    micro_batches: int = 1


class Built(NamedTuple):
    """A program before it is compiled: what lowers it, its arguments by name, loops to count."""

    lower: Any  # () -> jax.stages.Lowered
    arguments: Any  # a dict of trees of ShapeDtypeStructs with shardings
    layout: Layout
    trips: Mapping[str, float]


def layout_on(config: Config, devices: Sequence[Any]) -> Layout:
    """The layout that `train.py` would make on these devices; UserError if some are left.

    config: as `parallel.mesh.fill_mesh` fills it for as many devices.
    """
    if config.mesh.num_devices != len(devices):
        sizes = (
            " x ".join(f"{k} {v}" for k, v in vars(config.mesh).items() if v > 1) or "one device"
        )
        rest = config.mesh.num_devices // config.mesh.data
        fix = (
            f": use --mesh.data {len(devices) // rest}"
            if len(devices) % rest == 0
            else f", which {rest} (the axes but data) does not divide"
        )
        raise UserError(
            f"the mesh is {sizes} = {config.mesh.num_devices:,} devices, and the topology has "
            f"{len(devices):,}{fix}"
        )
    return make_layout(make_mesh(config.mesh, devices), config.sharding, config.expert_parallel)


def training(config: Config, layout: Layout, weights: Weights | None = None) -> Built:
    """The step of `train.py`, with as many micro-batches as the full batch has.

    weights: those of config.init_from, opened; a LoRA run's base has their form.
    """
    state = abstract_state(config, layout)
    base = abstract_base(config, weights, layout)
    # A batch-size ramp makes the loop over micro-batches data; further rounds run only where rows
    # do not fit into buffers.
    trips: dict[str, float] = {
        r"^jit\(train_step\)/while$": Schedule(config).max_micro_batches,
        ROUNDS: rounds_in_loop(config),
    }
    if config.mesh.pipe > 1:
        turns = plan_stages(config).turns_of_ticks()
        trips |= {rf"/{name}/while$": often for name, often in turns.items()}
    return Built(
        partial(lowered_step, config, layout, state, base),
        {"state": state._asdict()} | ({} if base is None else {"frozen base": base}),
        layout,
        trips,
    )


def serving(config: Config, layout: Layout, what: Serving, decode: bool) -> Built:
    """An engine's act: `inference.acts.feed` (prompts, whole) or `advance` (a token of each)."""
    of_prompts, of_steps = serving_layouts(layout)
    layout = of_steps if decode else of_prompts
    devices, context = layout.size("batch"), layout.size("cache")
    if what.batch % devices or what.batch <= 0:
        raise UserError(
            f"batch={what.batch} sequences must be a positive multiple of the {devices} devices "
            f"that they are spread over: use {max(-(-what.batch // devices), 1) * devices}"
        )
    if what.context % (PAGE * context):
        raise UserError(f"context={what.context} must be a multiple of {PAGE * context}")
    check_micro_batches(what.micro_batches, what.batch, layout)
    steps = Pass(config.model, layout=of_steps, micro_batches=what.micro_batches)
    program = Program(Pass(config.model, layout=of_prompts), steps, sampled=False)
    variables = _weights(config, layout, what)
    cache = _cache(config, of_steps, what, paged=decode)
    by_sequence = layout.sharding("batch")

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_sequence), tree
        )

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((what.batch, *shape), jnp.int32, sharding=by_sequence)

    _, *rest = placed(jax.eval_shape(partial(closed_slots, config.model, what.batch, 0, 0)))
    trips = {ROUNDS: rounds_in_loop(config)}
    arguments = {"weights": variables, "cache": cache}
    if decode:
        table = cache.block_table
        pool = dataclasses.replace(cache, block_table=integers(0))
        slots = Slots(pool, None, *rest)
        return Built(
            lambda: advance_of(program).lower(variables, slots, table, program),
            arguments,
            layout,
            trips,
        )
    numbers = [integers() for _ in range(5)]
    last: Any = jax.ShapeDtypeStruct((what.batch,), jnp.bool_, sharding=by_sequence)
    slot, start, valid, following, number = numbers
    chunk = Chunk(slot, integers(what.context), start, valid, following, last, number, rest[-1])
    slots = Slots(cache, None, *rest)
    return Built(
        lambda: feed.lower(variables, slots, integers(1), chunk, program, True),
        arguments,
        layout,
        trips,
    )


def _weights(config: Config, layout: Layout, what: Serving) -> Any:
    """Shapes of weights as published, in BF16 or FP8, with places for redundant experts."""
    model = config.model
    variables = abstract_variables(model)
    variables["params"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), variables["params"]
    )
    if what.redundant_experts:
        variables = _with_places(variables, model.n_routed_experts + what.redundant_experts, layout)
    if what.fp8_weights:
        variables = jax.eval_shape(partial(to_fp8_weights, config=model), variables)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        variables,
        shardings(variables, layout),
    )


def _with_places(variables: Any, places: int, layout: Layout) -> Any:
    """The shapes that `redundant_experts.replicate_experts` makes of these."""
    devices = layout.size("expert")
    if places % devices:
        raise UserError(
            f"{places} places of experts, redundant ones included, must be a multiple of the "
            f"{devices} devices that they are spread over"
        )

    def wider(leaf, experts: int, dim: int):
        shape = (*leaf.shape[:dim], experts, *leaf.shape[dim + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    layers = variables["params"]["moe_layers"]
    experts = layers["mlp"]["experts"]
    num_layers, num_experts = jax.tree.leaves(experts)[0].shape[:2]
    mlp = {**layers["mlp"], "experts": jax.tree.map(lambda x: wider(x, places, 1), experts)}
    params = {**variables["params"], "moe_layers": {**layers, "mlp": mlp}}
    most = places - num_experts + 1  # all redundant places may be one expert's

    def table(*shape: int):
        return jax.ShapeDtypeStruct((num_layers, *shape), jnp.int32)

    names = {
        "expert": table(places),
        "place": table(num_experts, most),
        "count": table(num_experts),
    }
    return {**variables, "params": params, "placement": {"moe_layers": {"mlp": names}}}


def _cache(config: Config, layout: Layout, what: Serving, paged: bool) -> Any:
    model = config.model
    if not paged:
        make = partial(init_model_cache, model, what.batch, what.context)
        place = layout.sharding(None, "batch", "cache")
    else:
        width = what.context // PAGE
        table = np.full((what.batch, width), NO_PAGE, np.int32)
        make = partial(init_paged_cache, model, table, what.batch * width, PAGE, what.fp8_cache)
        place = layout.sharding("batch")
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(make),
    )
