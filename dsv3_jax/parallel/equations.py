"""A program as its equations: which of them make a value, and what some of them give.

`program_of` reads them of a jaxpr and goes into calls that only wrap a body. Equations may be left
out, or be replaced by others, before they are run again (`parallel/apart.py`).
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core as jcore
from jax.ref import AbstractRef

from dsv3_jax.parallel.collectives import vary

# Calls whose body is gone into.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint")
_PRODUCTS = ("dot_general", "ragged_dot", "conv_general_dilated", "ffi_call")


class Value:
    """What an equation makes, or a program is given; told apart by identity."""

    def __init__(self, aval: Any):
        self.aval = aval


class Equation(NamedTuple):
    """One operation, or what is left of one.

    Fields:
        invars: what it reads, Values and literals.
        outvars: the Values that it makes.
        run: the function of arrays, in those orders.
        is_product: whether it multiplies, or has a body of its own, as a kernel and a loop have.
        primitive, params: of the operation; "" and None of what is left of one.
        scope: where the program says that it comes from.
    """

    invars: list[Any]
    outvars: list[Value]
    run: Callable[..., list[Any]]
    is_product: bool
    primitive: str = ""
    params: Any = None
    scope: str = ""


class Program(NamedTuple):
    """Equations in an order in which they can run; `constants` are arrays by their Value."""

    eqns: list[Equation]
    invars: list[Value]
    outvars: list[Any]
    constants: dict[Value, Any]

    def only(self, numbers: Iterable[int]) -> "Program":
        """The program with these of its equations, by number."""
        return self._replace(eqns=[self.eqns[n] for n in sorted(numbers)])


def program_of(body: Any) -> Program:
    """The equations of a jaxpr, closed or without constants."""
    jaxpr, consts = _without_constants(body)
    eqns: list[Equation] = []
    constants: dict[Value, Any] = {}

    def add(jaxpr, consts, operands, scope: str) -> list[Any]:
        names = dict(zip(jaxpr.invars, operands))
        of_constants = [Value(v.aval) for v in jaxpr.constvars]
        names |= zip(jaxpr.constvars, of_constants)
        constants.update(zip(of_constants, consts))
        for eqn in jaxpr.eqns:
            inputs = [names[v] if is_variable(v) else v for v in eqn.invars]
            where = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
            if eqn.primitive.name in _CALLS:
                inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                if name := eqn.params.get("name"):  # by which `compile` knows a kernel
                    where = f"{where}/jit({name})" if where else f"jit({name})"
                results = add(*_without_constants(inner), inputs, where)
            else:
                results: list[Any] = [Value(v.aval) for v in eqn.outvars]
                run, name = partial(_bind, eqn, where), eqn.primitive.name
                says = _is_product(eqn), name, eqn.params, where
                eqns.append(Equation(inputs, results, run, *says))
            names |= zip(eqn.outvars, results)
        return [names[v] if is_variable(v) else v for v in jaxpr.outvars]

    inputs = [Value(v.aval) for v in jaxpr.invars]
    outputs = add(jaxpr, consts, inputs, "")
    return Program(eqns, inputs, outputs, constants)


def _without_constants(body: Any) -> tuple[Any, Sequence[Any]]:
    return (body.jaxpr, body.consts) if isinstance(body, jcore.ClosedJaxpr) else (body, ())


def _is_product(eqn: Any) -> bool:
    if eqn.primitive.name.startswith(_PRODUCTS):
        return True
    return next(jcore.jaxprs_in_params(eqn.params), None) is not None


def _bind(eqn: Any, scope: str, *operands: Any) -> list[Any]:
    if eqn.primitive.name == "pvary":  # of what may be marked already (`apart._axes_of`)
        return [vary(x, eqn.params["axes"]) for x in operands]
    parameters = eqn.primitive.get_bind_params(eqn.params)
    with scoped(scope):
        results = eqn.primitive.bind(*operands, **parameters)
    return list(results) if eqn.primitive.multiple_results else [results]


def scoped(scope: str) -> Any:
    """A context in which operations are said to come from there.

    Without it a compiled program says nothing of where its own come from.
    """
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def evaluate(program: Program, known: dict[Any, Any], wanted: Iterable[Any]) -> list[Any]:
    """The arrays of the wanted Values after all equations; `known` are those that these lack."""
    values = program.constants | known
    for eqn in program.eqns:
        values |= zip(eqn.outvars, eqn.run(*(_read(values, atom) for atom in eqn.invars)))
    return [_read(values, atom) for atom in wanted]


def _read(values: dict[Any, Any], atom: Any) -> Any:
    return values[atom] if is_variable(atom) else atom.val


def is_variable(atom: Any) -> bool:
    """Whether this is no literal."""
    return not isinstance(atom, jcore.Literal)


def variables(atoms: Iterable[Any]) -> set[Any]:
    """Those of them that are no literals."""
    return set(filter(is_variable, atoms))


def is_reference(atom: Any) -> bool:
    """Whether kernels may write to it."""
    return is_variable(atom) and isinstance(atom.aval, AbstractRef)


# A program's equations, or a jaxpr's: both have invars and outvars.


def makers_of(eqns: Sequence[Any]) -> dict[Any, list[int]]:
    """The equations, by number, that make each variable.

    Those of a reference are all that touch it: a kernel that writes to it has no other result, and
    what it holds cannot be handed from one part to the other.
    """
    makers: dict[Any, list[int]] = {}
    for number, eqn in enumerate(eqns):
        for v in eqn.outvars:
            makers.setdefault(v, []).append(number)
        for v in filter(is_reference, eqn.invars):
            makers.setdefault(v, []).append(number)
    return makers


def reached(eqns: Sequence[Any], makers: dict[Any, list[int]], outputs: Iterable[Any]) -> set[int]:
    """The equations, by number, that the outputs are made by."""
    found: set[int] = set()
    left = [v for v in outputs if is_variable(v)]
    while left:
        for number in makers.get(left.pop(), ()):
            if number not in found:
                found.add(number)
                eqn = eqns[number]
                left += filter(is_variable, eqn.invars)
                left += filter(is_reference, eqn.outvars)
    return found


def led_to(eqns: Sequence[Any], inputs: Iterable[Any]) -> tuple[set[int], set[Any]]:
    """The equations, by number, that any of these inputs leads to, and the variables."""
    known, found, before = set(inputs), set(), -1
    while len(known) > before:  # again, as an earlier equation may read a reference written later
        before = len(known)
        for number, eqn in enumerate(eqns):
            if any(v in known for v in filter(is_variable, eqn.invars)):
                found.add(number)
                known |= {*eqn.outvars, *filter(is_reference, eqn.invars)}
    return found, known
