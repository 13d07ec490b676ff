"""The hop between devices that read each other's memory: no buffers, no packing, no second copy.

Each device learns the choices of all peers' rows (a few bytes each), knows from them where every
row lies among its experts' groups, and takes each row that it needs straight from the peer's memory
into all of its places. Results are summed where they were made and then taken by the device they
belong to. `read` and `return_sums` are each other's adjoint but for the gate weights, and like all
hops they add up in a fixed order.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.kernels.fused.api import quantize_rows
from dsv3_jax.kernels.peers.api import gather_rows, return_rows, sum_slots_backward
from dsv3_jax.parallel.collectives import no_gradients
from dsv3_jax.parallel.grouping import Groups
from dsv3_jax.parallel.hops import Hop, needs
from dsv3_jax.quantization.block_scaled import BlockScaled, StraightThrough, dequantize


@dataclass(frozen=True)
class Reading:
    """Such a hop; static.

    Fields:
        hop: the devices along it.
        quantize: whether rows on their way to experts, and gradients on theirs, are FP8.
        keep_quantized: whether the experts are given the FP8 numbers.
        returned: the dtype of sums on their way back; None: that of the rows.
        multiprocessors: that may be busy with it.
    """

    hop: Hop
    quantize: bool
    keep_quantized: bool
    returned: Any
    multiprocessors: int

    @property
    def _options(self) -> dict[str, Any]:
        return {"axes": self.hop.axes, "multiprocessors": self.multiprocessors}

    def of_all(self, x: Array, *, known_alike: bool = False) -> Array:
        """x of all peers, one after the other; known_alike: typed as the same on all of them."""
        to: Any = "invarying" if known_alike else "varying"
        return lax.all_gather(x, self.hop.axes, tiled=True, to=to)

    def gather(self, x: Array, places: "Places") -> Array:
        """`kernels.peers.gather_rows` along this hop."""
        num_rows = places.source.shape[0]
        return gather_rows(x, places.slots, places.free, num_rows, **self._options)

    def gather_numbers(self, x: BlockScaled, places: "Places") -> BlockScaled:
        """The same for numbers with scales. These are few: a collective and XLA move them."""
        scales = jnp.take(self.of_all(x.scales), places.source, axis=0, mode="fill", fill_value=0)
        return BlockScaled(self.gather(x.values, places), scales, x.tile)

    def of_each(self, x: Float[Array, "R D"], places: "Places") -> Float[Array, "NR D"]:
        """The rows of all peers that have slots here, once each, and unspecified rows between.

        By way of FP8, if that is the hop's format.
        """
        everyone = places.slots.shape[0]
        asked = (places.slots < places.source.shape[0]).any(axis=1, keepdims=True)
        once = jnp.where(asked, jnp.arange(everyone, dtype=jnp.int32)[:, None], everyone)
        none = jnp.zeros((1, 2), jnp.int32)
        take = functools.partial(
            gather_rows, slots=once, free=none, num_rows=everyone, **self._options
        )
        if not self.quantize:
            return take(x)
        numbers = quantize_rows(x, "ue8m0")
        values, scales = take(numbers.values), self.of_all(numbers.scales)
        return dequantize(BlockScaled(values, scales, numbers.tile), x.dtype)

    def sum_back(self, rows, weights, places: "Places"):
        """`kernels.peers.return_rows` along this hop."""
        back = (rows, weights, places.slots, places.needed)
        return return_rows(*back, sent_as=self.returned or rows.dtype, **self._options)


class Places(NamedTuple):
    """Where rows of all peers lie on this device, and which peers need this device's."""

    slots: Int[Array, "NR K"]
    source: Int[Array, " M"]  # the row of all that lies there; N*R for none
    free: Int[Array, "E 2"]
    needed: Bool[Array, "R N"]


def places_of(
    groups: Groups,
    sizes: Int[Array, " E"],
    load: Int[Array, " E"],
    experts: Int[Array, "R K"],
    reading: Reading,
) -> Places:
    """The places by the plan of all peers' rows and the choices of this device's."""
    start = jnp.cumsum(sizes) - sizes
    free = jnp.stack([start + load, start + sizes], axis=1)
    needed = needs(experts, reading.hop)
    return Places(groups.slot_TK.astype(jnp.int32), groups.token_M, free, needed)


def read(
    x: Float[Array, "R D"] | StraightThrough, places: Places, reading: Reading
) -> Float[Array, "M D"] | StraightThrough:
    """The rows of the experts here. Rows beyond the last group are unspecified."""
    if isinstance(x, StraightThrough):
        numbers = reading.gather_numbers(x.numbers, places)
        return StraightThrough(numbers, _carried(x.carrier, places, reading))
    if not (reading.quantize and reading.keep_quantized):
        return _read(x, places, reading)
    numbers = quantize_rows(lax.stop_gradient(x), "ue8m0")
    return read(StraightThrough(numbers, x), places, reading)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _read(x, places: Places, reading: Reading):
    return _taken(x, places, reading)


def _taken(x, places: Places, reading: Reading):
    """Rows as they arrive: by way of FP8, if that is the hop's format."""
    if not reading.quantize:
        return reading.gather(x, places)
    return dequantize(reading.gather_numbers(quantize_rows(x, "ue8m0"), places), x.dtype)


def _read_bwd(reading: Reading, places: Places, d_rows):
    return reading.sum_back(d_rows, None, places), no_gradients(places)


_read.defvjp(lambda x, places, *static: (_read(x, places, *static), places), _read_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _carried(carrier, places: Places, reading: Reading):
    return jnp.zeros_like(carrier, shape=(places.source.shape[0], carrier.shape[1]))


_carried.defvjp(lambda x, places, *static: (_carried(x, places, *static), places), _read_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def return_sums(
    rows: Float[Array, "M D"], weights: Float[Array, "NR K"], places: Places, reading: Reading
) -> Float[Array, "R D"]:
    """The weighted sums of the experts' rows, at their tokens' devices, in the rows' dtype."""
    return reading.sum_back(rows, weights, places)


def _return_fwd(rows, weights, places, reading):
    return return_sums(rows, weights, places, reading), (rows, weights, places)


def _return_bwd(reading: Reading, residuals, d_y):
    rows, weights, places = residuals
    d_sums = reading.of_each(d_y, places)
    d_rows, d_weights = sum_slots_backward(rows, d_sums, weights, places.slots, places.free)
    return d_rows, d_weights.astype(weights.dtype), no_gradients(places)


return_sums.defvjp(_return_fwd, _return_bwd)
