"""Bytes between devices, counted in lowered programs, and programs lowered for other platforms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.parallel.audit import collectives_of, sent_by_axes
from dsv3_jax.quantization.recipe import RECIPES
from tests.parallel.exchanges import AXES, EXPERTS, WIDTH, mesh_of, over, spread_over

SHAPE = {"node": 2, "local": 4}


def test_collectives_are_found_with_their_axes_and_bytes():
    def per_device(x):
        y = jax.lax.all_to_all(x.reshape(4, 1, 6), "local", 0, 0)
        z = jax.lax.all_gather(x, "node", tiled=True)
        return y.reshape(4, 6) + z[:4] + jax.lax.psum(x, AXES)

    split = PartitionSpec(AXES)
    spread = jax.shard_map(per_device, mesh=mesh_of(2, 4), in_specs=split, out_specs=split)
    lowered = jax.jit(spread).lower(jnp.ones((32, 6))).as_text()
    found = collectives_of(lowered, SHAPE)
    assert [(c.op, c.axes, c.group, c.payload) for c in found] == [
        ("all_to_all", ("local",), 4, 96),
        ("all_gather", ("node",), 2, 96),
        ("all_reduce", ("node", "local"), 8, 96),
    ]
    assert sent_by_axes(found) == {("local",): 72, ("node",): 96, AXES: 168}


def v3_shapes(tokens, per_token=8):
    """Tokens of 7168 channels in BF16; the experts are narrow, as only tokens travel."""
    shapes = [
        ((8 * tokens, 7168), jnp.bfloat16),
        ((8 * tokens, per_token), jnp.float32),
        ((EXPERTS, 2, WIDTH, 7168), jnp.bfloat16),
        ((EXPERTS, 7168, WIDTH), jnp.bfloat16),
        ((8 * tokens, 7168), jnp.bfloat16),
        ((8 * tokens, per_token), jnp.int32),
    ]
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


FORMATS = {"dispatch_format": "fp8", "combine_format": "bf16"}


@pytest.mark.parametrize("hierarchical", [True, False])
def test_fp8_dispatch_moves_at_most_7408_bytes_a_token_and_hop(hierarchical):
    """Values, scales, choices and weights: one collective a hop, in both passes."""
    config = {"transport": "padded", "hierarchical": hierarchical, "capacity_factor": 100.0}
    run = over(mesh_of(2, 4), config | FORMATS, 8, tokens=3)
    found = collectives_of(run.lower(*v3_shapes(3)).as_text(), SHAPE)
    assert {c.op for c in found} == {"all_to_all"}
    widths = [c.payload // (c.shape[0] * c.shape[1]) for c in found]
    hops = 2 if hierarchical else 1
    # Tokens out, results back; the gradients of results out, and of tokens and weights back.
    assert widths == hops * [7272] + hops * [14336] + hops * [7224] + hops * [14336 + 8 * 4]
    assert max(widths[:hops] + widths[2 * hops : 3 * hops]) <= 7408
    axes = {c.axes for c in found}
    assert axes == ({("node",), ("local",)} if hierarchical else {AXES})


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_ragged_transport_lowers_for_accelerators(platform):
    """With the real collective, on bytes; the emulation is CPU's alone."""
    config = {"transport": "ragged", "capacity_factor": 1.5}
    spread = spread_over(mesh_of(2, 4), config | FORMATS, 8, tokens=16)
    *shapes, _, experts = v3_shapes(16)
    traced = jax.jit(spread).trace(*shapes, experts)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    found = collectives_of(lowered, SHAPE)
    ragged = [c for c in found if c.op == "ragged_all_to_all"]
    # Two hops there and back, in the first round and in the loop of further ones.
    assert [c.axes for c in ragged] == 2 * [("node",), ("local",), ("local",), ("node",)]
    assert {c.dtype for c in ragged} == {"ui8", "bf16"}
    assert not [c for c in found if c.op == "all_gather"]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11 or newer")
def test_hopper_s_kernels_lower_inside_the_exchange():
    """FP8 rows from the wire into the grouped products, forward and backward, for GPUs.

    With replication checked, every kernel must say that its results differ between devices.
    """
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    config = {"transport": "padded", "capacity_factor": 100.0} | FORMATS
    options = {"recipe": RECIPES["fp8_paper"], "quantized_rows": True}
    run = over(mesh, config, 8, tokens=16, **options)
    dim, width = 256, 128
    shapes = [
        ((128, dim), jnp.bfloat16),
        ((128, 8), jnp.float32),
        ((EXPERTS, 2, width, dim), jnp.float32),
        ((EXPERTS, dim, width), jnp.float32),
        ((128, dim), jnp.bfloat16),
        ((128, 8), jnp.int32),
    ]
    traced = run.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered
    assert {c.op for c in collectives_of(lowered, SHAPE)} == {"all_to_all"}
