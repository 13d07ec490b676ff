"""A backward pass in two parts: the gradient of the input first, that of the weights later.

The pullback of `jax.vjp` is a program from saved numbers and the output's cotangent to all
gradients. What the input's gradient needs of it runs first; the rest, which makes the weights'
gradients, runs later from what was saved and from a few values of the first part: the cotangents of
the products. Nothing is computed twice. (Qi et al., arXiv 2401.10241, split layers by hand.)
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend import core as jcore
from jax.interpreters import partial_eval

from dsv3_jax.parallel.apart import opened, parted
from dsv3_jax.parallel.equations import evaluate, makers_of, program_of, reached


class SplitBackward(NamedTuple):
    """The two parts of a pullback.

    first(*inputs) gives (gradients of the input, early, frontier): early are the gradients of
    weights that the first part makes anyway, by their place among all; the frontier is what
    second(frontier, *kept inputs) needs besides for the others, None in the place of those.
    """

    first: Callable[..., tuple[list[Any], dict[int, Any], list[Any]]]
    second: Callable[..., list[Any]]


def split_backward(
    pullback: Callable[..., tuple[list[Any], list[Any]]],
    *inputs: Any,
    num_weights: int = 0,
    num_kept: int | None = None,
    within: bool = True,
) -> SplitBackward:
    """The parts of pullback(*inputs) -> (gradients of the input, gradients of the weights).

    Both are lists of arrays; `inputs` are arrays or their shapes. What the first num_weights inputs
    alone make is made in both parts, and not handed on. The first num_kept inputs (None: all) are
    there for the second part, too. A weight's gradient that needs no product after the first part
    is made there. Unless `within`, shard_maps and loops are in one piece, in
    the first part if the input's gradient needs any of their results; `apart.opened` says which are
    in any case.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    flat, structure = jax.tree.flatten(shapes)
    counts: list[int] = []

    def flat_pullback(*leaves):
        of_input, of_weights = pullback(*jax.tree.unflatten(structure, leaves))
        counts.append(len(of_input))
        return [*of_input, *of_weights]

    program = program_of(jax.make_jaxpr(flat_pullback)(*flat))
    of_input, of_weights = program.outvars[: counts[0]], program.outvars[counts[0] :]
    bound = program.invars[len(jax.tree.leaves(inputs[:num_weights])) :]
    gone = program.invars[len(jax.tree.leaves(inputs[:num_kept])) :]
    if within:
        program = opened(program, of_input, bound)
    first, second, frontier, early = parted(program, of_input, of_weights, bound, gone)
    of_first, of_second = program.only(first), program.only(second)

    def run_first(*inputs):
        known = dict(zip(program.invars, jax.tree.leaves(inputs)))
        wanted = [*of_input, *(of_weights[i] for i in early), *frontier]
        values = evaluate(of_first, known, wanted)
        gradients, rest = values[: len(of_input)], values[len(of_input) :]
        return gradients, dict(zip(early, rest)), rest[len(early) :]

    def run_second(frontier_values, *kept):
        known = dict(zip(program.invars, jax.tree.leaves(kept)))
        known |= zip(frontier, frontier_values)
        late = [v for i, v in enumerate(of_weights) if i not in early]
        values = iter(evaluate(of_second, known, late))
        return [None if i in early else next(values) for i in range(len(of_weights))]

    return SplitBackward(run_first, run_second)


def made_of_first(
    closed: Any, count: int, outputs: Iterable[int]
) -> tuple[list[int], Callable[..., list[Any]]]:
    """Which of these outputs the first `count` inputs alone make, and a function that makes them.

    closed: a closed jaxpr. The function takes those inputs, and gives its outputs in their order.
    """
    jaxpr, makers = closed.jaxpr, makers_of(closed.jaxpr.eqns)

    def part_for(wanted: list[Any]) -> tuple[Any, bool]:
        numbers = sorted(reached(jaxpr.eqns, makers, wanted))
        part = jaxpr.replace(eqns=[jaxpr.eqns[n] for n in numbers], outvars=wanted)
        # Calls, too, lose what does not lead there. What is left of the inputs keeps its order.
        part, used = partial_eval.dce_jaxpr(part, [True] * len(wanted))
        return part, not any(used[count:])

    places = [i for i in outputs if part_for([jaxpr.outvars[i]])[1]]
    wanted = [jaxpr.outvars[i] for i in places]
    part = part_for(wanted)[0].replace(invars=jaxpr.invars[:count])
    return places, jcore.jaxpr_as_fun(jcore.ClosedJaxpr(part, closed.consts))
