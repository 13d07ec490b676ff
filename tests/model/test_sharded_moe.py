"""A MoE layer over a mesh equals the layer on one device, router, loss and load included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.config import ExpertParallelConfig
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import MoE, MoEWeights, routed_experts
from dsv3_jax.model.router import route, update_router_bias
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import Layout
from tests.cases import in_every_run
from tests.helpers import TOLERANCE, relative_error, tiny_model

MODEL = tiny_model()
# 5 rows of 7 tokens: neither divides over any mesh, so that tokens of nobody fill both up.
BATCH, LENGTH = 5, 7
MASK = jnp.arange(LENGTH) < jnp.array([[7], [6], [5], [7], [4]])
MESHES = {
    "experts_and_tensor": {"node": 2, "local": 2, "tensor": 2},
    "experts_and_context": {"data": 2, "local": 2, "context": 2},
    "every_token_axis": {"data": 2, "node": 2, "context": 2},
    "one_node": {"local": 8},  # a token goes to more devices than to groups
    "no_experts": {"data": 4, "context": 2},
}


def layout_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, expert=ExpertParallelConfig(transport="padded", capacity_factor=1.5))


def inputs():
    rng = np.random.default_rng(0)
    experts, dim, width = MODEL.n_routed_experts, MODEL.hidden_size, MODEL.moe_intermediate_size
    shapes = [(experts, dim), (experts,), (experts, 2, width, dim), (experts, dim, width)]
    arrays = [jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, dim)), jnp.float32)
    return x, MoEWeights(*arrays)


def run(layer):
    """Output, statistics and the gradients of x and all weights, the balance loss among them."""
    x, weights = inputs()
    d_y = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(x, gate, gate_up, down):
        y, stats, _ = layer(x, MoEWeights(gate, weights.bias, gate_up, down), MASK)
        return jnp.sum(y * d_y) + 3 * stats.balance_loss, (y, stats)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, (y, stats)), gradients = gradient(x, weights.gate, weights.gate_up, weights.down)
    return y, stats, list(gradients)


@pytest.fixture(scope="module")
def on_one_device():
    return run(partial(routed_experts, how=Pass(MODEL)))


# Each axis is in two of these, and experts on it, if it has any.
QUICK = "experts_and_tensor", "no_experts"


@pytest.mark.parametrize("name", in_every_run(MESHES, *QUICK))
def test_a_layer_over_a_mesh_equals_the_layer_on_one_device(name, on_one_device):
    layout = layout_of(**MESHES[name])
    y, stats, gradients = run(partial(routed_experts, how=Pass(MODEL, layout=layout)))
    want, want_stats, want_gradients = on_one_device
    assert relative_error(y, want) < TOLERANCE["f32_op"]
    assert relative_error(gradients, want_gradients) < TOLERANCE["f32_reordered"]
    # The loss is of whole sequences, also where their tokens lie on different devices.
    assert float(stats.balance_loss) == pytest.approx(float(want_stats.balance_loss), rel=1e-6)
    np.testing.assert_array_equal(stats.experts, want_stats.experts)
    np.testing.assert_array_equal(stats.weights, want_stats.weights)
    # The load, and with it the bias, is the single device's bit for bit, and every device has it.
    np.testing.assert_array_equal(stats.load_E, want_stats.load_E)
    assert int(stats.load_E.sum()) == int(MASK.sum()) * MODEL.num_experts_per_tok
    bias = inputs()[1].bias
    moved = update_router_bias(bias, stats.load_E, 1e-3)
    np.testing.assert_array_equal(moved, update_router_bias(bias, want_stats.load_E, 1e-3))
    assert len({shard.data.tobytes() for shard in moved.addressable_shards}) == 1


def test_a_bias_moved_by_each_device_s_own_load_is_refused():
    """A mistake seen in public code: signs of per-device loads, returned as if replicated.

    With the check of replication off, it makes eight different "copies" of one bias.
    """
    x, weights = inputs()
    x = jnp.tile(x.reshape(-1, x.shape[-1]), (8, 1))[: 8 * 30] * jnp.arange(1.0, 241.0)[:, None]
    layout = layout_of(data=2, node=2, local=2)
    tokens = PartitionSpec(("data", "node", "local"))

    def per_device(x, gate, bias):
        load = jnp.bincount(route(x, gate, bias, MODEL).experts_TK.ravel(), length=len(bias))
        return update_router_bias(bias, load, 1e-3)

    specs = {"in_specs": (tokens, PartitionSpec(), PartitionSpec()), "out_specs": PartitionSpec()}
    unchecked = jax.shard_map(per_device, mesh=layout.mesh, check_vma=False, **specs)
    wrong = jax.jit(unchecked)(x, weights.gate, weights.bias)
    assert len({shard.data.tobytes() for shard in wrong.addressable_shards}) > 1
    with pytest.raises(ValueError, match="replication"):
        jax.jit(layout.shard_map(per_device, **specs))(x, weights.gate, weights.bias)


def test_a_mesh_of_one_device_is_no_mesh():
    """The experts' program is that of a single device."""
    x = inputs()[0]
    variables = jax.eval_shape(MoE(Pass(MODEL)).init, jax.random.key(0), x)
    apply = jax.jit(MoE(Pass(MODEL, layout=layout_of())).apply)
    assert "manual_computation" not in apply.lower(variables, x).as_text()
    apply = jax.jit(MoE(Pass(MODEL, layout=layout_of(local=2))).apply)
    assert "manual_computation" in apply.lower(variables, x).as_text()


def test_experts_spread_over_devices_need_a_transport():
    layout = layout_of(local=2)
    layout = Layout(layout.mesh, expert=ExpertParallelConfig(transport="local"))
    x, weights = inputs()
    with pytest.raises(ValueError, match="'local' moves nothing"):
        routed_experts(x, weights, None, Pass(MODEL, layout=layout))


def test_tokens_may_be_told_experts_of_more_groups_than_their_router_chooses():
    """Plans do not count on the limit of groups where nobody keeps to it: no entry is lost."""
    per_token, experts = MODEL.num_experts_per_tok, MODEL.n_routed_experts
    assert MODEL.topk_group < MODEL.n_group and per_token > MODEL.topk_group
    order = jnp.argsort(jax.random.uniform(jax.random.key(1), (BATCH, LENGTH, experts)), axis=-1)
    # One of every group first: more groups than topk_group.
    by_group = (jnp.arange(per_token) % MODEL.n_group) * (experts // MODEL.n_group)
    told = (by_group + order[..., :1]) % experts
    x, weights = inputs()

    def layer(layout):
        how = Pass(MODEL, layout=layout)
        return jax.jit(lambda x, w, told: routed_experts(x, w, None, how, told))(x, weights, told)

    want, want_stats, _ = layer(Pass(MODEL).layout)
    y, stats, _ = layer(layout_of(node=4, local=2))
    np.testing.assert_array_equal(stats.load_E, want_stats.load_E)
    assert relative_error(y, want) < TOLERANCE["f32_op"]
