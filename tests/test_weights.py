"""The table of weights: it says what the model has, and a row is all that a new weight needs."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.analysis.model_cost import attention_parameters, matmul_parameters, parameters
from dsv3_jax.config import ModelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.config.weights import WEIGHTS, Weight, extended, find_weight, weights
from dsv3_jax.interop.name_map import leaves, num_places, places
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import abstract_variables, init_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, Layout
from dsv3_jax.quantization.block_scaled import BlockScaled
from dsv3_jax.training.optimizer import decayed
from tests.helpers import tiny_model

MODEL = tiny_model()
VARIANTS = {
    "compressed": MODEL,
    "uncompressed": tiny_model(q_lora_rank=None),
    "all dense": tiny_model(first_k_dense_replace=9, num_nextn_predict_layers=0),
    "no shared expert, no bias, two MTP modules": tiny_model(
        n_shared_experts=0, topk_method="group_limited_greedy", num_nextn_predict_layers=2
    ),
}


def by_path(tree):
    """Leaves by the names on their way, a BlockScaled as one."""
    found = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, BlockScaled | PartitionSpec)
    )
    return {tuple(entry.key for entry in path): leaf for path, leaf in found}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_table_has_the_model_s_weights_and_their_shapes(config):
    made = {path: leaf.shape for path, leaf in by_path(abstract_variables(config)).items()}
    assert made == {path: leaf.lead + leaf.dims for path, leaf in leaves(config).items()}
    assert sum(map(math.prod, made.values())) == parameters(config).total


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_leaf_is_found_by_the_end_of_its_path(config):
    for path, leaf in by_path(abstract_variables(config)).items():
        for names in (path, path[1:], ("opt_state", "mu", *path[1:]), path[-2:]):
            row = find_weight(names)
            assert row is not None and row.name == path[-1]
            assert leaf.shape[leaf.ndim - len(row.letters) :] == row.dims_of(config), names
    assert find_weight(("params", "moe_layers", "self_attn", "nothing")) is None


def test_rows_say_what_cannot_be_twice():
    originals = [row for row in WEIGHTS if not row.copy]
    published = [(row.where, name) for row in WEIGHTS for name in row.hf]
    assert len(published) == len(set(published))
    assert len({(row.where, row.path) for row in originals}) == len(originals)
    for row in WEIGHTS:
        assert not row.cut or row.cut in row.letters, row.path
        assert row.is_matrix or not (row.fp8 or row.decayed), row.path
        assert len(row.hf) == (2 if "2" in row.lead else 1), row.path
        assert (row.init == "ones") == row.name.endswith("norm"), row.path


# A gate on attention's output, as a variant of attention might have.
GATE = Weight(
    path="params/{block}/self_attn/g_proj",
    hf=("model.layers.{layer}.self_attn.g_proj.weight",),
    shape="(N U) D",
    where="layer",
    part="attention",
    cut="N",
    fp8=True,
)
OF_EXPERT = Weight(
    path="params/{block}/mlp/experts/skip_proj",
    hf=("model.layers.{layer}.mlp.experts.{expert}.skip_proj.weight",),
    shape="E D D",
    where="moe",
    part="routed_experts",
    cut="E",
    decayed=False,
)


OF_MODEL = Weight(
    path="params/skip_norm",
    hf=("model.skip_norm.weight",),
    shape="D",
    where="model",
    part="norms",
    init="ones",
    decayed=False,
)


@pytest.fixture
def wider():
    with extended(GATE, OF_EXPERT):
        yield


def test_a_new_row_is_initialised_beside_the_others():
    others = init_variables(jax.random.key(0), MODEL)
    with extended(GATE, OF_EXPERT, OF_MODEL):
        made = by_path(init_variables(jax.random.key(0), MODEL))
        assert made.keys() == leaves(MODEL).keys()
    assert made["params", "skip_norm"].tolist() == [1.0] * MODEL.hidden_size
    gate = made["params", "moe_layers", "self_attn", "g_proj"]
    assert gate.dtype == np.float32 and len(np.unique(gate)) > 0.99 * gate.size
    assert np.std(gate) == pytest.approx(MODEL.initializer_range, rel=0.1)
    assert made["params", "mtp_0", "block", "mlp", "experts", "skip_proj"].shape == (
        *(MODEL.n_routed_experts, MODEL.hidden_size, MODEL.hidden_size),
    )
    for path, leaf in by_path(others).items():  # as without it
        np.testing.assert_array_equal(made[path], leaf, err_msg=str(path))


@pytest.mark.usefixtures("wider")
def test_a_new_row_is_placed_on_a_mesh_and_stored_there():
    mesh = make_mesh(ParallelConfig(data=2, local=2, tensor=2))
    layout = Layout(mesh, RULES["train"], config=ShardingConfig(state="zero1"))
    variables, layers = abstract_variables(MODEL), MODEL.num_moe_layers
    used, stored = (
        {path: s.spec for path, s in by_path(shardings(variables, layout, stored=s)).items()}
        for s in (False, True)
    )
    gate = ("params", "moe_layers", "self_attn", "g_proj")
    assert variables["params"]["moe_layers"]["self_attn"]["g_proj"].shape == (
        *(layers, MODEL.num_attention_heads),
        *(MODEL.v_head_dim, MODEL.hidden_size),
    )
    assert used[gate] == PartitionSpec(None, ("tensor",), None, None)
    assert stored[gate] == PartitionSpec(None, ("tensor",), None, ("data", "local"))
    skip = ("params", "moe_layers", "mlp", "experts", "skip_proj")
    assert used[skip] == PartitionSpec(None, ("local",), None, None)
    assert "tensor" in str(stored[skip]) and "data" in str(stored[skip])


@pytest.mark.usefixtures("wider")
def test_a_new_row_is_held_in_fp8_and_decays_as_it_says():
    held = by_path(jax.eval_shape(partial(to_fp8_weights, config=MODEL), abstract_variables(MODEL)))
    gate = held["params", "mtp_0", "block", "self_attn", "g_proj"]
    assert isinstance(gate, BlockScaled)
    assert gate.shape == (MODEL.num_attention_heads * MODEL.v_head_dim, MODEL.hidden_size)
    assert held["params", "moe_layers", "mlp", "experts", "skip_proj"].dtype == MODEL.dtype
    flags = by_path(decayed(abstract_variables(MODEL)["params"]))
    assert flags["dense_layers", "self_attn", "g_proj"]
    assert not flags["moe_layers", "mlp", "experts", "skip_proj"]


@pytest.mark.usefixtures("wider")
def test_a_new_row_has_published_names():
    table, main = places(MODEL), MODEL.num_hidden_layers
    assert len(table) == num_places(MODEL)
    gate = table[f"model.layers.{main}.self_attn.g_proj.weight"]
    assert gate.path == ("params", "mtp_0", "block", "self_attn", "g_proj") and gate.fp8
    assert gate.shape == (MODEL.num_attention_heads * MODEL.v_head_dim, MODEL.hidden_size)
    skip = table[f"model.layers.{main - 1}.mlp.experts.3.skip_proj.weight"]
    assert skip.index == (MODEL.num_moe_layers - 1, 3) and not skip.fp8


def test_a_new_row_is_counted():
    config, before = ModelConfig(), ModelConfig()
    without = parameters(before), attention_parameters(before), matmul_parameters(before)
    with extended(GATE, OF_EXPERT):
        count = parameters(config)
        gate = config.num_attention_heads * config.v_head_dim * config.hidden_size
        skip = config.hidden_size**2
        assert attention_parameters(config) == without[1] + gate
        assert count.attention == without[0].attention + 61 * gate
        assert count.routed_experts == without[0].routed_experts + 58 * 256 * skip
        assert count.mtp == without[0].mtp + gate + 256 * skip
        assert matmul_parameters(config) == without[2] + 61 * gate + 58 * 8 * skip
    assert parameters(config) == without[0], "the table is as it was"
    assert GATE not in weights(config) and len(places(MODEL)) == num_places(MODEL)
