"""FP8 weights under FSDP: each device quantises its slice; together they are the whole weight's."""

import dataclasses
import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, QuantConfig, ShardingConfig
from dsv3_jax.model.quantized_slices import MatrixDims, as_matrices, quantize_slices
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.quantization.block_scaled import quantize
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import for_products, gradients
from tests.cases import matrix
from tests.helpers import (
    TOLERANCE,
    random_state,
    random_tokens,
    relative_error,
    tiny_config,
    tiny_model,
)

# Shape, its dims as matrices, and what a mesh cuts anyway.
WEIGHTS = {
    "rows that end within tiles": ((3, 576, 256), (1, 1, 1), ()),
    "experts with gate and up": ((2, 4, 2, 96, 200), (2, 2, 1), (None, "expert")),
    "heads as columns": ((250, 8, 48), (0, 1, 2), ()),
    "heads as rows": ((8, 24, 256), (0, 2, 1), ()),
    "too odd to be cut": ((7, 5), (0, 1, 1), ()),
}


@pytest.mark.parametrize("case, scale_format", matrix(WEIGHTS, ["f32", "ue8m0"]))
def test_slices_have_the_numbers_of_the_whole_weight(case, scale_format):
    shape, dims, cut = WEIGHTS[case]
    dims = MatrixDims(*dims)
    mesh = make_mesh(ParallelConfig(data=4, node=2))
    layout = make_layout(mesh, ShardingConfig(state="fsdp"), ExpertParallelConfig())
    stored = layout.stored_spec(layout.spec(*cut), shape, skip_dims=min(dims.lead, 1))
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight.ravel()[[0, -1]] = np.nan, np.inf
    held = jax.device_put(weight, NamedSharding(mesh, stored))
    made = jax.jit(lambda w: quantize_slices(w, dims, stored, scale_format, layout))(held)
    assert made.values.sharding.is_equivalent_to(held.sharding, len(shape))
    middle = dims.lead + dims.rows
    rows, columns = math.prod(shape[dims.lead : middle]), math.prod(shape[middle:])
    want = quantize(weight.reshape(*shape[: dims.lead], rows, columns), (128, 128), scale_format)
    np.testing.assert_array_equal(made.scales, want.scales)
    got = as_matrices(made.values, dims)
    assert [size % 128 for size in got.shape[-2:]] == [0, 0]
    np.testing.assert_array_equal(
        np.asarray(got[..., :rows, :columns]).view(np.uint8), np.asarray(want.values).view(np.uint8)
    )


def prepared(state: str, preset: str, micro: int, **sizes: int):
    """(config, layout) of a MoE layer and the ends on a mesh, four rows a step.

    Its shared expert is what a dense layer is: both kinds of layer in one program, which takes half
    the time to compile.
    """
    model = tiny_model(
        hidden_size=256,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        kv_lora_rank=128,
        moe_intermediate_size=128,
        num_nextn_predict_layers=0,
        dtype="bfloat16",
    )
    config = dataclasses.replace(
        tiny_config(model, batch_size=4, micro_batch_size=micro, seq_len=32),
        mesh=ParallelConfig(**sizes),
        sharding=ShardingConfig(state=state),
        expert_parallel=ExpertParallelConfig(transport="padded"),
        quant=QuantConfig(preset=preset),
    )
    mesh = make_mesh(config.mesh)
    return config, make_layout(mesh, config.sharding, config.expert_parallel)


def run(state: str, preset: str = "fp8_paper", micro: int = 4, **sizes: int):
    """(loss, gradients) of one step in FP8 on a mesh, and the compiled program's text."""
    config, layout = prepared(state, preset, micro, **sizes)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, layout))
    begun = jax.device_put(random_state(config), places)
    rows = random_tokens(config.model, 4 // micro, micro, 33)
    settings = Schedule(config).settings(0)
    step = jax.jit(partial(gradients, config=config, layout=layout))
    compiled = step.lower(begun, rows, settings).compile()
    loss, _, grads, _ = compiled(begun, rows, settings)
    return float(loss), jax.tree.map(np.asarray, grads), compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "state, preset",
    [
        ("fsdp", "fp8_paper"),
        pytest.param("zero1", "fp8_head", marks=pytest.mark.slow),
    ],
)
def test_slices_multiply_by_the_numbers_of_the_master_and_are_gathered_in_fp8(state, preset):
    """A copy in BF16 that is gathered and then quantised is rounded twice: 0.04 of the loss."""
    loss, grads, text = run(state, preset, data=2, local=2)
    want, want_grads, _ = run("replicated", preset, data=2, local=2)
    assert loss == want
    assert relative_error(grads, want_grads) < TOLERANCE["f32_reordered"]
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    matrices = {kind for kind, shape in gathered if math.prod(map(int, shape.split(","))) > 30_000}
    assert matrices == {"u8"}
    # Gradients leave for the slices; what is added up whole are norms and the router's.
    reduced = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(", text)
    assert all(math.prod(map(int, shape.split(","))) < 5_000 for shape in reduced)


@pytest.mark.slow
def test_weights_that_were_turned_give_the_same_step():
    loss, grads, _ = run("zero1", micro=2, data=2)
    want, want_grads, _ = run("replicated", micro=2, data=2)
    assert loss == want
    assert relative_error(grads, want_grads) < TOLERANCE["f32_reordered"]


def test_weights_are_turned_once_for_all_backward_passes():
    config, layout = prepared("zero1", "fp8_paper", 2, data=2)
    params = abstract_state(config, layout).params
    for passes in (1, 2):
        products = partial(for_products, config=config, layout=layout, passes=passes)
        made = jax.eval_shape(products, params).made["moe_layers"]["mlp"]["experts"]["down_proj"]
        numbers, turned = made
        assert (turned is not None) == (passes > 1)
    assert turned.shape[:-2] == numbers.shape[:-2]
    assert turned.shape[-2:] == numbers.shape[:-3:-1] and turned.tile == (128, 128)
    assert turned.scales.shape[-2:] == numbers.scales.shape[:-3:-1]
