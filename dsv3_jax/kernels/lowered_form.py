"""What Mosaic makes of a kernel: read off the program that calls it, written down, and called.

A kernel is one custom call whose attributes hold Mosaic's program (jax 0.11). What is not in the
form that is known here is refused (`UnknownForm`), and Mosaic emits it itself.
"""

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from dsv3_jax.kernels import kept_files
from dsv3_jax.kernels.lowered_name import apart

CALL = "mosaic_gpu_v2"  # the custom call that runs a kernel of Mosaic's, as jax 0.11 names it
NUMBERED = "mosaic_gpu.dump_basename"  # where Mosaic writes how many kernels it lowered before
_FLAGS = ("use_custom_barrier", "skip_device_barrier", "uses_xla_collective_metadata")


class UnknownForm(Exception):
    """What Mosaic made of a kernel is not in the form that this module knows."""


@dataclass(frozen=True)
class Lowered:
    """A kernel as XLA gets it.

    Fields:
        module: Mosaic's program, serialised.
        flags: the other attributes of the custom call.
        aliases: (operand, result) pairs that are one array.
    """

    module: bytes = field(repr=False)
    flags: tuple[tuple[str, bool], ...]
    aliases: tuple[tuple[int, int], ...]

    @property
    def hash(self) -> bytes:
        """By which jaxlib knows the kernel in a process."""
        return hashlib.sha256(self.module).digest()

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the custom call."""
        return {"kernel_hash": self.hash, "module": self.module, **dict(self.flags)}

    def to_bytes(self, name: str) -> bytes:
        """A file's content, which begins with the digest of the rest."""
        return kept_files.sealed([name, self.flags, self.aliases], self.module)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "Lowered":
        """The reverse; ValueError for a file that is damaged, or another kernel's."""
        (of, flags, aliases), module = kept_files.opened(content)
        if of != name:
            raise ValueError("it is of another kernel")
        return cls(module, *(tuple(map(tuple, x)) for x in (flags, aliases)))


def lower(kernel: Callable[..., Any], structs: Sequence[Any], refs: Sequence[int]) -> Lowered:
    """A kernel of `plgpu.kernel` for operands of these types, of which `refs` are references.

    It returns its results, and then what is in the references. UnknownForm, saying what was found.
    """

    def alone(*arrays):
        operands = [jax.new_ref(x) if i in refs else x for i, x in enumerate(arrays)]
        results = jax.tree.leaves(kernel(*operands))
        return *results, *(jax.freeze(operands[i]) for i in refs)

    def lowered():
        return jax.jit(alone).trace(*structs).lower(lowering_platforms=("cuda",))

    return _read(apart(lowered).compiler_ir("stablehlo"))


def _read(program: Any) -> Lowered:
    """The kernel of a program that is one call to it."""
    (main,) = (f for f in program.body.operations if f.name.value == "main")
    (block,) = main.regions[0].blocks
    *calls, end = block.operations
    if [op.operation.name for op in calls] != ["stablehlo.custom_call"]:
        raise UnknownForm(f"it takes {[op.operation.name for op in calls]}")
    (call,) = calls
    target = call.attributes["call_target_name"].value
    if target != CALL or list(call.operands) != list(block.arguments):
        raise UnknownForm(f"it is {target} of {len(call.operands)} operands")
    attributes = {x.name: x.attr for x in call.attributes["mhlo.backend_config"]}
    module = attributes.pop("module").value_bytes
    if hashlib.sha256(module).digest() != attributes.pop("kernel_hash").value_bytes:
        raise UnknownForm("its hash is not of its program")
    if unknown := set(attributes) - set(_FLAGS):
        raise UnknownForm(f"it has {unknown}")
    flags = tuple((name, bool(attributes[name].value)) for name in _FLAGS)
    if dict(flags)["uses_xla_collective_metadata"]:
        raise UnknownForm("it knows other devices")
    results = list(call.results)
    places = tuple(results.index(x) for x in end.operands)
    if places != tuple(range(len(results))):
        raise UnknownForm(f"its results are in the order {places}")
    return Lowered(_unnumbered(module, program.context), flags, _aliases(call))


def _aliases(call: Any) -> tuple[tuple[int, int], ...]:
    if "output_operand_aliases" not in call.attributes:
        return ()
    pairs = []
    for alias in map(stablehlo.OutputOperandAlias, call.attributes["output_operand_aliases"]):
        output = list(alias.output_tuple_indices) or [0]
        pairs.append((int(alias.operand_index), int(output[0])))
    return tuple(pairs)


def _unnumbered(module: bytes, context: Any) -> bytes:
    """Mosaic's program without its number in the process that lowered it."""
    known = context.allow_unregistered_dialects
    context.allow_unregistered_dialects = True
    try:
        parsed = ir.Module.parse(module, context)
        attributes = parsed.operation.attributes
        if NUMBERED in attributes:
            attributes[NUMBERED] = ir.StringAttr.get("kernel", context)
        content = io.BytesIO()
        parsed.operation.write_bytecode(content, desired_version=0)
        return content.getvalue()
    finally:
        context.allow_unregistered_dialects = known


def call_lowered(kernel: Any, types: tuple[Any, ...], *operands: Any) -> list[Any]:
    """The results of a kernel, which are of these types; it is, or its `get()` will be, Lowered."""
    return _kernel.bind(*operands, kernel=kernel, types=types)


# Told of each call that is emitted: the kernel, its operands' and its results' types.
on_emit: list[Callable[[Lowered, Any, Any], None]] = []

_kernel = Primitive("hopper_kernel")
_kernel.multiple_results = True


@_kernel.def_abstract_eval
def _(*operands, kernel, types):
    del kernel
    like = operands[0]
    spec = lambda x: PartitionSpec(*[None] * len(x.shape))  # noqa: E731
    return [
        like.update(
            shape=x.shape,
            dtype=x.dtype,
            weak_type=False,
            sharding=NamedSharding(like.sharding.mesh, spec(x)),
        )
        for x in types
    ]


@_kernel.def_impl
def _(*operands, **params):
    return jax.jit(functools.partial(_kernel.bind, **params))(*operands)


def _emit(context: Any, *operands: Any, kernel: Any, types: Any):
    kernel = kernel if isinstance(kernel, Lowered) else kernel.get()
    for tell in on_emit:
        tell(kernel, context.avals_in, types)
    lowering = jax.ffi.ffi_lowering(CALL, operand_output_aliases=dict(kernel.aliases))
    return lowering(context, *operands, **kernel.attributes)


mlir.register_lowering(_kernel, _emit, platform="cuda")
