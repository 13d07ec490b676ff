"""Which implementation of a kernel runs, and why.

An operation is a folder with the same files in each: `api.py` (what callers import), `reference.py`
(plain JAX, right on every backend), `pallas_gpu.py` (Mosaic GPU, for Hopper), `pallas_tpu.py`. An
implementation that cannot do what is asked raises NotImplementedError; the next in the platform's
order is tried, and a warning says what was passed over and why. An implementation asked for by name
never falls back. `choices()` lists every decision since the process began.
"""

import contextlib
import contextvars
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsv3_jax.kernels import lowered
from dsv3_jax.kernels.partition import Cut, cut_by

# What an operation without a rule of its own tries, by platform, in this order.
DEFAULT_ORDER: Mapping[str, tuple[str, ...]] = {
    "gpu": ("pallas_gpu", "reference"),
    "tpu": ("pallas_tpu", "reference"),
    "cpu": ("reference",),
}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("implementation", default=None)
_device: contextvars.ContextVar[Any] = contextvars.ContextVar("device", default=None)
_left: contextvars.ContextVar[int] = contextvars.ContextVar("left to others", default=0)
_choices: dict["Choice", None] = {}


class KernelFallbackWarning(UserWarning):
    """A faster implementation was passed over; the message says which and why."""


@dataclass(frozen=True)
class Choice:
    """One decision: what runs an operation, and what was passed over for which reason."""

    op: str
    platform: str
    implementation: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        text = f"{self.op} on {self.platform}: {self.implementation}"
        for name, reason in self.passed_over:
            text += f"; not {name}, because {reason}"
        return text


def choices() -> tuple[Choice, ...]:
    """Every distinct decision since the process began, oldest first."""
    return tuple(_choices)


@contextlib.contextmanager
def _inside(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def use(implementation: str) -> contextlib.AbstractContextManager[None]:
    """Inside, every operation that has this implementation runs it, and none falls back."""
    return _inside(_forced, implementation)


def compiling_for(device: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, kernels are traced for this device, here or described; None: for what is in scope.

    `Layout.device` is it: a program's layout says what it is compiled for, not the host.
    """
    return _inside(_device, _device.get() if device is None else device)


def leaving(count: int) -> contextlib.AbstractContextManager[None]:
    """Inside, GPU kernels are traced for so many multiprocessors fewer: others run beside them."""
    return _inside(_left, count)


def left() -> int:
    """How many multiprocessors kernels leave to others (`leaving`)."""
    return _left.get()


def target() -> Any:
    """The device that traced code is for, the one place where that is asked.

    That of the mesh in scope (inside a shard_map, or `jax.set_mesh`), else of the layout of the
    program that is traced (`compiling_for`), else JAX's first one.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return described or _device.get() or jax.devices()[0]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _TracedFor:
    device: Any


def define_vjp(function: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """`function.defvjp`, whose backward pass is traced for the device of its forward pass.

    JAX traces a backward rule after the forward pass, by then outside of `compiling_for`.
    """

    @functools.wraps(forward)
    def traced_forward(*args):
        y, residuals = forward(*args)
        return y, (residuals, _TracedFor(target()))

    @functools.wraps(backward)
    def traced_backward(*args):
        *static, (residuals, traced_for), dy = args
        with compiling_for(traced_for.device):
            return backward(*static, residuals, dy)

    function.defvjp(traced_forward, traced_backward)


def decided(function: Any) -> Any:
    """`function`, whose arguments and device alone decide its kernels (`lowered.within`)."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not lowered.is_on():
            return function(*args, **kwargs)
        with lowered.within(function, target(), left(), (args, kwargs)):
            return function(*args, **kwargs)

    return call


def platform() -> str:
    """The platform that traced code is for: "gpu", "tpu" or "cpu"."""
    name = str(target().platform)
    return {"cuda": "gpu"}.get(name, name)


def candidates(
    order: Mapping[str, Sequence[str]], implementation: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """The implementations to try, best first: what was asked for, else the platform's order."""
    asked = implementation if implementation is not None else _forced.get()
    if asked is None:
        return tuple(order.get(platform(), order["cpu"]))
    return (asked,) if isinstance(asked, str) else tuple(asked)


def only_reference(implementation: str | None, what: str) -> str:
    """ "reference", for `what` no kernel does; NotImplementedError where another was asked for."""
    asked = implementation or _forced.get() or "reference"
    if asked != "reference":
        raise NotImplementedError(f"{asked} does not take {what}: use reference")
    return asked


def run(
    package: str,
    op: str,
    *args: Any,
    order: Mapping[str, Sequence[str]] = DEFAULT_ORDER,
    implementation: str | Sequence[str] | None = None,
    cut: Cut | None = None,
    **kwargs: Any,
) -> Any:
    """What the first able implementation of `op` returns for these arguments.

    With a `cut`, whose arrays are the leaves of `args`, XLA may cut a kernel over a mesh by it.
    `package` is the operation's folder as a dotted name; each implementation is a module of it with
    a function named `op`. Raises ValueError for an unknown implementation, and NotImplementedError
    with every reason when none is able.
    """
    passed_over = []
    for name in candidates(order, implementation):
        try:
            function = functools.partial(_function(package, name, op), **kwargs)
            if name.startswith("pallas"):
                function = _lowered_once(function)
                if cut is not None:
                    function = functools.partial(cut_by, cut, function)
            result = function(*args)
        except NotImplementedError as reason:
            passed_over.append((name, str(reason)))
            continue
        _record(Choice(op, platform(), name, tuple(passed_over)))
        return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise NotImplementedError(f"no implementation of {op} can do this: {reasons}")


def _lowered_once(kernel: functools.partial[Any]) -> Any:
    """The same function, lowered once a program for all calls with the same shapes and options.

    Mosaic numbers the kernels that it lowers, so that equal ones would be compiled call by call.
    """
    of_arrays = {
        name: any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(option))
        for name, option in kernel.keywords.items()
    }
    arrays = {name: kernel.keywords[name] for name, holds in of_arrays.items() if holds}
    static = tuple((name, kernel.keywords[name]) for name, holds in of_arrays.items() if not holds)
    return functools.partial(_jitted(kernel.func, left()), static, arrays)


@functools.cache
def _jitted(function: Any, left: int) -> Any:
    del left  # traced for other multiprocessors, equal calls are other kernels

    def call(static, arrays, *args):
        return decided(function)(*args, **dict(static), **arrays)

    call.__name__ = function.__name__
    return jax.jit(call, static_argnums=0)


def _function(package: str, name: str, op: str) -> Any:
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise  # a library that the implementation needs: not for us to hide
        raise ValueError(f"{name!r} is no implementation of {op}") from None
    if not hasattr(module, op):
        raise NotImplementedError(f"{name} has no {op}")
    return getattr(module, op)


def _record(choice: Choice) -> None:
    if choice in _choices:
        return
    _choices[choice] = None
    if choice.passed_over:
        warnings.warn(str(choice), KernelFallbackWarning, stacklevel=4)
