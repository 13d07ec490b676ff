"""The rules from logical dims to mesh axes, and what a layout does with them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.plain_products import product
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, RULES, Layout, make_layout
from dsv3_jax.quantization.block_scaled import StepWeight
from tests.helpers import TOLERANCE, random_tokens, random_variables, relative_error, tiny_model


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(ParallelConfig(data=4, tensor=2)))


def test_dims_become_mesh_axes_by_the_table(layout):
    assert layout.spec("batch", "heads", None) == P(("data",), ("tensor",), None)
    assert layout.spec("expert", "seq") == P(None, None), "axes of one device"
    assert layout.size("batch") == 4 and layout.size("seq") == 1
    assert {axis for rules in RULES.values() for axes in rules for axis in axes} <= set(AXES)


def test_unknown_names_and_axes_used_twice_are_errors(layout):
    with pytest.raises(ValueError, match=r"unknown dim 'sequence': the rules name batch, seq"):
        layout.spec("batch", "sequence")
    with pytest.raises(ValueError, match=r"'heads', 'vocab'.*use one mesh axis twice"):
        layout.spec("heads", "vocab")


def test_equal_layouts_share_one_compilation(layout):
    twin = Layout(make_mesh(ParallelConfig(data=4, tensor=2)))
    assert twin == layout and hash(twin) == hash(layout)
    double = jax.jit(lambda x, layout: layout.constrain(2 * x, "batch"), static_argnums=1)
    for each in (layout, twin):
        assert double(jnp.ones((8, 3)), each).sharding.shard_shape((8, 3)) == (2, 3)
    assert double._cache_size() == 1


def test_a_shard_mapped_function_sees_local_shapes_and_axis_names(layout):
    def of_shard(x):
        assert x.shape == (2, 3)
        return jax.lax.psum(x.sum(), layout.axes("batch"))

    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    total = layout.shard_map(of_shard, layout.spec("batch"), P())
    assert jax.jit(total)(x) == x.sum()


def test_one_device_is_a_mesh_of_one_in_which_nothing_is_cut():
    x, one = jnp.ones((2, 3)), Layout(make_mesh(ParallelConfig()))
    for each in (ONE_DEVICE, one):
        assert each.one_device and each.size("batch") == 1 and not each.axes("expert")
        assert each.constrain(x, "batch", "seq") is x and each.in_order(x) is x
        assert each.shard_map(jnp.sin, each.spec("batch"), P()) is jnp.sin
    assert one.platform == "cpu" and one.has_devices
    assert ONE_DEVICE.platform is None and not ONE_DEVICE.has_devices


def test_the_model_is_imported_without_a_device():
    """As where a program is only lowered, or another process has the accelerator."""
    program = (
        "from dsv3_jax.model.transformer import forward; import jax\n"
        "try: jax.devices()\n"
        "except RuntimeError as error: print('no_such_platform' in str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_model_on_a_mesh_equals_the_model_on_one_device():
    model = tiny_model(num_hidden_layers=2)
    variables, tokens = random_variables(model), random_tokens(model, 4, 9)
    layout = Layout(make_mesh(ParallelConfig(data=4)))
    run = jax.jit(forward, static_argnames="config")
    want, got = run(variables, tokens, model), run(variables, tokens, Pass(model, layout=layout))
    assert got.logits.sharding.shard_shape(got.logits.shape)[0] == 1
    assert relative_error(got, want) < TOLERANCE["f32_model"]


def test_a_weight_in_slices_is_gathered_in_bf16_and_its_gradient_scattered_in_f32():
    """FSDP: no device adds up a gradient whole, and none gathers a master weight."""
    mesh = make_mesh(ParallelConfig(data=2, node=2, tensor=2))
    layout = make_layout(mesh, ShardingConfig(state="fsdp"), ExpertParallelConfig())
    random = np.random.default_rng(5)
    x, weight = random.standard_normal((8, 1, 6)), random.standard_normal((12, 6))
    x = jnp.asarray(x, jnp.bfloat16)
    spec = layout.spec("mlp", None)
    stored = layout.stored_spec(spec, weight.shape)
    assert stored == P(("tensor", "data"), "node")  # 12 rows are 6, and 3; then 6 columns

    def loss(weight, x):
        used, held = (NamedSharding(mesh, each) for each in (spec, stored))
        copy = jax.lax.stop_gradient(weight).astype(jnp.bfloat16)
        both = StepWeight(weight, layout.gather(layout.place(copy, stored), used, held))
        where = layout.spec("batch"), layout.spec("batch", None, "mlp")
        y = layout.shard_map(product, (where[0], spec), where[1])(x, both)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    held = jax.device_put(jnp.asarray(weight, jnp.float32), NamedSharding(mesh, stored))
    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, stored))
    rows = jax.device_put(x, layout.sharding("batch"))
    lowered = step.lower(held, rows)
    assert lowered.as_text().count("reduce_scatter") == 2  # over data, then over node
    narrow = jnp.asarray(weight, jnp.bfloat16)
    y = jnp.einsum("btk,nk->btn", x, narrow, preferred_element_type=jnp.float32)
    dy = 2 * y.astype(jnp.bfloat16).astype(jnp.float32)
    want = np.einsum("btn,btk->nk", np.asarray(dy, np.float64), np.asarray(x, np.float64))
    assert relative_error(lowered.compile()(held, rows), want) < TOLERANCE["bf16_op"]


def test_for_tpus_a_gradient_is_scattered_an_axis_at_a_time_to_the_same_slices(monkeypatch):
    layout = make_layout(
        make_mesh(ParallelConfig(data=2, node=4)),
        ShardingConfig(state="fsdp"),
        ExpertParallelConfig(),
    )
    stored = layout.stored_spec(P(), (16, 3))
    assert stored == P(("data", "node"), None)
    rows = jnp.asarray(np.random.default_rng(2).integers(-8, 8, (8, 16)), jnp.float32)

    def gradient():
        def loss(master):
            def of_device(rows, weight):
                return jax.lax.psum(rows @ weight.master, ("data", "node"))

            specs = layout.spec("batch"), P()
            weight = StepWeight(master, jnp.zeros((16, 3)))
            return layout.shard_map(of_device, specs, P())(rows, weight)[0].sum()

        place = NamedSharding(layout.mesh, stored)
        master = jax.device_put(jnp.ones((16, 3)), place)
        lowered = jax.jit(jax.grad(loss), out_shardings=place).lower(master)
        return lowered.as_text().count("reduce_scatter"), lowered.compile()(master)

    (once, want), _ = gradient(), monkeypatch.setattr(Layout, "platform", "tpu")
    twice, got = gradient()
    assert (once, twice) == (1, 2)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(want, np.tile(np.asarray(rows).sum(0)[:, None], 3))


def test_for_tpus_no_gather_is_over_all_devices(monkeypatch):
    sizes = ParallelConfig(data=2, node=2, local=2)
    layout = make_layout(make_mesh(sizes), ShardingConfig(state="fsdp"), ExpertParallelConfig())

    def gathers(rows: int) -> int:
        weight = jnp.arange(rows * 6.0).reshape(rows, 6)
        used, held = (
            NamedSharding(layout.mesh, spec) for spec in (P(), layout.stored_spec(P(), (rows, 6)))
        )
        gather = jax.jit(lambda piece: layout.gather(piece, used, held), out_shardings=used)
        lowered = gather.lower(jax.device_put(weight, held))
        np.testing.assert_array_equal(lowered.compile()(jax.device_put(weight, held)), weight)
        return lowered.as_text().count('"stablehlo.all_gather"')

    # Of 16 rows each device has two; of 4, two have a row, and half of its columns each.
    assert (gathers(16), gathers(4)) == (1, 2)
    monkeypatch.setattr(Layout, "platform", "tpu")
    assert (gathers(16), gathers(4)) == (2, 2)
