"""A backward pass in two parts: the gradient of the input first, that of the weights later.

The pullback of `jax.vjp` is a program from saved numbers and the output's cotangent to all
gradients. What the input's gradient needs of it runs first; the rest, which makes the weights'
gradients, runs later from what was saved and from a few values of the first part: the cotangents of
the products. Nothing is computed twice. (Qi et al., arXiv 2401.10241, split layers by hand.)
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend import core as jcore
from jax.interpreters import partial_eval
from jax.ref import AbstractRef

# Calls whose body is taken apart, too.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint")


class SplitBackward(NamedTuple):
    """The two parts of a pullback.

    first(*inputs) gives (gradients of the input, early, frontier): early are the gradients of
    weights that the first part makes anyway, by their place among all; the frontier is what
    second(frontier, *inputs) needs besides the inputs for the others, None in the place of those.
    """

    first: Callable[..., tuple[list[Any], dict[int, Any], list[Any]]]
    second: Callable[..., list[Any]]


def split_backward(
    pullback: Callable[..., tuple[list[Any], list[Any]]], *inputs: Any, num_weights: int = 0
) -> SplitBackward:
    """The parts of pullback(*inputs) -> (gradients of the input, gradients of the weights).

    Both are lists of arrays; `inputs` are arrays or their shapes. A call that cannot be taken
    apart, such as a shard_map, is in the first part as a whole if the input's gradient needs it.
    What the first num_weights inputs alone make is made in both parts, and not handed on.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    flat, structure = jax.tree.flatten(shapes)
    counts: list[int] = []

    def flat_pullback(*leaves):
        of_input, of_weights = pullback(*jax.tree.unflatten(structure, leaves))
        counts.append(len(of_input))
        return [*of_input, *of_weights]

    closed = _inlined(jax.make_jaxpr(flat_pullback)(*flat), flat)
    jaxpr, makers = closed.jaxpr, _makers(closed.jaxpr)
    of_input, of_weights = jaxpr.outvars[: counts[0]], jaxpr.outvars[counts[0] :]
    first = _reached(jaxpr, makers, of_input)
    num_leaves = len(jax.tree.leaves(inputs[:num_weights]))
    in_both = first - _led_to(jaxpr, set(jaxpr.invars[num_leaves:])) if num_weights else set()
    early = [i for i, v in enumerate(of_weights) if not _reached(jaxpr, makers, [v]) - first]
    late = [v for i, v in enumerate(of_weights) if i not in early]
    second = _reached(jaxpr, makers, late) - (first - in_both)
    made_first = {v for number in first - in_both for v in jaxpr.eqns[number].outvars}
    used = [v for number in sorted(second) for v in jaxpr.eqns[number].invars]
    frontier = [v for v in dict.fromkeys(filter(_is_variable, [*used, *late])) if v in made_first]

    def run_first(*inputs):
        wanted = [*of_input, *(of_weights[i] for i in early), *frontier]
        values = _run(closed, sorted(first), jax.tree.leaves(inputs), {}, wanted)
        gradients, rest = values[: len(of_input)], values[len(of_input) :]
        return gradients, dict(zip(early, rest)), rest[len(early) :]

    def run_second(frontier_values, *inputs):
        known = dict(zip(frontier, frontier_values))
        values = iter(_run(closed, sorted(second), jax.tree.leaves(inputs), known, late))
        return [None if i in early else next(values) for i in range(len(of_weights))]

    return SplitBackward(run_first, run_second)


def made_of_first(
    closed: Any, count: int, outputs: Iterable[int]
) -> tuple[list[int], Callable[..., list[Any]]]:
    """Which of these outputs the first `count` inputs alone make, and a function that makes them.

    closed: a closed jaxpr. The function takes those inputs, and gives its outputs in their order.
    """
    jaxpr, makers = closed.jaxpr, _makers(closed.jaxpr)

    def part_for(wanted: list[Any]) -> tuple[Any, bool]:
        numbers = sorted(_reached(jaxpr, makers, wanted))
        part = jaxpr.replace(eqns=[jaxpr.eqns[n] for n in numbers], outvars=wanted)
        # Calls, too, lose what does not lead there. What is left of the inputs keeps its order.
        part, used = partial_eval.dce_jaxpr(part, [True] * len(wanted))
        return part, not any(used[count:])

    places = [i for i in outputs if part_for([jaxpr.outvars[i]])[1]]
    wanted = [jaxpr.outvars[i] for i in places]
    part = jcore.ClosedJaxpr(
        part_for(wanted)[0].replace(invars=jaxpr.invars[:count]), closed.consts
    )

    def make(*inputs):
        return _run(part, range(len(part.jaxpr.eqns)), inputs, {}, part.jaxpr.outvars)

    return places, make


def _is_variable(atom: Any) -> bool:
    return isinstance(atom, jcore.Var)


def _makers(jaxpr: Any) -> dict[Any, list[int]]:
    """The equations, by number, that make each variable.

    Those of a reference are all that touch it: a kernel that writes to it has no other result, and
    what it holds cannot be handed from one part to the other.
    """
    makers: dict[Any, list[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for v in eqn.outvars:
            makers.setdefault(v, []).append(number)
        for v in filter(_is_reference, eqn.invars):
            makers.setdefault(v, []).append(number)
    return makers


def _is_reference(atom: Any) -> bool:
    return _is_variable(atom) and isinstance(atom.aval, AbstractRef)


def _reached(jaxpr: Any, makers: dict[Any, list[int]], outputs: Iterable[Any]) -> set[int]:
    """The equations, by number, that the outputs are made by."""
    found: set[int] = set()
    left = [v for v in outputs if _is_variable(v)]
    while left:
        for number in makers.get(left.pop(), ()):
            if number not in found:
                found.add(number)
                eqn = jaxpr.eqns[number]
                left += filter(_is_variable, eqn.invars)
                left += filter(_is_reference, eqn.outvars)
    return found


def _led_to(jaxpr: Any, inputs: set[Any]) -> set[int]:
    """The equations, by number, that any of these inputs leads to."""
    known, found, before = set(inputs), set(), -1
    while len(known) > before:  # again, as an earlier equation may read a reference written later
        before = len(known)
        for number, eqn in enumerate(jaxpr.eqns):
            if any(v in known for v in filter(_is_variable, eqn.invars)):
                found.add(number)
                known |= {*eqn.outvars, *filter(_is_reference, eqn.invars)}
    return found


def _run(closed: Any, numbers: Iterable[int], inputs, known: dict[Any, Any], wanted) -> list[Any]:
    """The wanted variables after these equations."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts))
    values |= dict(zip(closed.jaxpr.invars, inputs)) | known
    for number in numbers:
        eqn = closed.jaxpr.eqns[number]
        values |= zip(eqn.outvars, _bind(eqn, [_read(values, atom) for atom in eqn.invars]))
    return [_read(values, atom) for atom in wanted]


def _read(values: dict[Any, Any], atom: Any) -> Any:
    return values[atom] if _is_variable(atom) else atom.val


def _bind(eqn: Any, operands: list[Any]) -> list[Any]:
    parameters = eqn.primitive.get_bind_params(eqn.params)
    with _scope(eqn):  # else a compiled program says nothing of where its operations come from
        results = eqn.primitive.bind(*operands, **parameters)
    return list(results) if eqn.primitive.multiple_results else [results]


def _scope(eqn: Any) -> Any:
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _inlined(closed: Any, shapes: list[Any]) -> Any:
    """The same program without calls that only wrap a body."""

    def evaluate(jaxpr, consts, operands):
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, operands))
        for eqn in jaxpr.eqns:
            inputs = [_read(values, atom) for atom in eqn.invars]
            if eqn.primitive.name in _CALLS:
                body = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                is_closed = isinstance(body, jcore.ClosedJaxpr)
                inner = (body.jaxpr, body.consts) if is_closed else (body, ())
                with _scope(eqn):
                    outputs = evaluate(*inner, inputs)
            else:
                outputs = _bind(eqn, inputs)
            values |= zip(eqn.outvars, outputs)
        return [_read(values, atom) for atom in jaxpr.outvars]

    return jax.make_jaxpr(lambda *leaves: evaluate(closed.jaxpr, closed.consts, leaves))(*shapes)
