"""The order of a sequence over devices, and attention around a ring of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ParallelConfig
from dsv3_jax.parallel.context import LOWEST, Partial, ring_attention
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout, zigzag
from tests.helpers import TOLERANCE, relative_error

T, DEVICES = 32, 4


def test_zigzag_gives_every_device_equal_work():
    order = zigzag(T, DEVICES)
    assert sorted(order) == list(range(T))
    work = (order.reshape(DEVICES, -1) + 1).sum(axis=1)  # a query at p attends to p + 1 keys
    assert set(work) == {T * (T + 1) // 2 // DEVICES}
    with pytest.raises(ValueError, match=r"length=30 must be a multiple of 2 x devices=4"):
        zigzag(30, 4)


def attention(queries, keys):
    """One head's share, by positions and documents, in NumPy's plainest way."""
    q, q_position, q_document = queries
    k, k_position, k_document = keys
    logits = jnp.einsum("BTD,BSD->BTS", q, k)[:, None]
    seen = q_position[:, :, None] >= k_position[:, None, :]
    seen = seen & (q_document[:, :, None] == k_document[:, None, :])
    logits = jnp.where(seen[:, None], logits, LOWEST)
    largest = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.exp(logits - largest[..., None])
    return Partial(largest, weights.sum(-1), jnp.einsum("BNTS,BSD->BNTD", weights, k))


def test_the_ring_equals_the_whole_and_does_half_the_work():
    layout = Layout(make_mesh(ParallelConfig(context=DEVICES)))
    rng, order = np.random.default_rng(0), zigzag(T, DEVICES)
    q, k, out_weights = (rng.normal(size=(2, T, 6)).astype(np.float32) for _ in range(3))
    places = np.arange(T)[None], np.cumsum(rng.random((2, T)) < 0.1, axis=1)
    shapes = []

    def counted(queries, keys, causal):
        shapes.append((queries[0].shape[1], keys[0].shape[1], causal))
        return attention(queries, keys)

    def of_device(q, k, *places):
        return ring_attention(counted, (q, *places), (k, *places), "context")

    tokens = layout.spec("batch", "seq")
    on_ring = layout.shard_map(
        of_device,
        (tokens, tokens, layout.spec(None, "seq"), tokens),
        layout.spec("batch", None, "seq"),
    )

    def ring(q, k):
        out = on_ring(q[:, order], k[:, order], places[0][:, order], places[1][:, order])
        return (out[:, 0] * out_weights[:, order]).sum(), out[:, 0, np.argsort(order)]

    def whole(q, k):
        part = attention((q, *places), (k, *places))
        out = (part.values / part.total[..., None])[:, 0]
        return (out * out_weights).sum(), out

    # With a device's own keys, and twice in a step.
    calls = re.findall(r"\b(?:remat2|checkpoint)\[", str(jax.make_jaxpr(ring)(q, k)))
    assert len(calls) == 3
    ring, whole = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
        for function in (ring, whole)
    )
    assert relative_error(ring(q, k), whole(q, k)) < TOLERANCE["f32_gradient"]
    own = T // DEVICES
    assert set(shapes) == {(own, own, True), (own // 2, own // 2, False)}
    # GPUs that take different branches beside a collective hang.
    program = ring.lower(q, k).as_text()
    assert "collective_permute" in program
    assert not any(branch in program for branch in ("stablehlo.case", "stablehlo.if"))
