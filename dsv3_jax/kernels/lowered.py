"""Hopper kernels lowered once: kept in the process, and in a folder beside the compiled programs.

Mosaic lowers a kernel in Python, 0.1 to 1 s each and some 90 for a step in FP8, at every start,
also where the program itself is compiled already. A kernel is a function of our source, of jax and
of what the jitted function that it is part of was called with. With all of that as its name what
Mosaic made of it is kept (`lowered_form.py`), and the call to it is emitted as Mosaic emits it.

Kernels are lowered in a thread of their own, because JAX keeps what is in scope (meshes, settings)
by thread: none of it can enter. Kernels that know other devices (`kernels/peers`) are not kept.
Source is read from the files: what a running process has patched is not part of a name.
"""

import contextlib
import contextvars
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.kernels import kept_files, lowered_name, lowering_process, manual, priming
from dsv3_jax.kernels.lowered_form import Lowered, UnknownForm, call_lowered, lower, on_emit

# A variable of the environment: with 0, Mosaic lowers each kernel anew for each program.
SWITCH = "DSV3_KEPT_KERNELS"
LONGEST = 180.0  # seconds that others are waited for
PATIENCE = 2.0  # seconds that this process lowers kernels by itself, before it asks others


@dataclass
class _Call:
    """The jitted call that is being traced: what decides its kernels, and how many there were.

    Fields:
        request: of its kernels, for another process; None where it cannot be written down.
        asked: what ends when that process has left them in the folder.
    """

    name: str
    request: Callable[[Path], bytes | None]
    kernels: int = 0
    asked: Future[str] | None = None


@dataclass(eq=False)
class Awaited:
    """A kernel that another process lowers."""

    name: str
    asked: Future[str]
    lower: Callable[[], Lowered]

    def get(self) -> Lowered:
        """It, lowered here if the other process did not; UnknownForm as `lower` raises it."""
        found = _kept.get(self.name, self)
        if found is self:
            try:
                wrong = self.asked.result(timeout=_waits[0])
            except TimeoutError:
                _waits[0] = 0.0
                wrong = f"it has not answered for {LONGEST:.0f} s"
            found = _in_folder(self.name)
            if found is None:
                why = wrong or "it has another name there"
                warnings.warn(
                    f"a kernel is lowered here, not by another process: {why}", stacklevel=2
                )
                found = _lowered_here(self.name, self.lower)
            if found is None:
                raise UnknownForm("a kernel that another process was asked for has an unknown form")
            _new.add(found)
            _kept[self.name] = found
        assert isinstance(found, Lowered)
        return found


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("kernels' call", default=None)
_kept: dict[str, Lowered | Awaited | None] = {}  # None: not in the form that is known
_new: set[Lowered] = set()  # for this process: no program that is compiled already has them
_waits = [LONGEST]  # seconds for which others are waited for; not a second time
_here = [0.0]  # seconds that this process spent on lowering kernels


def is_on() -> bool:
    """Whether kernels are kept."""
    return os.environ.get(SWITCH) != "0"


@contextlib.contextmanager
def within(function: Any, device: Any, left: int, arguments: Any) -> Iterator[None]:
    """Inside, kernels belong to a call of `function` for a device, decided by its arguments.

    left: multiprocessors that they leave to others. arguments: (args, kwargs). Arrays decide by
    their shapes and dtypes. Where a value cannot be told from another one by what it is made of,
    the kernels of the call are not kept.
    """
    try:
        parts = [f"{function.__module__}.{function.__qualname__}", lowered_name.of_device(device)]
        name = "\n".join([*parts, str(left), lowered_name.described(arguments)])
        request = functools.partial(lowering_process.request, function, device, left, arguments)
        call = _Call(name, request)
    except TypeError:
        call = None
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def run(kernel: Callable[..., Any], options: Any, out_type: Any, operands: Any) -> Any:
    """kernel(*operands), which has results of these types, lowered once for all equal calls.

    kernel: made by `plgpu.kernel` with these options, of arrays and references. Calls are equal
    where the kernel has the same place in calls that are equal (`within`); its options, which that
    decides, are compared as well.
    """
    call, told = _call.get(), repr(options)
    dumps = any("DUMP" in name for name in lowered_name.mosaic_settings())  # as it lowers
    if call is None or dumps or " at 0x" in told:
        return kernel(*operands)
    call.kernels += 1
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    leaves, tree = jax.tree.flatten(out_type)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    name = "\n".join([lowered_name.world(), call.name, repr((call.kernels, structs, types)), told])
    refs = [i for i, x in enumerate(operands) if isinstance(x, jax.Ref)]
    found = _find(name, functools.partial(lower, kernel, structs, refs), call)
    if found is None:
        return kernel(*operands)
    values = [x[...] if i in refs else x for i, x in enumerate(operands)]
    marked = manual.vary(values)
    if any(jax.typeof(marked[i]) != jax.typeof(values[i]) for i in refs):
        return kernel(*operands)  # what devices share cannot take what differs between them
    bind = functools.partial(call_lowered, found, (*types, *(structs[i] for i in refs)))
    if not refs:  # a kernel that is mapped is another one
        bind = jax.custom_batching.custom_vmap(bind)
        bind.def_vmap(functools.partial(_mapped, kernel))
    results = bind(*marked)
    for i, value in zip(refs, results[len(types) :]):
        operands[i][...] = value
    return jax.tree.unflatten(tree, results[: len(types)])


def _mapped(kernel, size, in_batched, *operands):
    del size
    results = jax.vmap(kernel, [0 if batched else None for batched in in_batched])(*operands)
    results = jax.tree.leaves(results)
    return results, [True] * len(results)


def _find(name: str, lower: Callable[[], Lowered], call: _Call) -> Lowered | Awaited | None:
    """The kernel of that name: of this process, of the folder, or lowered now and kept."""
    if name not in _kept:
        found = _in_folder(name)
        if found is None and (asked := _ask_another(call)) is not None:
            found = Awaited(name, asked, lower)
        _kept[name] = _lowered_here(name, lower) if found is None else found
    return _kept[name]


def _in_folder(name: str) -> Lowered | None:
    file = _file(name)
    if file is None or not file.exists():
        return None
    try:
        return Lowered.from_bytes(file.read_bytes(), name)
    except (ValueError, TypeError, OSError) as error:
        warnings.warn(f"{file} is not used, and is written anew: {error}", stacklevel=5)
    return None


def _lowered_here(name: str, lower: Callable[[], Lowered]) -> Lowered | None:
    """The kernel, kept in the folder; None where it is not in the form that is known."""
    begun = time.monotonic()
    try:
        found = lower()
    except UnknownForm as error:
        warnings.warn(f"the kernel is lowered anew for each program: {error}", stacklevel=5)
        return None
    finally:
        _here[0] += time.monotonic() - begun
    _new.add(found)
    if (file := _file(name)) is not None:
        kept_files.write(file, found.to_bytes(name))
    return found


def _ask_another(call: _Call) -> Future[str] | None:
    """What ends when another process has lowered the call's kernels; None: lower them here.

    Other processes start when this one has lowered for as long as they take to.
    """
    folder = kept_files.folder()
    if folder is None or lowering_process.serving() or _here[0] < PATIENCE:
        return None
    if call.asked is None and (request := call.request(folder)) is not None:
        call.asked = lowering_process.others().submit(request)
    return call.asked


def _file(name: str) -> Path | None:
    folder = kept_files.folder()
    return folder and kept_files.place(folder, name)


def _emitted(kernel: Lowered, operands: Any, results: Any) -> None:
    """What a program calls, XLA will want compiled."""
    priming.expect(kernel, operands, results, new=kernel in _new)


on_emit.append(_emitted)
