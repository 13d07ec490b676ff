"""What all kernels for Hopper share: whether they can run here, the interpreter, and the layouts
that TMA and wgmma read."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from dsv3_jax.kernels import backend, lowered

plgpu: Any = mosaic_gpu  # its names are re-exported without telling type checkers

MAX_SMEM = 232448  # bytes that one block may use
MULTIPROCESSORS = 132
SWIZZLE_BYTES = 128  # of a row, in the widest swizzle
WGMMA = plgpu.Layout.WGMMA

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreting(**params: Any) -> Iterator[None]:
    """Inside, kernels are traced for Pallas's GPU interpreter, on any machine.

    It cannot run instructions written by hand; where there are any, plain ones stand in for them.
    """
    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
            yield
    finally:
        _interpreting.reset(token)


def interpreted() -> bool:
    """Whether the kernel being traced is for Pallas's interpreter."""
    return _interpreting.get()


def kernel(body: Callable[..., None], *, out_type: Any, **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, which Mosaic lowers once for all calls that are alike (`lowered.py`)."""
    plain = plgpu.kernel(body, out_type=out_type, **options)

    def call(*operands):
        if interpreted() or not lowered.is_on():
            return plain(*operands)
        leaves, tree = jax.tree.flatten(operands)
        of_leaves = lambda *x: plain(*jax.tree.unflatten(tree, x))  # noqa: E731
        # Lowered apart, it does not see the mesh that says what device it is for.
        named = jax.named_scope(options.get("kernel_name") or getattr(body, "__name__", "kernel"))
        with backend.compiling_for(backend.target()), named:
            return lowered.run(of_leaves, (tree, options), out_type, leaves)

    return call


def require() -> None:
    """Raises NotImplementedError, saying why, unless these kernels can be compiled and run."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"needs jax 0.11 or newer, and this is {jax.__version__}")
    if _interpreting.get():
        return
    if backend.platform() != "gpu":
        raise NotImplementedError(f"needs a GPU, and this is compiled for {backend.platform()!r}")
    # A description of a device has none; that it is Hopper's is up to who describes it.
    capability = getattr(backend.target(), "compute_capability", "9.0")
    if str(capability) != "9.0":
        raise NotImplementedError(
            f"needs compute capability 9.0 (Hopper), and this is {capability}"
        )


def multiprocessors() -> int:
    """Multiprocessors of the GPU that is compiled for, but for those that are left to others."""
    device = backend.target()
    counts = (getattr(device, name, None) for name in ("num_cores", "core_count"))
    return next(filter(None, counts), MULTIPROCESSORS) - backend.left()


def swizzled(dtype: Any, columns: int | None = None) -> tuple[Any, ...]:
    """The layout in which wgmma and TMA read and write rows of `columns` numbers; 128 bytes each
    unless said otherwise."""
    size = jnp.dtype(dtype).itemsize
    row = columns * size if columns else SWIZZLE_BYTES
    tiling = plgpu.TilingTransform((8, row // size))
    # The narrowest swizzle is 32 bytes; plain tiles serve for stores.
    return (tiling, plgpu.SwizzleTransform(row)) if row >= 32 else (tiling,)
