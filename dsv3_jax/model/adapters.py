"""LoRA: a frozen weight with a low-rank update beside it, on any projection, experts included.

y = x W^T + (alpha / rank) x A^T B^T (Hu et al. 2021), with A and B shaped as the published matrices
say. The base is frozen and may be an array or FP8 blocks as published (QLoRA, Dettmers et al. 2023,
with V3's own format). FP8 is dequantised where it is multiplied, a layer at a time, or on CPUs a
piece of a weight (model/frozen_products.py), in the forward pass and again in the backward pass: no
copy in another precision is kept, and x has its gradient.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dsv3_jax.config import LoraConfig, ModelConfig, UserError
from dsv3_jax.config.weights import Weight, find_weight, weights
from dsv3_jax.kernels import backend
from dsv3_jax.kernels.grouped_gemm.api import grouped_matmul
from dsv3_jax.model.frozen_products import HeldAsBytes, InStack, as_in_stack
from dsv3_jax.model.projection import Plain, Projection
from dsv3_jax.quantization.block_scaled import BlockScaled, StraightThrough, dequantize

A, B = "lora_a", "lora_b"
RANK_TILE = 128  # of grouped products; other ranks would be multiplied by every expert in turn
# Of the main model; MTP modules are frozen with the rest.
BLOCKS = {"dense_layers": "dense", "moe_layers": "moe"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "shape"]
)
@dataclass(frozen=True)
class Adapted:
    """A frozen weight among the variables, in the place of an array, and its update.

    Fields:
        base: an array [*lead, *N, *K], or BlockScaled [*lead, rows, columns], or where that lies
            among those of other layers.
        a, b: [*lead, r, K] and [*lead, N, r], f32, heads and their dims as one; None: no update.
        scale: alpha / r.
        shape: of the weight in one layer, which `parameters` fills in.
    """

    base: Any
    a: Array | None
    b: Array | None
    scale: float = 0.0
    shape: tuple[int, ...] = ()
    array = None
    takes_quantized_rows = True

    def multiply(self, x, recipe, activation, where):
        """As `Projection.multiply`: the base cuts itself, XLA cuts the rest."""
        in_pieces = recipe is None and where.layout.one_device

        def of_base(w: Projection, x):
            return w.multiply(x, recipe, activation, where)

        y = _frozen(self.base, self.shape, x, of_base, in_pieces)
        if self.a is None or self.b is None:
            return y
        x = _value(x)
        x = x if activation is None else activation(x)
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        if a.ndim == 3:  # gate's and up's
            inner = jnp.einsum("...k,prk->...pr", x, a)
            update = jnp.einsum("...pr,pfr->...pf", inner, b)
        else:
            update = jnp.einsum("...r,nr->...n", jnp.einsum("...k,rk->...r", x, a), b)
        return y + (self.scale * update).reshape(y.shape).astype(y.dtype)

    def multiply_groups(self, rows, group_sizes, alignment, recipe, activation):
        """As `Projection.multiply_groups`: an update for each expert, in grouped products."""
        shape = (len(self), *self.shape[1:])

        def of_base(w: Projection, rows):
            return w.multiply_groups(rows, group_sizes, alignment, recipe, activation)

        y = _frozen(self.base, shape, rows, of_base, in_pieces=recipe is None)
        if self.a is None or self.b is None:
            return y
        rows = _value(rows)
        rows = rows if activation is None else activation(rows)
        a, b = _filled_up(self.a.astype(rows.dtype), -2), _filled_up(self.b.astype(rows.dtype), -1)
        multiply = functools.partial(grouped_matmul, alignment=alignment)
        inner = multiply(rows, a.reshape(len(a), -1, a.shape[-1]), group_sizes)
        if a.ndim == 3:
            update = multiply(inner, b, group_sizes)
        else:
            halves = jnp.split(inner, a.shape[1], axis=1)
            parts = [multiply(half, b[:, i], group_sizes) for i, half in enumerate(halves)]
            update = jnp.stack(parts, axis=1)
        return y + (self.scale * update).reshape(y.shape).astype(y.dtype)

    def astype(self, dtype: Any) -> Array:
        """The weight with its update, for what is not a product."""
        whole = _dequantized(self.base, jnp.float32).reshape(self.shape)
        if self.a is not None and self.b is not None:
            whole = whole + (self.scale * (self.b @ self.a)).reshape(self.shape)
        return whole.astype(dtype)

    def reshape(self, *shape: int) -> "Adapted":
        """The same weight with dims put together; -1 may stand for one size."""
        size = math.prod(self.shape) // math.prod(abs(s) for s in shape)
        shape = tuple(size if s == -1 else s for s in shape)
        base = self.base if _is_fp8(self.base) else self.base.reshape(shape)
        return Adapted(base, self.a, self.b, self.scale, shape)

    def __len__(self) -> int:
        return self.base.shape[0]


def _frozen(base: Any, shape: tuple[int, ...], x: Any, multiply: Any, in_pieces: bool) -> Array:
    """multiply(weight, x) with the frozen weight; an FP8 one is not saved dequantised.

    in_pieces: one that is held as bytes knows how to multiply itself.
    """
    if not _is_fp8(base):
        return multiply(Plain(base), x)
    if in_pieces and base.dtype == jnp.uint8:
        return multiply(HeldAsBytes(as_in_stack(base), shape), x)
    dtype = x.carrier.dtype if isinstance(x, StraightThrough) else x.dtype

    @jax.checkpoint
    def product(base, x):
        return multiply(Plain(_dequantized(base, dtype).reshape(shape)), x)

    return product(base, x)


def _is_fp8(base: Any) -> bool:
    return isinstance(base, BlockScaled | InStack)


def _filled_up(x: Array, dim: int) -> Array:
    """x with zeros up to the ranks that the kernels of grouped products take."""
    if backend.platform() == "cpu":
        return x
    fill = [(0, 0)] * x.ndim
    fill[dim] = (0, -x.shape[dim] % RANK_TILE)
    return jnp.pad(x, fill)


def _dequantized(base: Any, dtype: Any) -> Array:
    if isinstance(base, InStack):
        base = base.cut()
    return dequantize(base, dtype) if isinstance(base, BlockScaled) else base.astype(dtype)


def _value(x: Any) -> Array:
    if not isinstance(x, StraightThrough):
        return x
    numbers = dequantize(x.numbers, x.carrier.dtype).reshape(x.carrier.shape)
    return x.carrier + jax.lax.stop_gradient(numbers)


def adapted_rows(model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[tuple[str, ...], Weight]]:
    """(path among the parameters, row) of every weight that has an adapter.

    UserError for a target that matches none, with those there are.
    """
    found: dict[tuple[str, ...], Weight] = {}
    valid: set[str] = set()
    used: set[str] = set()
    for block, kind in BLOCKS.items():
        if not getattr(model, f"num_{kind}_layers"):
            continue
        for row in weights(model):
            if row.where not in ("layer", kind) or not _is_projection(row):
                continue
            valid |= {row.name, *_published(row)}
            wanted = _names(row) & set(lora.targets)
            if wanted or (not lora.targets and row.part == "attention"):
                used |= wanted
                found[(block, *row.module, row.name)] = row
    if unknown := set(lora.targets) - used:
        raise UserError(
            f"lora.targets: {', '.join(sorted(unknown))} matches no projection; there are "
            f"{', '.join(sorted(valid))}, and each may be told apart by its module, as in "
            "mlp/experts/down_proj"
        )
    for row in found.values():
        pair = _published(row)
        named = {name.rpartition("/")[2] for name in _names(row) & set(lora.targets)}
        if len(pair) == 2 and named and row.name not in named and named != pair:
            raise UserError(
                f"lora.targets: {' and '.join(sorted(pair))} are held as one weight: name both"
            )
    yield from found.items()


def init_adapters(key: PRNGKeyArray, model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """Adapters of all layers, f32: A uniform within 1 / sqrt(K), as peft draws it, and B zeros."""
    tree: dict[str, Any] = {}
    for number, (path, row) in enumerate(adapted_rows(model, lora)):
        rows, columns = map(len, row.matrix)
        dims = row.dims_of(model)
        lead = (getattr(model, f"num_{BLOCKS[path[0]]}_layers"), *dims[: len(row.lead)])
        of_matrix = dims[len(row.lead) :]
        n, k = math.prod(of_matrix[:rows]), math.prod(of_matrix[rows : rows + columns])
        bound = 1 / math.sqrt(k)
        drawn = jax.random.uniform(
            jax.random.fold_in(key, number), (*lead, lora.rank, k), minval=-bound, maxval=bound
        )
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node |= {A: drawn, B: jnp.zeros((*lead, n, lora.rank))}
    return tree


def with_adapters(params: Any, adapters: Any, lora: LoraConfig) -> Any:
    """The frozen parameters with their adapters, for `forward` and the rest.

    What is FP8 is dequantised in its products, where it has an adapter and where it has none.
    """
    scale = lora.alpha / lora.rank

    def join(base: Any, update: Any) -> Any:
        if isinstance(base, dict):
            return {name: join(part, (update or {}).get(name)) for name, part in base.items()}
        if update is not None:
            return Adapted(base, update[A], update[B], scale)
        return Adapted(base, None, None) if isinstance(base, BlockScaled) else base

    return join(params, adapters)


def merged(params: Any, model: ModelConfig) -> Any:
    """The parameters with each update added to its weight, f32, in the shapes of ours."""

    def merge(path, leaf):
        if not isinstance(leaf, Adapted):
            return leaf.astype(jnp.float32)
        row = find_weight([entry.key for entry in path])
        assert row is not None
        dims = row.dims_of(model)
        layers = leaf.base.shape[: 1 if path[0].key in BLOCKS else 0]
        return Adapted(leaf.base, leaf.a, leaf.b, leaf.scale, (*layers, *dims)).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(
        merge, params, is_leaf=lambda node: isinstance(node, Adapted)
    )


def _is_projection(row: Weight) -> bool:
    return row.is_matrix and row.part not in ("embedding", "head", "router", "mtp")


def _names(row: Weight) -> set[str]:
    """What a target may call it: our name and the published ones, alone or after its modules."""
    starts = [row.module[i:] for i in range(len(row.module) + 1)]
    return {"/".join((*start, name)) for start in starts for name in (row.name, *_published(row))}


def _published(row: Weight) -> set[str]:
    """gate_proj and up_proj, for instance."""
    return {name.removesuffix(".weight").rpartition(".")[2] for name in row.hf}
