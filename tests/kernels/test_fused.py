"""Fused quantisers: every implementation against the unfused computation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import backend
from dsv3_jax.kernels.fused import api, pallas_gpu, reference, tpu_tiles
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import PER_BLOCK, PER_TOKEN, BlockScaled
from tests.cases import matrix
from tests.kernels.conftest import (
    ALL_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    INTERPRETER_IS_NEWER,
    dequantize,
    lower_for_an_h200,
    normal,
    quantize,
    relative_error,
)


def assert_same(out, expected):
    """The same values, NaN for NaN whatever its sign, and scales to the last place."""
    for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=2e-7)


@pytest.mark.parametrize(
    "implementation, scale_format", matrix(ALL_IMPLEMENTATIONS, ["f32", "ue8m0"])
)
def test_rows_are_quantised_bit_for_bit(implementation, scale_format, rng, running):
    # 77 rows: the last block goes over some rows again.
    x = normal(rng, 77, 256).astype(jnp.bfloat16)
    x = x.at[3, 5].set(jnp.nan).at[4, 7].set(jnp.inf).at[5].set(0)
    with running(implementation):
        out = api.quantize_rows(x, scale_format, implementation=implementation)
    assert_same(out, quantize(x, PER_TOKEN, scale_format))


@pytest.mark.parametrize(
    "implementation, scale_format", matrix(ALL_IMPLEMENTATIONS, ["f32", "ue8m0"])
)
def test_one_read_gives_e4m3_and_e5m6(implementation, scale_format, rng, running):
    # Sizes down to where float16 is subnormal, and below its smallest number.
    x = (normal(rng, 128, 256) * jnp.exp2(rng.integers(-34, 3, (128, 256)))).astype(jnp.bfloat16)
    x = x.at[3, 5].set(jnp.nan).at[4, 7].set(-jnp.inf).at[5].set(0).at[6, :128].set(-65024)
    small = [1.0, 2.0**-37, 1.0078125 * 2.0**-36, -(2.0**-40)]
    x = x.at[7, :4].set(jnp.asarray(small, x.dtype))
    with running(implementation):
        out, kept = api.quantize_rows_in_two_formats(x, scale_format, implementation=implementation)
        back = api.quantize_transposed(kept, scale_format, implementation=implementation)
    assert_same(out, quantize(x, PER_TOKEN, scale_format))
    wanted = jax.jit(e5m6.encode)(x)
    np.testing.assert_array_equal(kept.words, wanted.words)
    np.testing.assert_array_equal(kept.scales, wanted.scales)
    numbers = e5m6.decode(wanted, jnp.float32)
    assert_same(back, quantize(numbers.mT, PER_TOKEN, scale_format))


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_one_read_gives_both_directions(implementation, rng, running):
    x = normal(rng, 128, 256).astype(jnp.bfloat16).at[3, 5].set(jnp.nan).at[:, 7].set(0)
    with running(implementation):
        out = api.quantize_both_ways(x, implementation=implementation)
    assert_same(out, (quantize(x, PER_TOKEN), quantize(x.mT, PER_TOKEN)))


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS[1:])
@pytest.mark.parametrize(
    "op", ["rows", "both_ways", "gathered", "transposed", "swiglu", "swiglu_backward"]
)
def test_rows_in_use_are_quantised_and_no_tile_beyond_them(
    op, implementation, rng, running, monkeypatch
):
    monkeypatch.setattr(tpu_tiles, "ROWS", 1)  # of a block: it is left out whole
    rows, used = 384, 130  # a tile, and two rows of the next
    gate_up = quantize(normal(rng, rows, 256).astype(jnp.bfloat16), PER_TOKEN)
    x = normal(rng, rows, 128).astype(jnp.bfloat16)
    quantise = {
        "rows": (api.quantize_rows, x),
        "both_ways": (api.quantize_both_ways, x),
        "gathered": (api.gather_quantize_both_ways, x, jnp.arange(rows), jnp.ones(rows)),
        "transposed": (api.quantize_transposed, x),
        "swiglu": (partial(api.swiglu_quantize, transposed=True), gate_up),
        "swiglu_backward": (api.swiglu_backward_quantize, gate_up, x),
    }[op]
    with running(implementation):
        function = partial(quantise[0], implementation=implementation)
        some = function(*quantise[1:], used=jnp.int32(used))
        every = function(*quantise[1:])
    for got, wanted in zip(jax.tree.leaves(some), jax.tree.leaves(every), strict=True):
        got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
        for dim in (0, 1):  # where the tokens are: one by one, or a scale for 128
            if got.shape[dim] in (rows, rows // 128):
                made = used if got.shape[dim] == rows else 2
                got, wanted = np.moveaxis(got, dim, 0), np.moveaxis(wanted, dim, 0)
                np.testing.assert_array_equal(got[:made], wanted[:made])
                beyond = slice(256 if made == used else 2, None)
                if implementation == "pallas_tpu":  # what the block before left in VMEM
                    assert (got[beyond] != wanted[beyond]).any()
                elif jax.default_backend() != "gpu":  # there it is what memory held
                    assert np.isnan(got[beyond]).all()
                break
        else:
            raise AssertionError(got.shape)


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape, dtype, scale_format",
    [((256, 128), "float32", "f32"), ((2, 128, 256), "bfloat16", "ue8m0")],
    ids=["dense", "experts"],
)
def test_a_weight_and_its_transpose_share_scales(
    implementation, shape, dtype, scale_format, rng, running
):
    x = normal(rng, *shape).astype(dtype)
    x = x.at[..., 3, 5].set(jnp.nan).at[..., 4, 7].set(-jnp.inf).at[..., :128, 128:].set(0)
    with running(implementation):
        numbers, transposed = api.quantize_blocks(x, scale_format, implementation=implementation)
    assert_same(numbers, quantize(x, PER_BLOCK, scale_format))
    assert_same(transposed, quantize(x.mT, PER_BLOCK, scale_format))
    assert transposed.tile == PER_BLOCK and transposed.shape == (*shape[:-2], shape[-1], shape[-2])


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_numbers_kept_in_either_form_are_quantised_along_tokens(implementation, rng, running):
    as_bf16 = normal(rng, 128, 256).astype(jnp.bfloat16)
    kept = quantize(as_bf16, PER_TOKEN)
    # Infinities, NaN of zeros among them: what is not finite has no part in a scale.
    kept = BlockScaled(kept.values, kept.scales.at[20].set(jnp.inf), PER_TOKEN)
    with running(implementation):
        out = api.quantize_transposed(kept, implementation=implementation)
        plain = api.quantize_transposed(as_bf16, implementation=implementation)
    assert_same(out, quantize(dequantize(kept, jnp.float32).mT, PER_TOKEN))
    assert_same(plain, quantize(as_bf16.mT, PER_TOKEN))


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", [False, True], ids=["bf16", "fp8"])
def test_swiglu_and_its_gradient_along_tokens(implementation, kept, rng, running):
    gate_up, d_out = (normal(rng, 128, width).astype(jnp.bfloat16) for width in (256, 128))
    source = quantize(gate_up, PER_TOKEN) if kept else gate_up
    with running(implementation):
        out = api.swiglu_quantize(source, transposed=True, implementation=implementation)
        backward = api.swiglu_backward_quantize(source, d_out, implementation=implementation)
    if kept:
        gate_up = dequantize(source, jnp.float32)

    def swiglu(gate_up):
        gate, up = jnp.split(gate_up, 2, axis=1)
        return jax.nn.silu(gate) * up

    y, pull_back = jax.vjp(swiglu, gate_up.astype(jnp.float32))
    (d_gate_up,) = pull_back(d_out.astype(jnp.float32))
    for got, exact in zip((out, *backward), (y.mT, d_gate_up, d_gate_up.mT)):
        assert relative_error(dequantize(got, jnp.float32), exact) < 1 / 30


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_each_token_is_sent_to_its_rows_and_the_rest_are_zeros(implementation, rng, running):
    x = normal(rng, 9, 1024).astype(jnp.bfloat16)
    slots = jnp.asarray(rng.permutation(21)[:18].reshape(9, 2), jnp.int32)
    tokens = jnp.full(21, 9, jnp.int32)
    for k in range(2):
        tokens = tokens.at[slots[:, k]].set(jnp.arange(9, dtype=jnp.int32))
    with running(implementation):
        out = api.permute_quantize(x, slots, tokens, implementation=implementation)
    rows = jnp.zeros((21, 1024), x.dtype).at[slots[:, 0]].set(x).at[slots[:, 1]].set(x)
    assert_same(out, quantize(rows, PER_TOKEN))


@pytest.mark.parametrize(
    "implementation, scale_format", matrix(ALL_IMPLEMENTATIONS, ["f32", "ue8m0"])
)
def test_gathered_rows_are_weighted_and_quantised_both_ways(
    implementation, scale_format, rng, running
):
    x = normal(rng, 40, 256).astype(jnp.bfloat16)
    x = x.at[3, 5].set(jnp.nan).at[4, 7].set(jnp.inf).at[39, 3].set(-jnp.inf)
    tokens = jnp.asarray(rng.integers(0, 41, 256), jnp.int32).at[jnp.arange(9)].set(40)
    tokens = tokens.at[200].set(3).at[201].set(4)
    weights = normal(rng, 256).astype(jnp.float32)
    with running(implementation):
        out = api.gather_quantize_both_ways(
            x, tokens, weights, scale_format, implementation=implementation
        )
    chosen = x.astype(jnp.float32)[jnp.minimum(tokens, 39)] * weights[:, None]
    rows = jnp.where(tokens[:, None] < 40, chosen, 0).astype(jnp.bfloat16)
    both = quantize(rows, PER_TOKEN, scale_format), quantize(rows.mT, PER_TOKEN, scale_format)
    assert_same(out, both)


CHOICES = {
    "groups by their best": (32, dict(top_k=4, n_group=8, topk_group=3, best_of_group=1)),
    "V3's groups": (64, dict(top_k=8, n_group=8, topk_group=4)),
    "no groups": (64, dict(top_k=6)),
    "pairs": (16, dict(top_k=8, n_group=8, topk_group=4)),
    "fewer than lanes": (12, dict(top_k=5, n_group=4, topk_group=2)),
}


@pytest.mark.parametrize(
    "experts, choice, implementation",
    matrix([pytest.param(*CHOICES[name], id=name) for name in CHOICES], IMPLEMENTATIONS),
)
def test_the_router_chooses_as_by_sorting(implementation, experts, choice, rng, running):
    # Few different scores: many are equal, and the first must win.
    logits = jnp.round(normal(rng, 11, experts), 1)
    bias = jnp.round(normal(rng, experts) / 4, 1)
    with running(implementation):
        chosen, weights, scores = api.route_top_k(
            logits, bias, **choice, implementation=implementation
        )
    exact = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    np.testing.assert_allclose(scores, exact, rtol=1e-6)
    kept, ranked = choice.get("topk_group", 1), np.array(scores + bias)
    groups = ranked.reshape(11, choice.get("n_group", 1), -1)
    by_size = np.sort(groups, axis=2)[..., ::-1][..., : choice.get("best_of_group", 2)]
    order = np.argsort(-by_size.sum(2, dtype=np.float32), axis=1, kind="stable")
    for token in range(11):
        losing = order[token, kept:]
        groups[token, losing] = -np.inf
        best = np.argsort(-groups[token].reshape(-1), kind="stable")[: choice["top_k"]]
        np.testing.assert_array_equal(chosen[token], best)
        np.testing.assert_array_equal(weights[token], scores[token, best])


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
def test_swiglu_is_rounded_once_and_quantised(implementation, rng, running):
    gate_up = normal(rng, 64, 256).astype(jnp.bfloat16)
    with running(implementation):
        out = api.swiglu_quantize(gate_up, implementation=implementation)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    # An E4M3 number has 3 bits: half a unit of its last place is 1/16, 1/37 on average.
    assert relative_error(dequantize(out), gate / (1 + np.exp(-gate)) * up) < 1 / 30
    # Two exponentials may differ in the last bit and tip a rounding of bfloat16.
    expected = dequantize(reference.swiglu_quantize(gate_up), jnp.float32)
    assert relative_error(dequantize(out, jnp.float32), expected) < 1e-3


@pytest.mark.parametrize("implementation", ALL_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "tokens, dim, scale_format", [(61, 384, "ue8m0"), (3, 3072, "f32")], ids=["narrow", "wide"]
)
def test_normalised_numbers_are_quantised_unrounded(
    implementation, tokens, dim, scale_format, rng, running
):
    x, weight = normal(rng, tokens, dim).astype(jnp.bfloat16) * 3, 1 + normal(rng, dim) / 10
    x = x.at[1].mul(1e-6).at[2].set(0)
    with running(implementation):
        out = api.rms_norm_quantize(x, weight, 1e-6, scale_format, implementation=implementation)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * np.asarray(weight)
    expected = quantize(jnp.asarray(exact, jnp.float32), PER_TOKEN, scale_format)
    np.testing.assert_allclose(out.scales, expected.scales, rtol=1e-6)
    # The sum's order may tip a rounding: 1/8 of a number, of one in ten thousand.
    assert relative_error(dequantize(out, jnp.float32), dequantize(expected, jnp.float32)) < 2e-3


@INTERPRETER_IS_NEWER
def test_what_threads_do_with_their_registers_lowers_for_a_gpu(rng):
    # The interpreter sees plain JAX in its place.
    x = normal(rng, 128, 1024).astype(jnp.bfloat16)
    kept, gate = quantize(x, PER_TOKEN), normal(rng, 16, 64)
    lower_for_an_h200(pallas_gpu.quantize_rows, x)
    lower_for_an_h200(pallas_gpu.quantize_both_ways, x)
    lower_for_an_h200(pallas_gpu.gather_quantize_both_ways, x, jnp.arange(256), jnp.ones(256))
    lower_for_an_h200(pallas_gpu.quantize_rows_in_two_formats, x)
    for numbers in (kept, e5m6.encode(x)):
        lower_for_an_h200(pallas_gpu.quantize_transposed, numbers)
    for source in (x, kept):
        lower_for_an_h200(partial(pallas_gpu.swiglu_quantize, transposed=True), source)
        lower_for_an_h200(pallas_gpu.swiglu_backward_quantize, source, x[:, :512])
    lower_for_an_h200(pallas_gpu.quantize_blocks, x[None])
    lower_for_an_h200(pallas_gpu.quantize_blocks, x.astype(jnp.float32))
    choose = partial(pallas_gpu.route_top_k, top_k=8, n_group=8, topk_group=4, best_of_group=2)
    lower_for_an_h200(choose, gate, gate[0])
    lower_for_an_h200(choose, gate[:, :16], gate[0, :16])


def test_a_tpu_quantises_by_kernels_and_leaves_the_router_to_xla():
    x, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 256), (256,)))
    device = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(api.quantize_rows, x)
        jax.eval_shape(partial(api.route_top_k, top_k=8), x, bias)
    made = backend.choices()
    assert backend.Choice("quantize_rows", "tpu", "pallas_tpu") in made
    assert backend.Choice("route_top_k", "tpu", "reference") in made


@pytest.mark.misuse
def test_refuses_shapes_that_do_not_belong_together(rng):
    gate_up = normal(rng, 128, 256)
    with pytest.raises(ValueError, match="must be half as wide"):
        api.swiglu_backward_quantize(gate_up, normal(rng, 128, 256))
    with pytest.raises(ValueError, match=r"must be \[T, D\] in tiles"):
        api.quantize_transposed(quantize(gate_up, (128, 128)))
    with pytest.raises(ValueError, match="a row for each token"):
        api.permute_quantize(gate_up, jnp.zeros((64, 2), jnp.int32), jnp.zeros(256, jnp.int32))
    with pytest.raises(ValueError, match="top_k=9 experts must fit"):
        api.route_top_k(normal(rng, 4, 16), jnp.zeros(16), top_k=9, n_group=2, topk_group=1)
