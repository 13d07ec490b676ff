"""Causal attention: every implementation against float64, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels import tpu
from dsv3_jax.kernels.attention import api, pallas_gpu, pallas_tpu, tile_order
from dsv3_jax.kernels.attention.hopper_kept import Kept
from dsv3_jax.kernels.attention.hopper_parts import Columns, Offset
from dsv3_jax.kernels.attention.hopper_ring import BackwardTile, Given
from tests.cases import matrix
from tests.kernels import conftest
from tests.kernels.conftest import (
    INTERPRETER_IS_NEWER,
    differentiated,
    lower_for_an_h200,
    normal,
    one_program,
    relative_error,
)

# Rounding P, dS and the results to bfloat16 gives 1.7e-3 each; a wrong mask gives 0.1 and more.
LIMIT = 5e-3

IMPLEMENTATIONS = [*conftest.IMPLEMENTATIONS, "pallas_tpu"]


def exact(q, k, v, scale, offset, segments, dout, dlse):
    """Output, log-sum-exp and gradients of q, k and v in float64."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    rows, keys = np.arange(q.shape[1])[:, None] + offset, np.arange(k.shape[1])
    mask = np.broadcast_to(rows >= keys, (len(q), *np.broadcast_shapes(rows.shape, keys.shape)))
    if segments is not None:
        mask = mask & (segments[:, rows[:, 0], None] == segments[:, None, :])
    s = np.where(mask[:, None], scale * np.einsum("btnp,bsnp->bnts", q, k), -np.inf)
    largest = s.max(-1, keepdims=True)
    total = np.exp(s - largest).sum(-1, keepdims=True)
    p = np.exp(s - largest) / total
    out = np.einsum("bnts,bsnu->btnu", p, v)
    dp = np.einsum("btnu,bsnu->bnts", dout, v)
    ds = p * (dp - np.einsum("btnu,btnu->bnt", dout, out)[..., None] + dlse[..., None])
    gradients = (
        scale * np.einsum("bnts,bsnp->btnp", ds, k),
        scale * np.einsum("bnts,btnp->bsnp", ds, q),
        np.einsum("bnts,btnu->bsnu", p, dout),
    )
    return out, (largest + np.log(total))[..., 0], gradients


def bf16(rng, *shape):
    return normal(rng, *shape).astype(jnp.bfloat16)


def in_mla_form(q, kv, shared, value_dim):
    """The keys and values that `mla_attention` reads, written out."""
    own = kv[..., : kv.shape[-1] - value_dim]
    spread = jnp.broadcast_to(shared[:, :, None], (*own.shape[:3], shared.shape[-1]))
    return jnp.concatenate([own, spread], axis=-1), kv[..., kv.shape[-1] - value_dim :]


@pytest.mark.parametrize(
    "implementation, kept_heads, offset_type",
    matrix(
        [
            *((implementation, None) for implementation in ("reference", "pallas_tpu")),
            # All three at once, two and then one, none: dQ's kernel forms the logits again.
            *(pytest.param("pallas_gpu", n, marks=INTERPRETER_IS_NEWER) for n in (None, 0)),
            pytest.param("pallas_gpu", 2, marks=(INTERPRETER_IS_NEWER, pytest.mark.slow)),
        ],
        [int, jnp.int32],
    ),
)
def test_mla_attention_of_a_chunk_of_packed_documents(
    implementation, kept_heads, offset_type, rng, running
):
    batch, queries, keys, heads, own, shared, value = 1, 136, 203, 3, 32, 16, 32
    offset = keys - queries
    q, kv, k_shared, dout = (
        bf16(rng, *shape)
        for shape in (
            (batch, queries, heads, own + shared),
            (batch, keys, heads, own + value),
            (batch, keys, shared),
            (batch, queries, heads, value),
        )
    )
    dlse = normal(rng, batch, heads, queries)
    segments = np.repeat([3, 1, 4], [90, 30, 83])[None]  # 1 ends inside a tile of both kernels

    def attend(q, kv, k_shared):
        place = dict(scale=0.2, offset=offset_type(offset))
        numbers = jnp.asarray(segments)
        if kept_heads is None:
            return api.mla_attention(
                *(q, kv, k_shared), **place, segments=numbers, implementation=implementation
            )
        tiles = pallas_gpu.tiles_for(own + shared, value)
        kept_bytes = kept_heads * 4 * 2 * 128**2  # the dS of a head is four tiles
        keys = BackwardTile(step=32, stages=2)
        tiles = tiles._replace(backward=tiles.backward._replace(kept_bytes=kept_bytes, keys=keys))
        return pallas_gpu.attention(
            *(q, (kv,), k_shared),
            value_dim=value,
            **place,
            documents=api.documents_of(numbers, queries, place["offset"]),
            tiles=tiles,
        )

    with running(implementation):
        (out, lse), (dq, dkv, dshared) = one_program(differentiated, implementation)(
            attend, (q, kv, k_shared), (dout, dlse)
        )
    k, v = in_mla_form(q, kv, k_shared, value)
    want, want_lse, (want_q, want_k, want_v) = exact(q, k, v, 0.2, offset, segments, dout, dlse)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert relative_error(out, want) < LIMIT
    assert np.abs(lse - want_lse).max() < 1e-5
    assert relative_error(dq, want_q) < LIMIT
    assert relative_error(dkv[..., :own], want_k[..., :own]) < LIMIT
    assert relative_error(dkv[..., own:], want_v) < LIMIT
    assert relative_error(dshared, want_k[..., own:].sum(2)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_attention_errs_at_most_twice_as_much_as_bf16_products(implementation, rng, running):
    shape = (2, 256, 1, 64)
    q, k, v, dout = (bf16(rng, *shape) for _ in range(4))
    dlse = jnp.zeros((2, 1, 256))

    def run(implementation):
        attend = functools.partial(api.attention, scale=0.125, implementation=implementation)
        with running(implementation):
            (out, _), gradients = one_program(differentiated, implementation)(
                attend, (q, k, v), (dout, dlse)
            )
        return out, *gradients

    out, _, gradients = exact(q, k, v, 0.125, 0, None, dout, dlse)
    for got, plain, want in zip(run(implementation), run("reference"), (out, *gradients)):
        assert relative_error(got, want) < 2 * relative_error(plain, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_from_an_offset_of_all_keys_on_every_key_is_seen(implementation, rng, running):
    q, k, v = bf16(rng, 1, 192, 1, 32), bf16(rng, 1, 128, 1, 32), bf16(rng, 1, 128, 1, 16)
    with running(implementation):
        out, lse = api.attention(q, k, v, scale=0.2, offset=128, implementation=implementation)
    zeros = np.zeros((1, 1, 192))
    want, want_lse, _ = exact(q, k, v, 0.2, 128, None, np.zeros(out.shape), zeros)
    assert relative_error(out, want) < LIMIT
    assert np.abs(lse - want_lse).max() < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_before_all_queries_are_seen_from_their_document_only(implementation, rng, running):
    """Of 256 queries after 128 keys, 150 are of the last document of the keys."""
    q, dout = bf16(rng, 1, 256, 1, 32), bf16(rng, 1, 256, 1, 16)
    k, v = bf16(rng, 1, 128, 1, 32), bf16(rng, 1, 128, 1, 16)
    dout, dlse = dout.at[:, 150:].set(0), normal(rng, 1, 1, 256).at[..., 150:].set(0)
    numbers = api.ascending(jnp.asarray(np.repeat([3, 1, 4, 1], [40, 238, 60, 46])[None]))
    assert np.asarray(numbers[0, [0, 40, 278, 338]]).tolist() == [0, 1, 2, 3]
    documents = api.documents_between(numbers[:, 128:], numbers[:, :128])
    attend = functools.partial(
        api.attention, scale=0.2, offset=128, segments=documents, implementation=implementation
    )
    with running(implementation):
        (out, lse), (dq, dk, dv) = one_program(differentiated, implementation)(
            attend, (q, k, v), (dout, dlse)
        )
    seeing, seen = slice(150), slice(40, None)
    want, want_lse, gradients = exact(
        *(q[:, seeing], k[:, seen], v[:, seen], 0.2, 128, None),
        *(dout[:, seeing], dlse[..., seeing]),
    )
    assert relative_error(out[:, seeing], want) < LIMIT
    assert np.abs(lse[..., seeing] - want_lse).max() < 1e-5
    assert np.asarray(lse[..., 150:]).max() < -1e29 and np.isfinite(out.astype(jnp.float32)).all()
    got = (dq[:, seeing], dk[:, seen], dv[:, seen])
    assert all(relative_error(one, right) < LIMIT for one, right in zip(got, gradients))
    assert not np.asarray(dq, np.float32)[:, 150:].any()
    assert not np.asarray(dk, np.float32)[:, :40].any()
    assert not np.asarray(dv, np.float32)[:, :40].any()


@pytest.mark.slow
def test_tpu_kernels_add_up_over_blocks(rng):
    q, k, v, dout = (bf16(rng, 1, 300, 1, 32) for _ in range(4))
    first = jnp.asarray(np.repeat([0, 140], [140, 160])[None], jnp.int32)
    documents = api.Documents(first, first)  # the kernels read the first only

    def attend(*qkv):
        return pallas_tpu.attention(
            qkv[0],
            qkv[1:],
            None,
            value_dim=32,
            scale=0.2,
            offset=0,
            documents=documents,
            block=128,
        )[0]

    with tpu.interpreting():
        out, vjp = jax.vjp(attend, q, k, v)
        gradients = vjp(dout)
    segments = np.asarray(first) // 140
    want, _, wanted = exact(q, k, v, 0.2, 0, segments, dout, np.zeros((1, 1, 300)))
    assert relative_error(out, want) < LIMIT
    for got, one in zip(gradients, wanted):
        assert relative_error(got, one) < LIMIT


@pytest.mark.parametrize(
    "platform, kind, lowering",
    [
        ("tpu", "TPU v5p", "tpu"),
        pytest.param("gpu", "NVIDIA H200", "cuda", marks=INTERPRETER_IS_NEWER),
    ],
)
def test_kernels_lower_inside_shard_map_with_heads_and_tokens_cut(platform, kind, lowering):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    names = ("context", "tensor")
    mesh = AbstractMesh((2, 2), names, (AxisType.Auto,) * 2, abstract_device=device)
    heads, shared = P(None, *names), P(None, "context")

    def local(q, kv, k_shared):
        gather = functools.partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
        return api.mla_attention(
            q,
            gather(kv),
            gather(k_shared),
            scale=0.1,
            offset=lax.axis_index("context") * q.shape[1],
            implementation=f"pallas_{platform}",
        )

    def loss(*operands):
        specs = dict(
            in_specs=(heads, heads, shared), out_specs=(heads, P(None, "tensor", "context"))
        )
        out, lse = jax.shard_map(local, **specs)(*operands)
        return out.astype(jnp.float32).sum() + lse.sum()

    shapes = ((2, 512, 4, 192), (2, 512, 4, 256), (2, 512, 64))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*operands)
        text = traced.lower(lowering_platforms=(lowering,)).as_text()
    assert "attention_key_gradients" in text


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize(
    "own, shared, value, kept_bytes", matrix([(32, 16, 32), (192, 64, 256)], [0, 1 << 20])
)
def test_all_kernels_lower_for_other_widths(own, shared, value, kept_bytes):
    tiles = pallas_gpu.tiles_for(own + shared, value)
    tiles = tiles._replace(backward=tiles.backward._replace(kept_bytes=kept_bytes))

    def gradients(q, kv, k_shared, dout):
        def attend(q, kv, k_shared):
            place = dict(value_dim=value, scale=1.0, offset=0, documents=None)
            return pallas_gpu.attention(q, (kv,), k_shared, **place, tiles=tiles)[0]

        return jax.vjp(attend, q, kv, k_shared)[1](dout)

    rows = (1, 40)
    lower_for_an_h200(
        gradients,
        jax.ShapeDtypeStruct((*rows, 2, own + shared), jnp.bfloat16),
        jax.ShapeDtypeStruct((*rows, 2, own + value), jnp.bfloat16),
        jax.ShapeDtypeStruct((*rows, shared), jnp.bfloat16),
        jax.ShapeDtypeStruct((*rows, 2, value), jnp.bfloat16),
    )


@INTERPRETER_IS_NEWER
def test_layers_share_the_kernels_of_their_backward_pass():
    def loss(q, kv):
        for _ in range(2):
            place = dict(value_dim=32, scale=1.0, offset=0, documents=None)
            q = pallas_gpu.attention(2 * q, (2 * kv,), None, **place)[0]
        return (q * q).sum()

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        shapes = [jax.ShapeDtypeStruct((1, 40, 2, width), jnp.bfloat16) for width in (32, 64)]
        steps = jax.make_jaxpr(jax.grad(loss))(*shapes).eqns
    first, second = (eqn.params["jaxpr"] for eqn in steps if eqn.params.get("name") == "_gradients")
    assert first is second, "equal kernels would be lowered and compiled once for each layer"


def test_documents_are_runs_of_equal_numbers():
    documents = api.documents_of(jnp.array([[7, 7, 2, 2, 2, 7]]), 4, 2)
    np.testing.assert_array_equal(documents.first_key, [[2, 2, 2, 5]])
    np.testing.assert_array_equal(documents.end_query, [[0, 0, 3, 3, 3, 4]])


@pytest.mark.parametrize("offset", [0, 100, 128, 700, None])
def test_every_tile_of_ds_that_may_be_seen_has_a_place_of_its_own(offset):
    queries, keys, heads = 500, 700, 3
    q = jax.ShapeDtypeStruct((1, queries, heads, 32), jnp.bfloat16)
    values = Columns(jax.ShapeDtypeStruct((1, keys, heads, 32), jnp.bfloat16), 0, 32)
    given = Given(q, (values,), values, *(None,) * 3, Offset(offset, []), None, None, 1.0)
    kept = Kept.within(1 << 30, given)
    places = [
        int(kept.tile(head, jnp.int32(key), query))
        for head in range(heads)
        for key in range(6)
        for query in range(4)
        if offset is None or key * 128 <= offset + query * 128 + 127
    ]
    assert kept.heads == heads and sorted(places) == list(range(kept.shape[0]))


def test_every_tile_is_worked_on_once_and_blocks_end_together():
    steps = tuple(range(1, 33))
    table = tile_order.longest_first(steps, heads=128, section=9, blocks=132)
    tiles = table[table >= 0]
    np.testing.assert_array_equal(np.sort(tiles), np.arange(128 * 32))
    work = np.where(table >= 0, np.array(steps)[table % 32] + tile_order.OVERHEAD, 0).sum(1)
    assert work.max() < 1.01 * work.mean()
    assert (table[:, -1] == -1).all()


@pytest.mark.misuse
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(v=(1, 9, 2, 16)), r"\(1, 9, 2, 16\) must be \[B, S, N, 16\]"),
        (dict(segments=(1, 7)), r"segments \(1, 7\) must be \[B, S\], that is \(1, 8\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(change, message):
    shapes = dict(q=(1, 8, 2, 32), k=(1, 8, 2, 32), v=(1, 8, 2, 16), segments=(1, 8)) | change
    q, k, v = (jnp.zeros(shapes[name], jnp.bfloat16) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        api.attention(q, k, v, scale=1.0, segments=jnp.zeros(shapes["segments"], jnp.int32))


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize(
    "width, dtype, message",
    [(24, "bfloat16", "multiples of 16 up to 256, and one is 24"), (32, "float32", "is float32")],
)
def test_gpu_kernel_says_what_it_cannot_do(width, dtype, message, running):
    q = jnp.zeros((1, 8, 1, width), dtype)
    with running("pallas_gpu"), pytest.raises(NotImplementedError, match=message):
        api.attention(q, q, q, scale=1.0, implementation="pallas_gpu")
