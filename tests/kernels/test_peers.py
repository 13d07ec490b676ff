"""Rows that devices read from each other: both implementations, and when a kernel may end."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.peers import api, pallas_gpu, reference
from tests.cases import matrix
from tests.kernels.conftest import IMPLEMENTATIONS, INTERPRETER_IS_NEWER

PEERS, ROWS, CHOICES, SLOTS, DIM = 2, 5, 3, 40, 512
AXES = ("node", "local")
FREE = ((32, 35), (35, 35), (38, 40))  # of three experts


@pytest.fixture
def places(rng):
    """The slots of every row on each device, some rows with none, and who needs what of whom."""
    slots = np.full((PEERS, PEERS * ROWS, CHOICES), SLOTS, np.int32)
    for of_device in slots:
        chosen = rng.random(of_device.shape) < 0.5
        chosen[[1, ROWS]] = False  # a row of each peer that nobody asks for
        of_device[chosen] = rng.permutation(32)[: chosen.sum()]
    asked = (slots < SLOTS).any(-1).reshape(PEERS, PEERS, ROWS)
    return slots, asked.transpose(1, 2, 0)  # [device, its row, peer]


def spread(function, *arrays):
    """The results of all devices, [N, ...], of a function on each one's arrays."""
    devices = np.array(jax.devices()[:PEERS]).reshape(1, PEERS)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)
    split = PartitionSpec(AXES)

    def of_device(*arrays):
        results = function(*(array[0] for array in arrays))
        return jax.tree.map(lambda result: result[None], results)

    spread = jax.shard_map(of_device, mesh=mesh, in_specs=(split,) * len(arrays), out_specs=split)
    return jax.jit(spread)(*arrays)


def gathered(implementation, x, slots):
    """`gather_rows` on every device; the interpreter has one device at a time."""
    free = np.broadcast_to(np.asarray(FREE, np.int32), (PEERS, 3, 2))
    if implementation == "reference":
        how = {"axes": AXES, "multiprocessors": 1, "implementation": implementation}
        return spread(partial(api.gather_rows, num_rows=SLOTS, **how), x, slots, free)
    where = [(pallas_gpu.Peers(PEERS, me=me), slots[me], free[me]) for me in range(PEERS)]
    return np.stack(
        [
            pallas_gpu.gather_from(peers, x, jnp.asarray(s), jnp.asarray(f), SLOTS, 1, 1)
            for peers, s, f in where
        ]
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_come_to_all_their_slots_and_free_rows_are_zeros(implementation, rng, running, places):
    x = jnp.asarray(rng.normal(size=(PEERS, ROWS, DIM)), jnp.bfloat16)
    slots, _ = places
    with running(implementation):
        out = np.asarray(gathered(implementation, x, slots))
    flat = np.asarray(x).reshape(PEERS * ROWS, -1)
    for me in range(PEERS):
        for row, choice in np.argwhere(slots[me] < SLOTS):
            np.testing.assert_array_equal(out[me, slots[me, row, choice]], flat[row])
        for first, end in FREE:
            assert not out[me, first:end].any()


@pytest.mark.parametrize("implementation, weighted", matrix(IMPLEMENTATIONS, [False, True]))
def test_results_come_back_summed(implementation, weighted, rng, running, places):
    slots, needed = places
    rows = jnp.asarray(rng.normal(size=(PEERS, SLOTS, DIM)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=slots.shape), jnp.float32) if weighted else None
    factor = np.ones(slots.shape) if weights is None else np.asarray(weights, np.float64)
    whole = np.pad(np.asarray(rows, np.float64), ((0, 0), (0, 1), (0, 0)))
    want = sum(
        (whole[p][slots[p]] * factor[p][..., None]).sum(1).reshape(PEERS, ROWS, DIM)
        for p in range(PEERS)
    )
    with running(implementation):
        if implementation == "reference":
            how = {"sent_as": jnp.bfloat16, "axes": AXES, "multiprocessors": 1}
            how["implementation"] = implementation
            given = [rows, slots, needed] + [weights] * weighted
            got = spread(
                lambda rows, slots, needed, weights=None: api.return_rows(
                    rows, weights, slots, needed, **how
                ),
                *given,
            )
        else:
            partial_sums = jnp.stack(
                [
                    pallas_gpu.sum_slots(
                        rows[p],
                        None if weights is None else weights[p],
                        jnp.asarray(slots[p]),
                        dtype=jnp.bfloat16,
                    )
                    for p in range(PEERS)
                ]
            )
            asked = needed.transpose(2, 0, 1).reshape(PEERS, -1)  # [peer, row of a device]
            # What is not needed is not read.
            partial_sums = jnp.where(asked[..., None], partial_sums, jnp.nan)
            got = np.stack(
                [
                    pallas_gpu.sum_from(
                        pallas_gpu.Peers(PEERS, me=me),
                        partial_sums,
                        jnp.asarray(needed[me]),
                        jnp.bfloat16,
                        1,
                    )
                    for me in range(PEERS)
                ]
            )
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < 4e-3  # rounded to BF16 on the way, and once more


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_sums_reach_rows_and_weights(implementation, rng, running, places):
    slots = places[0][0]
    rows = jnp.asarray(rng.normal(size=(SLOTS, DIM)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=slots.shape), jnp.float32)
    d_sums = jnp.asarray(rng.normal(size=(len(slots), DIM)), jnp.bfloat16)
    # What has no slot is not read.
    d_sums = jnp.where((slots < SLOTS).any(1, keepdims=True), d_sums, jnp.nan)
    with running(implementation):
        d_rows, d_weights = api.sum_slots_backward(
            rows, d_sums, weights, jnp.asarray(slots), jnp.asarray(FREE, jnp.int32)
        )
    there = slots < SLOTS
    token = np.nonzero(there)[0]
    taken = np.asarray(d_sums, np.float64)[token]
    want = np.asarray(taken * np.asarray(weights)[there][:, None], jnp.bfloat16)
    d_rows = np.asarray(d_rows)
    np.testing.assert_array_equal(d_rows[slots[there]], want)
    for first, end in FREE:
        assert not d_rows[first:end].any()
    products = (np.asarray(rows, np.float64)[slots[there]] * taken).sum(1)
    np.testing.assert_allclose(np.asarray(d_weights)[there], products, rtol=1e-4, atol=1e-4)
    assert not np.asarray(d_weights)[~there].any()


@INTERPRETER_IS_NEWER
def test_the_kernels_are_lowered_with_addresses_of_peers():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh(
        (2, 2), AXES, axis_types=(AxisType.Auto,) * 2, abstract_device=device
    )  # fmt: skip
    split, how = PartitionSpec(AXES), {"axes": ("local",), "multiprocessors": 20}

    def there_and_back(values, slots, free, needed, weights):
        rows = api.gather_rows(values, slots, free, 1024, **how).astype(jnp.bfloat16)
        return api.return_rows(rows, weights, slots, needed, sent_as=jnp.bfloat16, **how)

    shapes = [
        ((4 * 64, 7168), jnp.float8_e4m3fn), ((4 * 128, 8), jnp.int32), ((4 * 4, 2), jnp.int32),
        ((4 * 64, 2), jnp.bool_), ((4 * 128, 8), jnp.float32),
    ]  # fmt: skip
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    function = jax.shard_map(there_and_back, mesh=mesh, in_specs=(split,) * 5, out_specs=split)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("uses_xla_collective_metadata = true") == 2
    assert "all_gather" not in text and "all_to_all" not in text


@INTERPRETER_IS_NEWER
@pytest.mark.parametrize(
    "dim, dtype, said",
    [(7172, jnp.bfloat16, "no multiple of 16 bytes"), (2**16, jnp.float32, "do not fit")],
)
def test_what_cannot_be_copied_is_refused(dim, dtype, said, monkeypatch):
    monkeypatch.setattr(hopper, "require", lambda: None)
    slots, free = jnp.zeros((2, 1), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("local",))
    refused = jax.shard_map(
        lambda x: pallas_gpu.gather_rows(
            x, slots, free, num_rows=2, axes=("local",), multiprocessors=1
        ),
        mesh=mesh,
        in_specs=PartitionSpec("local"),
        out_specs=PartitionSpec("local"),
    )
    with pytest.raises(NotImplementedError, match=said):
        jax.eval_shape(refused, jax.ShapeDtypeStruct((2, dim), dtype))


class Semaphores:
    """A device's semaphores, one a block, as a kernel finds them: zeros."""

    def __init__(self):
        self.count, self.changed = {}, threading.Condition()

    def signal(self, block):
        with self.changed:
            self.count[block] = self.count.get(block, 0) + 1
            self.changed.notify_all()

    def wait(self, block, value):
        with self.changed:
            return self.changed.wait_for(lambda: self.count.get(block, 0) >= value, timeout=10)


@pytest.mark.parametrize("blocks, warpgroups", [(1, 1), (3, 4)])
def test_no_kernel_ends_before_its_peers_have_read(blocks, warpgroups, monkeypatch):
    """The kernel's own code between threads in place of warpgroups, several layers in a row.

    Pallas's interpreter has no semaphores. Every layer's rows lie in the same memory.
    """
    peers, layers = 3, 4
    here = threading.local()
    start = threading.Barrier(peers * blocks * warpgroups)  # XLA's, before such a kernel
    ended = [threading.Barrier(blocks * warpgroups) for _ in range(peers)]  # a kernel's end
    memory, seen, hung = [-1] * peers, [], []
    semaphores = [[Semaphores() for _ in range(peers)] for _ in range(layers)]

    def signal(_, device_id):
        semaphores[here.layer][int(device_id["local"])].signal(here.block)

    def wait(_, value, decrement):
        assert not decrement
        if not semaphores[here.layer][here.device].wait(here.block, value):
            hung.append((here.device, here.block))

    monkeypatch.setattr(pallas_gpu.pl, "semaphore_signal", signal)
    monkeypatch.setattr(pallas_gpu.pl, "semaphore_wait", wait)
    monkeypatch.setattr(pallas_gpu.pl, "when", lambda yes: lambda f: f() if yes else None)
    monkeypatch.setattr(pallas_gpu.lax, "axis_index", lambda name: here.warpgroup)
    monkeypatch.setattr(pallas_gpu.lax, "axis_size", lambda name: peers)
    kernel = pallas_gpu.Peers(peers, ("local",))

    def warpgroup(device, block, number):
        here.device, here.block, here.warpgroup = device, block, number
        for layer in range(layers):
            here.layer = layer
            if ended[device].wait() == 0:
                memory[device] = layer  # what ran before the kernel writes its input
            start.wait()
            for peer in range(peers):
                seen.append(memory[peer] == layer)
            kernel.leave_together([None], warpgroups)

    everyone = [
        threading.Thread(target=partial(warpgroup, d, b, w), daemon=True)
        for d in range(peers)
        for b in range(blocks)
        for w in range(warpgroups)
    ]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join(60)
    assert not hung and not any(thread.is_alive() for thread in everyone)
    assert len(seen) == layers * peers * len(everyone) and all(seen)


def test_a_sum_of_no_slots_is_zero():
    out = reference.sum_slots(
        jnp.ones((2, 4)), None, jnp.asarray([[2, 2], [0, 1]]), dtype=jnp.float32
    )
    np.testing.assert_array_equal(out, [[0] * 4, [2] * 4])
