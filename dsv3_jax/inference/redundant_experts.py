"""Serving with redundant experts: busy experts get replicas by a plan, outputs stay the same.

Checkpoints hold every expert once. `replicate_experts` makes the variables to serve from: the
experts' weights gathered into their places, and a third collection, `placement`, by which
`model/moe.py` shares an expert's tokens out over its replicas. Plans come from
`parallel/load_balancer.py`; their loads are those that training logged, or that `generate` counted.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import generate
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import Variables
from dsv3_jax.parallel.load_balancer import Placement, balance
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout


def plan_places(
    load_LE: Num[np.ndarray, "L E"],
    num_redundant: int,
    config: ModelConfig,
    layout: Layout = ONE_DEVICE,
) -> Placement:
    """The plan with `num_redundant` more places than experts, for the devices of the layout.

    Raises UserError for a number that does not divide over them, or is past any use.
    """
    sizes = [layout.mesh.shape[axis] for axis in layout.rules.expert]
    most = config.n_routed_experts * math.prod(sizes)
    if num_redundant > most:
        raise UserError(
            f"{num_redundant} redundant experts: at most {most}, a place more for each of the "
            f"{config.n_routed_experts} experts on each of {math.prod(sizes)} devices"
        )
    return balance(
        load_LE,
        config.n_routed_experts + num_redundant,
        num_groups=1 if config.topk_method == "greedy" else config.n_group,
        num_nodes=sizes[0],
        num_devices=math.prod(sizes),
    )


def replicate_experts(
    variables: Variables,
    placement: Placement,
    config: ModelConfig,
    layout: Layout = ONE_DEVICE,
) -> Variables:
    """The variables with the experts of every layer in the places that the plan gives them.

    On a mesh each device gets the experts of its own places. The plan's layers are the main
    model's MoE layers and then, if it has more, MTP modules; those that it leaves out keep one
    place an expert. Raises UserError for a plan of another model.
    """
    num_layers, num_experts = placement.count_LE.shape
    most = config.num_moe_layers + config.num_nextn_predict_layers
    fits = 0 < config.num_moe_layers <= num_layers <= most
    if num_experts != config.n_routed_experts or not fits:
        raise UserError(
            f"a plan for {num_layers} layers of {num_experts} experts is not one for a model with "
            f"{config.num_moe_layers} MoE layers, {config.num_nextn_predict_layers} MTP modules "
            f"and {config.n_routed_experts} experts"
        )
    params, placed = dict(variables["params"]), {}
    main = Placement(*(rows[: config.num_moe_layers] for rows in placement))
    params["moe_layers"], placed["moe_layers"] = _placed(params["moe_layers"], main, layout)
    for depth in range(num_layers - config.num_moe_layers):
        name, layer = f"mtp_{depth}", config.num_moe_layers + depth
        if name not in params:
            continue  # a model served without its MTP modules
        one = Placement(*(rows[layer] for rows in placement))
        block, places = _placed(params[name]["block"], one, layout)
        params[name] = {**params[name], "block": block}
        placed[name] = {"block": places}
    return {**variables, "params": params, "placement": placed}


def _placed(layer, placement: Placement, layout: Layout):
    """(the layer with its experts gathered, its entry of the `placement` collection)."""
    places = jax.tree.map(jnp.asarray, placement)

    def gather(experts, expert_LP):
        of_layer = lambda weights, expert_P: weights[expert_P]  # noqa: E731
        of_all = jax.vmap(of_layer) if expert_LP.ndim == 2 else of_layer
        return {"experts": jax.tree.map(lambda w: of_all(w, expert_LP), experts)}

    operands = (layer["mlp"]["experts"], places.expert_LP)
    where = shardings(jax.eval_shape(gather, *operands), layout)
    experts = layout.make(jax.jit(gather), where, *operands)
    names = {"expert": places.expert_LP, "place": places.place_LEC, "count": places.count_LE}
    return {**layer, "mlp": {**layer["mlp"], **experts}}, {"mlp": names}


def measure_load(
    variables: Variables,
    prompts: Sequence[Sequence[int | np.integer]],
    config: ModelConfig,
    layout: Layout = ONE_DEVICE,
) -> Int[np.ndarray, "L E"]:
    """How many of the prompts' (token, choice) pairs each expert of each MoE layer receives."""
    load = ExpertLoad(config)
    next(generate(variables, prompts, config, max_new_tokens=1, layout=layout, expert_load=load))
    return load.count_LE
