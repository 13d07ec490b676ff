"""The choice of an implementation: explicit, never silent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.grouped_gemm import api, reference
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import abstract_variables, forward
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.recipe import recipe_named
from tests.helpers import tiny_model


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)
    return rows, weights, jnp.array([2, 4], jnp.int32)


def unable(reason):
    def raise_not_implemented(*args, **kwargs):
        raise NotImplementedError(reason)

    return raise_not_implemented


def test_a_fall_back_warns_with_the_reason_and_is_remembered(monkeypatch, operands):
    monkeypatch.setattr(reference, "masked_grouped_matmul", unable("bad moon"))
    monkeypatch.setattr(backend, "_choices", {})
    order = {"cpu": ("reference", "spare")}
    spare = type("module", (), {"masked_grouped_matmul": staticmethod(lambda *a, **k: "done")})
    modules = {"reference": reference, "spare": spare}
    monkeypatch.setattr(
        backend.importlib, "import_module", lambda name: modules[name.rsplit(".", 1)[1]]
    )
    with pytest.warns(
        backend.KernelFallbackWarning, match="spare; not reference, because bad moon"
    ):
        assert backend.run(api.PACKAGE, "masked_grouped_matmul", order=order) == "done"
    (choice,) = backend.choices()
    assert choice.implementation == "spare" and choice.passed_over == (("reference", "bad moon"),)


def test_an_implementation_asked_for_by_name_never_falls_back(monkeypatch, operands):
    monkeypatch.setattr(reference, "grouped_matmul", unable("bad moon"))
    with pytest.raises(NotImplementedError, match="bad moon"):
        api.grouped_matmul(*operands, implementation="reference")
    with backend.use("reference"), pytest.raises(NotImplementedError, match="bad moon"):
        api.grouped_matmul(*operands)


def test_an_unknown_implementation_is_the_callers_mistake(operands):
    with pytest.raises(ValueError, match="'fastest' is no implementation of grouped_matmul"):
        api.grouped_matmul(*operands, implementation="fastest")


def test_the_platform_is_that_of_the_mesh_compiled_for():
    here = jax.default_backend()
    assert backend.platform() == here
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert backend.platform() == "gpu"
        assert api.row_alignment(4096, 8) == 128
    assert (api.row_alignment(64, 8) < 128) == (here == "cpu")


def test_the_layout_says_what_a_program_is_compiled_for(recwarn):
    """A program of one device, too, whose mesh nobody brings into scope; the host has CPUs."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)
    config = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0)
    before = set(backend.choices())
    for layout in (ONE_DEVICE, Layout(mesh)):
        how = Pass(config, layout=layout)
        tokens = jax.ShapeDtypeStruct((1, 4), "int32")
        jax.eval_shape(lambda v, t, how=how: forward(v, t, how), abstract_variables(config), tokens)
        new = set(backend.choices()) - before
        before |= new
    assert {choice.platform for choice in new} == {"gpu"}
    assert any("attention" in choice.op for choice in new)
    assert backend.platform() == jax.default_backend()  # outside again


H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@pytest.mark.filterwarnings("ignore::dsv3_jax.kernels.backend.KernelFallbackWarning")
@pytest.mark.parametrize("name", ["bf16", "fp8_paper"])
def test_a_backward_pass_is_traced_for_the_device_of_its_forward_pass(monkeypatch, name):
    monkeypatch.setattr(backend, "_choices", {})
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=H200)
    model = dataclasses.replace(tiny_model(num_hidden_layers=2), dtype="bfloat16")
    how = Pass(model, recipe_named(name), Layout(mesh))

    def loss(params, router, ids):
        variables = {"params": params, "router": router}
        return forward(variables, ids, how).logits.astype(jnp.float32).mean()

    variables = abstract_variables(model)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    jax.jit(jax.grad(loss)).trace(variables["params"], variables["router"], ids)
    chosen = {choice.op: choice.platform for choice in backend.choices()}
    assert "grouped_wgrad" in chosen or "grouped_dgrad" in chosen or "quantize_both_ways" in chosen
    assert set(chosen.values()) == {"gpu"}


def test_an_attention_bias_is_computed_by_reference_or_refused(monkeypatch):
    monkeypatch.setattr(backend, "_choices", {})
    q, kv, rope = jnp.ones((1, 3, 2, 6)), jnp.ones((1, 3, 2, 9)), jnp.ones((1, 3, 2))

    def no_bias(queries, keys):
        return jnp.zeros(jnp.broadcast_shapes(queries.shape, keys.shape))

    def attend(**how):
        return mla_attention(q, kv, rope, scale=1.0, bias=no_bias, **how)

    np.testing.assert_allclose(attend()[0], mla_attention(q, kv, rope, scale=1.0)[0], rtol=1e-6)
    assert [c.implementation for c in backend.choices()] == ["reference"]
    with pytest.raises(NotImplementedError, match="pallas_gpu does not take an attention bias"):
        attend(implementation="pallas_gpu")
    with backend.use("pallas_tpu"), pytest.raises(NotImplementedError, match="pallas_tpu does"):
        attend()


def test_what_is_lowered_once_is_not_shared_where_multiprocessors_are_left():
    def kernel(x):
        return x + backend.left()

    def run():
        return float(backend._lowered_once(functools.partial(kernel))(jnp.zeros(())))

    assert run() == 0
    with backend.leaving(20):
        assert run() == 20
    assert run() == 0
