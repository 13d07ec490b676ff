"""A backward pass in two parts gives the gradients of one, and computes nothing twice."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.split_backward import made_of_first, split_backward


def layer(params, x):
    hidden = jnp.tanh(x @ params["up"])
    return x + hidden @ params["down"] * params["scale"]


def two_layers(params, x):
    return layer(params["second"], layer(params["first"], x))


def products(function, *inputs) -> int:
    """Matrix products of a program, also inside of calls."""

    def count(jaxpr) -> Counter:
        total: Counter = Counter()
        for eqn in jaxpr.eqns:
            total[eqn.primitive.name] += 1
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    total += count(getattr(value, "jaxpr", value))
        return total

    return count(jax.make_jaxpr(function)(*inputs).jaxpr)["dot_general"]


@pytest.mark.parametrize("remat", [False, True])
def test_both_parts_together_are_the_whole(remat):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"up": (6, 10), "down": (10, 6), "scale": (6,)}
    params = {
        name: {k: jax.random.normal(next(keys), s) for k, s in shapes.items()}
        for name in ("first", "second")
    }
    x, dy = jax.random.normal(next(keys), (4, 6)), jax.random.normal(next(keys), (4, 6))
    stage = jax.checkpoint(two_layers) if remat else two_layers
    counts, _, got, want = parts_and_whole(stage, params, x, dy)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    # One product for each of the four weights in both parts. Under remat the forward's four are
    # computed again, three of them where the input's gradient needs them.
    assert counts == ((7, 5, 12) if remat else (4, 4, 8))


def parts_and_whole(function, params, x, dy, **how):
    """(products of the parts and of the whole, frontier, gradients in parts, in one)."""
    _, pull = jax.vjp(function, params, x)
    saved, structure = jax.tree.flatten(pull)

    def pullback(saved, dy):
        d_params, dx = jax.tree.unflatten(structure, saved)(dy)
        return [dx], jax.tree.leaves(d_params)

    parts = split_backward(pullback, saved, dy, **how)
    of_input, early, frontier = jax.jit(parts.first)(saved, dy)
    late = jax.jit(parts.second)(frontier, saved, dy)
    got = [early[i] if value is None else value for i, value in enumerate(late)]
    d_params, dx = jax.jit(lambda *inputs: jax.vjp(function, *inputs[:2])[1](inputs[2]))(
        params, x, dy
    )
    first, second = products(parts.first, saved, dy), products(parts.second, frontier, saved, dy)
    counts = first, second, products(pullback, saved, dy)
    return counts, frontier, [*of_input, *got], [dx, *jax.tree.leaves(d_params)]


def mesh_of_four():
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("node", "local"), axis_types=auto, devices=jax.devices()[:4])


@pytest.mark.parametrize("checked", [True, False])
def test_a_shard_map_becomes_two(checked):
    """One weight lies whole on all devices, one in slices; what is handed on stays where it is."""
    mesh, keys = mesh_of_four(), jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (6, 10)),
        "down": jax.random.normal(keys[1], (2, 10, 6)),
    }
    x, dy = (jax.random.normal(key, (8, 6)) for key in keys[2:])
    rows = PartitionSpec(("node", "local"))

    @jax.jit  # a call, which is gone into
    def on_device(params, x):
        assert x.shape == (2, 6)
        return jnp.tanh(x @ params["up"]) @ params["down"][0]

    function = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=({"up": PartitionSpec(), "down": PartitionSpec("local")}, rows),
        out_specs=rows,
        check_vma=checked,
    )
    counts, frontier, got, want = parts_and_whole(function, params, x, dy)
    assert counts == (2, 2, 4)
    assert [leaf.shape for leaf in frontier] == [(4, 2, 10)]  # the cotangent of tanh's input
    assert {shard.data.shape for shard in frontier[0].addressable_shards} == {(1, 2, 10)}
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert parts_and_whole(function, params, x, dy, within=False)[0] == (4, 0, 4)


def test_what_a_kernel_calls_alike_on_all_devices_is_each_devices_own():
    """As GPU kernels' results are typed until they are marked (`kernels.manual.result`)."""
    mesh, rows = mesh_of_four(), PartitionSpec(("node", "local"))

    def on_device(w, x, dy):
        result = jax.new_ref(jnp.zeros(dy.shape))
        result[...] = dy * 2
        d = vary(jax.freeze(result), ("node", "local"))
        w = vary(w, ("node", "local"))
        return d @ w.T, jax.lax.psum(x.T @ d, ("node", "local"))

    def pullback(w, x, dy):
        specs = (PartitionSpec(), rows, rows)
        function = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=(rows, PartitionSpec())
        )
        dx, d_w = function(w, x, dy)
        return [dx], [d_w]

    w, x, dy = jnp.ones((5, 6)), jnp.ones((8, 5)), jnp.ones((8, 6))
    parts = split_backward(pullback, w, x, dy)
    _, early, frontier = jax.eval_shape(parts.first, w, x, dy)
    assert not early and [leaf.shape for leaf in frontier] == [(4, 2, 6)]
    (late,) = jax.eval_shape(parts.second, frontier, w, x, dy)
    assert late.shape == jax.eval_shape(pullback, w, x, dy)[1][0].shape


@pytest.mark.parametrize("start, later", [("made", 3), ("zeros", 0)])
def test_a_loop_becomes_two_where_it_goes_on_from_what_was_made(start, later):
    """As that of further rounds, which mostly makes no turn; others would multiply twice."""
    w, x, dy = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(3))

    def pullback(w, x, dy):
        first = dy @ w, (x.T @ dy if start == "made" else jnp.zeros((3, 3)))

        def turn(carry):
            number, dx, d_w = carry
            more = jnp.tanh(dx) @ w
            return number - 1, dx + more, d_w + x.T @ more

        _, dx, d_w = jax.lax.while_loop(lambda carry: carry[0] > 0, turn, (2, *first))
        return [dx], [d_w]

    parts = split_backward(pullback, w, x, dy)
    (dx,), early, frontier = jax.jit(parts.first)(w, x, dy)
    (late,) = jax.jit(parts.second)(frontier, w, x, dy)
    (want_dx,), (want,) = jax.jit(pullback)(w, x, dy)
    np.testing.assert_array_equal(dx, want_dx)
    np.testing.assert_array_equal(early.get(0, late), want)
    assert products(parts.second, frontier, w, x, dy) == later


def test_what_is_widened_is_handed_on_as_it_was():
    w, x, dy = (jnp.ones((3, 3), jnp.bfloat16) for _ in range(3))

    def pullback(w, x, dy):
        wide = (dy * dy).astype(jnp.float32)
        return [wide @ w.astype(jnp.float32)], [x.T.astype(jnp.float32) @ wide]

    parts = split_backward(pullback, w, x, dy)
    assert [leaf.dtype for leaf in parts.first(w, x, dy)[2]] == ["bfloat16"]


def test_what_is_written_through_references_is_in_the_part_that_reads_it():
    """As kernels do that have no other result: dx and one weight's gradient by the same call."""
    x, w, dy = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(3))

    def kernel(dx_ref, d_scale_ref, w, dy):
        dx_ref[...] = dy @ w.T
        d_scale_ref[...] = dy * 2

    def pullback(x, w, dy):
        refs = [jax.new_ref(jnp.zeros_like(dy)) for _ in range(3)]
        jax.jit(kernel)(refs[0], refs[1], w, dy)
        refs[2][...] = x.T @ dy
        dx, d_scale, d_w = map(jax.freeze, refs)
        return [dx], [d_w, d_scale @ w]

    parts = split_backward(pullback, x, w, dy)
    (dx,), early, frontier = jax.jit(parts.first)(x, w, dy)
    d_w, d_scale = jax.jit(parts.second)(frontier, x, w, dy)
    assert not early
    for got, want in ((dx, dy @ w.T), (d_w, x.T @ dy), (d_scale, dy * 2 @ w)):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_weights_alone_make_is_made_in_both_parts():
    """A weight as the products want it is not handed from one part to the other."""
    w, x, dy = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(3))

    def pullback(w, x, dy):
        wide = jnp.tanh(w)
        return [dy @ wide], [(x.T @ dy) * wide]

    kept, plain = (
        split_backward(pullback, w, x, dy),
        split_backward(pullback, w, x, dy, num_weights=1),
    )
    for parts, handed in ((kept, 1), (plain, 0)):
        (dx,), early, frontier = parts.first(w, x, dy)
        assert len(frontier) == handed and not early
        (d_w,) = parts.second(frontier, w, x, dy)
        for got, want in zip((dx, d_w), (dy @ jnp.tanh(w), (x.T @ dy) * jnp.tanh(w))):
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_outputs_that_the_first_inputs_make_are_found_inside_of_calls():
    """A call that also reads x makes one of its results of weights alone."""

    @jax.jit
    def call(w, x):
        return jnp.tanh(w), x @ w

    def forward(w, x):
        wide, y = call(w, x)
        return y, wide.T, x + 1, w, jnp.ones(2)

    w, x = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(2))
    places, make = made_of_first(jax.make_jaxpr(forward)(w, x), 1, range(5))
    assert places == [1, 3, 4]
    for got, want in zip(make(w), (jnp.tanh(w).T, w, jnp.ones(2)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
