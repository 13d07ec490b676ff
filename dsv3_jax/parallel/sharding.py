"""Where the dims of every array lie on the mesh: logical names, a rules table, and `Layout`.

Code names the dims of an array ("batch", "heads", None for a dim that no axis splits); the table of
a preset says which mesh axes each name is spread over. A `Layout` is the mesh with its table, and
hashable, so that it may be a static argument or a module's field. One device is a mesh of one,
`ONE_DEVICE` where nobody says which: there what `constrain`, `gather` and `shard_map` are given
stays as it is.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from dsv3_jax.config import ExpertParallelConfig, ShardingConfig
from dsv3_jax.kernels import backend
from dsv3_jax.parallel import transports
from dsv3_jax.parallel.collectives import Cuts, carrier_of_slices, gather_slices
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.quantization.block_scaled import BlockScaled, StepWeight, is_step_weight

Axes = tuple[str, ...]

GATHERED = "gathered_weight"


class Rules(NamedTuple):
    """The mesh axes that each logical dim is spread over, slowest first; () for none."""

    batch: Axes = ("data", "node", "local")
    seq: Axes = ("context",)  # tokens of a sequence
    residual: Axes = ("context", "tensor")  # the same tokens, between the blocks
    cache: Axes = ("context",)  # rows of the latent cache
    heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)  # hidden dim of a dense or shared feed-forward
    vocab: Axes = ("tensor",)
    expert: Axes = ("node", "local")


# When decoding, the few new tokens of a sequence are on every device that has the sequence.
RULES = {
    "train": Rules(),
    "prefill": Rules(residual=("context",)),
    "decode": Rules(seq=(), residual=()),
}


# Names no device, so that importing this starts no backend.
ONE = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
ANY_EXCHANGE, ANY_STATE = ExpertParallelConfig(), ShardingConfig()


@dataclass(frozen=True)
class Layout:
    """How one program is spread over the devices of a mesh.

    Source: this project (docs/parallelism.md).
    """

    mesh: Mesh | AbstractMesh = ONE
    rules: Rules = RULES["train"]
    expert: ExpertParallelConfig = ANY_EXCHANGE
    config: ShardingConfig = ANY_STATE
    # Axes that a surrounding shard_map has made manual, as a pipeline does with `pipe`: what is
    # inside of it lies on one of their ranks, and is not cut over them.
    outer: Axes = ()

    def __repr__(self) -> str:
        """Short: it is a default in the signatures that help() shows."""
        axes = [f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1]
        return f"<Layout of {' '.join(axes) or 'one device'}>"

    @property
    def one_device(self) -> bool:
        """Whether no array is cut: one device, or one for each rank of a pipeline."""
        return all(size == 1 for axis, size in self.mesh.shape.items() if axis != "pipe")

    @property
    def has_devices(self) -> bool:
        """Whether the mesh says which devices, so that arrays can be placed on them."""
        return isinstance(self.mesh, Mesh)

    @property
    def device(self) -> Any:
        """A device that the program is compiled for, here or described; None where nobody says."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flat[0]
        return getattr(self.mesh, "abstract_device", None)

    @property
    def platform(self) -> str | None:
        """What the program is compiled for ("cpu", "gpu", "tpu"); None where nobody says."""
        return None if self.device is None else self.device.platform

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Inside, kernels are traced for what this layout is for, whatever the host has."""
        return backend.compiling_for(self.device)

    @property
    def gathers_each_layer(self) -> bool:
        """Whether every layer gathers its own weights when it runs (FSDP)."""
        return self.config.state == "fsdp" and not self.one_device

    @property
    def ranks_take_slices(self) -> bool:
        """Whether what ranks of `pipe` get of the state, and give back, are slices of it.

        Not where `tensor` cuts weights: XLA would move activations by permutes within a loop that
        not all ranks turn.
        """
        return self.mesh.shape["tensor"] == 1

    def axes(self, name: str) -> Axes:
        """The mesh axes of a logical dim; ValueError for a name that the table does not have.

        Axes of one device are left out: XLA:CPU runs collectives over them, and copies.
        """
        if name not in Rules._fields:
            raise ValueError(f"unknown dim {name!r}: the rules name {', '.join(Rules._fields)}")
        return tuple(axis for axis in getattr(self.rules, name) if self.mesh.shape[axis] > 1)

    def size(self, name: str) -> int:
        """How many shards a logical dim is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these dims; ValueError when two share an axis."""
        axes = [() if dim is None else self.axes(dim) for dim in dims]
        used = [axis for of_dim in axes for axis in of_dim]
        if len(set(used)) < len(used):
            raise ValueError(f"dims {dims} use one mesh axis twice: {axes}")
        return PartitionSpec(*(of_dim or None for of_dim in axes))

    def sharding(self, *dims: str | None) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, x: Any, *dims: str | None) -> Any:
        """x, an array or a tree of them, laid out as its dims say, when inside jit.

        Trailing None may be left out.
        """
        if self.one_device:
            return x
        where = self._bound(self.spec(*dims))
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), x)

    def whole_rows(self, x: jax.Array | np.ndarray) -> Any:
        """x, [B, T, ...], with no row cut, when inside jit.

        To be said of token ids that are shifted along their row: a shift of rows that are cut is a
        collective-permute, which all devices join, and hangs in a branch that only some take.
        """
        return self.constrain(x, "batch")

    def place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """x, laid out as a spec that may name any axis of the mesh, when inside jit."""
        return jax.lax.with_sharding_constraint(x, self._bound(spec))

    def _bound(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding to constrain an array to: inside an outer shard_map, over its mesh."""
        context = jax.sharding.get_abstract_mesh()
        return NamedSharding(context if in_shard_map() else self.mesh, spec)

    def order(self, length: int) -> np.ndarray | None:
        """The position at each place of a sequence of this length; None for 0, 1, 2, ..."""
        devices = self.size("seq")
        ring = self.config.context == "ring" and devices > 1
        return zigzag(length, devices) if ring else None

    def in_order(self, x: jax.Array | np.ndarray) -> Any:
        """x, [B, T, ...], with its tokens at the places that `order` gives them."""
        order = self.order(x.shape[1])
        return x if order is None else x[:, order]

    def in_natural_order(self, x: jax.Array) -> jax.Array:
        """Undoes `in_order`."""
        order = self.order(x.shape[1])
        return x if order is None else x[:, np.argsort(order)]

    def shard_map(
        self, function: Callable, in_specs: Any, out_specs: Any, check_vma: bool = True
    ) -> Callable:
        """`function` on each device's shards, every mesh axis manual; replication is checked.

        Specs are those of `spec`. Inside, shapes are local, collectives take axis names, and a
        kernel sees one device's arrays. Inside an outer shard_map, as that of a pipeline over
        `pipe`, the axes that it leaves become manual. On one device it is `function` itself, and
        collectives over `axes`, which are none, are not to be called.
        """
        if self.one_device:
            return function
        return partial(self._of_slices, function, in_specs, (out_specs, check_vma))

    def _mapped(self, function: Callable, in_specs: Any, out_specs: Any, check_vma: bool):
        specs = {"in_specs": in_specs, "out_specs": out_specs, "check_vma": check_vma}
        if outer := jax.sharding.get_abstract_mesh().manual_axes:
            left = set(self.mesh.axis_names) - set(outer)
            return jax.shard_map(function, axis_names=left, **specs)
        return jax.shard_map(function, mesh=self.mesh, **specs)

    def _of_slices(self, function: Callable, in_specs: Any, how: tuple[Any, bool], *operands: Any):
        """A `shard_map` whose weights, where they are StepWeights, have a master in slices.

        What a device sees in the master's place is as large as what it multiplies with, and the
        gradient of that is scattered to the slices while it is added up.
        """
        if not any(map(is_step_weight, jax.tree.leaves(operands, is_leaf=is_step_weight))):
            return self._mapped(function, in_specs, *how)(*operands)

        def specs_of(spec, operand):
            def of_node(node):
                if not is_step_weight(node):
                    return spec
                numbers, turned = spec, None
                if isinstance(node.numbers, BlockScaled):  # matrices, whole but for their stack
                    stack = PartitionSpec(*spec[: node.numbers.ndim - 2])
                    numbers = BlockScaled(stack, stack, node.numbers.tile)
                    turned = None if node.transposed is None else numbers
                return StepWeight(self.stored_spec(spec, node.shape), numbers, turned)

            return jax.tree.map(of_node, operand, is_leaf=is_step_weight)

        def carried(spec, piece):
            if not is_step_weight(spec):
                return piece
            numbers = spec.numbers
            used = numbers.values if isinstance(numbers, BlockScaled) else numbers
            cuts = self.scattered_at_once(cuts_between(used, spec.master))
            carrier = carrier_of_slices(piece.master, cuts)
            return StepWeight(carrier, piece.numbers, piece.transposed)

        specs = jax.tree.map(specs_of, in_specs, operands, is_leaf=_is_spec)

        def of_device(*pieces):
            return function(*jax.tree.map(carried, specs, pieces, is_leaf=_is_spec))

        return self._mapped(of_device, specs, *how)(*operands)

    def scattered_at_once(self, cuts: Cuts) -> Cuts:
        """What of the cuts each reduce-scatter is over, in turn.

        Slices of 28 rows are not whole tiles of 8: XLA for TPUs adds up such an array whole. An
        axis at a time, it does so with what the first axis has left.
        """
        if self.platform != "tpu":
            return cuts
        return tuple((dim, (axis,)) for dim, axes in cuts for axis in axes)

    def gathered_at_once(self, cuts: Cuts) -> Cuts:
        """What of the cuts each all-gather is over, in turn.

        Of one over all devices XLA for TPUs makes an all-reduce, twice the bytes: there the first
        axis, which is the slowest, is gathered after the others.
        """
        if self.platform != "tpu":
            return cuts
        every = {axis for axis, size in self.mesh.shape.items() if size > 1}
        return tuple(
            (dim, part)
            for dim, axes in cuts
            for part in ((axes[1:], axes[:1]) if set(axes) == every else (axes,))
            if part
        )

    def stored_spec(
        self, spec: PartitionSpec, shape: tuple[int, ...], skip_dims: int = 0
    ) -> PartitionSpec:
        """`spec`, cut further over the axes along which devices would hold copies (ZeRO, FSDP).

        Those are the mesh axes that the spec does not use, so dense and expert leaves differ. Each
        goes to the first dim that it divides, so that slices are few rows whole, and dims that
        follow one another may be put together. What divides nothing stays whole: norms are small.
        Where ranks of `pipe` take slices, they cut last, so that what a rank's devices hold
        together is one piece.
        The first skip_dims dims, of stacked layers, are left alone.
        """
        if self.config.state == "replicated":
            return spec
        cut: list[Axes] = [axes_of(entry) for entry in spec]
        cut += [()] * (len(shape) - len(cut))
        used = {axis for axes in cut for axis in axes}
        last = "pipe" if self.ranks_take_slices else None
        for axis, size in sorted(self.mesh.shape.items(), key=lambda each: each[0] == last):
            if size == 1 or axis in used or axis in self.outer:
                continue
            for dim in range(skip_dims, len(shape)):
                shards = math.prod(self.mesh.shape[each] for each in cut[dim])
                if shape[dim] % (shards * size) == 0:
                    cut[dim] += (axis,)
                    break
        return PartitionSpec(*(axes or None for axes in cut))

    def gather(self, x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
        """x laid out as `used`, from `stored`; its cotangent is laid out as `stored` again.

        Named GATHERED for rematerialisation: a gathered weight need not be kept.
        """
        if self.one_device:
            return x
        return checkpoint_name(_gather(x, self, used.spec, stored.spec), GATHERED)

    def constrain_tree(self, tree: Any, shardings: Any) -> Any:
        """The tree's arrays laid out as a tree of NamedShardings says, when inside jit."""
        if self.one_device:
            return tree
        return jax.tree.map(
            lambda x, to: jax.lax.with_sharding_constraint(x, self._bound(to.spec)), tree, shardings
        )

    def make(self, function: Callable[..., Any], where: Any, *operands: Any) -> Any:
        """function(*operands), with every array of it made where a tree of NamedShardings says."""
        if self.one_device:
            return function(*operands)
        return jax.jit(function, out_shardings=where)(*operands)

    def residual_axes(self) -> Axes:
        """The axes that cut tokens between blocks further than inside them."""
        return tuple(axis for axis in self.axes("residual") if axis not in self.axes("seq"))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, layout: Layout, used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    cuts = layout.gathered_at_once(cuts_between(used, stored))
    if not cuts:
        return layout.place(x, used)
    return layout.shard_map(partial(gather_slices, cuts=cuts), (stored,), used)(x)


def _gather_fwd(x, layout, used, stored):
    return _gather(x, layout, used, stored), None


def _gather_bwd(layout, used, stored, _, d_x):
    return (layout.place(d_x, stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def in_shard_map() -> bool:
    """Whether what is traced is inside a shard_map."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec | StepWeight)


def cuts_between(used: PartitionSpec, stored: PartitionSpec) -> Cuts:
    """What `Layout.stored_spec` cuts further of an array that is used as a spec says."""
    whole = [*used, *[None] * len(stored)]
    cuts = ((d, axes_of(entry)[len(axes_of(whole[d])) :]) for d, entry in enumerate(stored))
    return tuple((dim, axes) for dim, axes in cuts if axes)


def axes_of(entry: Any) -> Axes:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


ONE_DEVICE = Layout()


def make_layout(mesh: Mesh, sharding: ShardingConfig, expert: ExpertParallelConfig) -> Layout:
    """The layout for training on a mesh; UserError where it cannot run what is asked for.

    Source: this project (docs/parallelism.md).

    >>> import dsv3_jax as ds
    >>> mesh = ds.make_mesh(ds.ParallelConfig())
    >>> ds.make_layout(mesh, ds.ShardingConfig(), ds.ExpertParallelConfig()).one_device
    True
    """
    return Layout(mesh, RULES["train"], transports.resolve(mesh, expert), sharding)


def serving_layouts(layout: Layout) -> tuple[Layout, Layout]:
    """The layouts for a prompt and for the tokens after it; no weight is cut only to be stored."""
    config = dataclasses.replace(layout.config, state="replicated")
    prefill = dataclasses.replace(layout, rules=RULES["prefill"], config=config)
    return prefill, dataclasses.replace(prefill, rules=RULES["decode"])


def zigzag(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """The position at each place of a sequence spread over devices for equal causal work.

    Cut into 2 n pieces, device i has pieces i and 2n - 1 - i: the work of a query grows with its
    position (Brandon et al. 2023; the Llama 3 report, section 3.3.2). length must be a multiple of
    2 n.
    """
    if length % (2 * devices):
        raise ValueError(f"{length=} must be a multiple of 2 x {devices=}")
    pieces = np.arange(length).reshape(2 * devices, -1)
    order = [piece for i in range(devices) for piece in (i, 2 * devices - 1 - i)]
    return pieces[order].reshape(-1)
