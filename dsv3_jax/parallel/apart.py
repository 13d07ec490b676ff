"""A program of two kinds of results in two parts: what one kind needs runs first, the rest later.

What the first part made and the second one reads is handed on, the frontier; in the place of a
reshaped or widened array, what it was made of. Nothing else is computed twice but what free inputs
alone make. `opened` takes equations with a body apart before: a `shard_map` of which the first part
needs some results becomes two over the same devices, a while loop two that turn as often.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.equations import (
    Equation,
    Program,
    Value,
    evaluate,
    is_reference,
    is_variable,
    led_to,
    makers_of,
    program_of,
    reached,
    scoped,
    variables,
)

# What is made again from what it reads, and not handed on.
_VIEWS = (
    *("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type"),
    *("pvary", "sharding_constraint"),
)
# Whose results may be alike on devices whose operands are not, as their types say.
_AGREEING = ("psum", "pmax", "pmin", "all_gather", "while", "scan", "cond", "custom_", "opt")


class Parts(NamedTuple):
    """Equations of the two parts by number, and what the first hands on to the second.

    early: which results of the second kind, by place, the first part makes: those that need no
    product and no input besides; but no views of inputs, which take room and no time.
    """

    first: list[int]
    second: list[int]
    frontier: list[Value]
    early: list[int]


def parted(
    program: Program,
    of_first: Iterable[Any],
    of_second: list[Any],
    bound: Iterable[Any],
    gone: Sequence[Value] = (),
) -> Parts:
    """The parts of a program of two kinds of results.

    Inputs that are not `bound` are free: what they alone make is made in both parts. Inputs that
    are `gone` are handed on where the second part reads them.
    """
    eqns, makers = program.eqns, makers_of(program.eqns)
    first, inputs = reached(eqns, makers, of_first), set(program.invars) & set(bound)

    def read(numbers: Iterable[int]) -> set[Value]:
        return variables(v for n in numbers for v in eqns[n].invars)

    def is_made(v) -> bool:
        of_it = reached(eqns, makers, [v])
        besides = of_it - first
        if any(eqns[n].is_product for n in besides) or all(_is_view(eqns[n]) for n in of_it):
            return not of_it
        return not (read(besides) - read(first)) & inputs

    early = [i for i, v in enumerate(of_second) if is_made(v)]
    first |= reached(eqns, makers, [of_second[i] for i in early])
    late = [v for i, v in enumerate(of_second) if i not in early]
    in_first_alone = first & led_to(eqns, bound)[0]
    second = reached(eqns, makers, late) - in_first_alone

    def handed_on() -> list[Value]:
        wanted = read(second) | variables(late)
        made = [v for n in sorted(in_first_alone - second) for v in eqns[n].outvars]
        return [v for v in (*gone, *made) if v in wanted]

    while views := {n for v in handed_on() for n in makers.get(v, ()) if _is_view(eqns[n])}:
        second |= views
    return Parts(sorted(first), sorted(second), handed_on(), early)


def _is_view(eqn: Equation) -> bool:
    """Whether this only says otherwise what it reads, in no fewer bytes."""
    if eqn.primitive not in _VIEWS:
        return False
    read, made = eqn.invars[0].aval, eqn.outvars[0].aval
    return read.size * read.dtype.itemsize <= made.size * made.dtype.itemsize


def opened(
    program: Program, of_first: Iterable[Any], bound: Iterable[Any], nested: bool = False
) -> Program:
    """The program with a pair in the place of each equation that `parted` would have in one piece.

    A shard_map in one is not taken apart (nested).
    """
    _, bound = led_to(program.eqns, bound)
    wanted = variables(of_first)
    used = variables(v for eqn in program.eqns for v in eqn.invars) | variables(program.outvars)
    eqns: list[Equation] = []
    for eqn in reversed(program.eqns):
        first = [i for i, v in enumerate(eqn.outvars) if v in wanted]
        rest = [i for i, v in enumerate(eqn.outvars) if v in used and v not in wanted]
        pieces = [eqn]
        if first and rest and not any(map(is_reference, eqn.invars)):
            if eqn.primitive == "shard_map" and not nested:
                pieces = _shard_maps(eqn, first, rest, bound)
            elif eqn.primitive == "while":
                pieces = _loops(eqn, first, rest, bound)
        if first or any(v in wanted for v in filter(is_reference, eqn.invars)):
            wanted |= variables(pieces[0].invars)
        eqns += reversed(pieces)
    return program._replace(eqns=eqns[::-1])


def _shard_maps(
    eqn: Equation, first: list[int], rest: list[int], bound: set[Any]
) -> list[Equation]:
    """Two shard_maps for one, unless the second would multiply nothing.

    A device's own of what is handed on crosses as a slice of an array that lies on all axes along
    which it differs.
    """
    body = program_of(eqn.params["jaxpr"])
    outer = dict(zip(body.invars, eqn.invars))
    of_first, of_rest = ([body.outvars[i] for i in numbers] for numbers in (first, rest))
    inner_bound = [v for v, atom in outer.items() if is_variable(atom) and atom in bound]
    body = opened(body, of_first, inner_bound, nested=True)
    parts = parted(body, of_first, of_rest, inner_bound)
    if len(parts.early) == len(rest):
        return [eqn]
    axes = _axes_of(body, eqn.params)
    handed = {v: (Value(None), axes[v]) for v in parts.frontier}
    first = sorted([*first, *(rest[i] for i in parts.early)])
    late = [i for i in rest if i not in first]
    return [
        _shard_map(eqn, body.only(parts.first), first, {}, handed),
        _shard_map(eqn, body.only(parts.second), late, handed, {}),
    ]


def _shard_map(
    eqn: Equation,
    body: Program,
    results: list[int],
    arriving: dict[Value, tuple[Value, tuple[str, ...]]],
    leaving: dict[Value, tuple[Value, tuple[str, ...]]],
) -> Equation:
    """The shard_map of this body, with these of the results and what is handed on.

    arriving, leaving: what a Value of the body is outside, and the axes that it lies on there.
    """
    params, wanted = eqn.params, [body.outvars[i] for i in results]
    read = _read_by(body, [*wanted, *leaving])
    used = [i for i, v in enumerate(body.invars) if v in read]

    def cuts(handed) -> list[PartitionSpec]:
        return [PartitionSpec(axes) for _, axes in handed.values()]

    def of_device(*operands):
        known = dict(zip([body.invars[i] for i in used], operands))
        slices = zip(arriving, operands[len(used) :])
        known |= {v: lax.squeeze(piece, (0,)) for v, piece in slices}
        values = evaluate(body, known, [*wanted, *leaving])
        alone, handed = values[: len(wanted)], values[len(wanted) :]
        if params["check_vma"]:
            handed = [vary(x, axes) for x, (_, axes) in zip(handed, leaving.values())]
        return [*alone, *(lax.expand_dims(x, (0,)) for x in handed)]

    def run(*operands):
        mapped = jax.shard_map(
            of_device,
            mesh=params["mesh"],
            in_specs=(*(params["in_specs"][i] for i in used), *cuts(arriving)),
            out_specs=[*(params["out_specs"][i] for i in results), *cuts(leaving)],
            axis_names=params["newly_manual_axes"],
            check_vma=params["check_vma"],
        )
        with scoped(eqn.scope):
            return mapped(*operands)

    invars = [*(eqn.invars[i] for i in used), *(v for v, _ in arriving.values())]
    outvars = [*(eqn.outvars[i] for i in results), *(v for v, _ in leaving.values())]
    return Equation(invars, outvars, run, is_product=True)


def _axes_of(body: Program, params: dict[str, Any]) -> dict[Value, tuple[str, ...]]:
    """The axes of a shard_map along which devices may hold different numbers of each Value.

    A type may say less: `plgpu.kernel`'s results (jax 0.11) have to be marked as different first
    (`kernels.manual`), and what is handed on may not be yet.
    """
    manual = [axis for axis in params["mesh"].axis_names if axis in params["newly_manual_axes"]]
    differ: dict[Value, set[str]] = {}

    def typed(v: Value) -> set[str]:
        if not params["check_vma"]:
            return set(manual)
        typed = getattr(v.aval, "manual_axis_type", None)
        return set(typed.varying) if typed is not None else set()

    for v in (*body.invars, *body.constants):
        differ[v] = typed(v)
    for eqn in body.eqns:
        read = set[str]().union(*(differ[v] for v in variables(eqn.invars)))
        agree = not eqn.primitive or eqn.primitive.startswith(_AGREEING)
        differ |= {v: typed(v) | (set() if agree else read) for v in eqn.outvars}
        for v in filter(is_reference, eqn.invars):
            differ[v] |= read
    return {v: tuple(a for a in manual if a in axes) for v, axes in differ.items()}


def _loops(eqn: Equation, first: list[int], rest: list[int], bound: set[Any]) -> list[Equation]:
    """Two while loops for one, each of what its results need from turn to turn.

    Not if products would be made twice in every program: only where a loop goes on from what was
    made before it, as that of further rounds, which mostly makes no turn.
    """
    count = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    starts = eqn.invars[count:]
    condition, body = (program_of(eqn.params[f"{name}_jaxpr"]) for name in ("cond", "body"))
    of_first, carried = _carried(eqn, condition, body, first)
    late = [i for i in rest if i not in carried]
    if not late:
        return [eqn]
    of_rest, carried_later = _carried(eqn, condition, body, late)
    goes_on = all(is_variable(starts[i]) and starts[i] in bound for i in late)
    if _products(of_first) & _products(of_rest) and not goes_on:
        return [eqn]
    return [
        _loop(eqn, condition, of_first, carried, carried),
        _loop(eqn, condition, of_rest, carried_later, late),
    ]


def _products(program: Program) -> set[Value]:
    return {v for eqn in program.eqns if eqn.is_product for v in eqn.outvars}


def _carried(
    eqn: Equation, condition: Program, body: Program, results: list[int]
) -> tuple[Program, list[int]]:
    """(the body with what these results need alone, and what is carried for them, by number)."""
    of_condition = condition.invars[eqn.params["cond_nconsts"] :]
    of_body = body.invars[eqn.params["body_nconsts"] :]
    read = _read_by(condition, condition.outvars)
    carried, before = {i for i, v in enumerate(of_condition) if v in read} | set(results), set()
    while carried != before:
        wanted, before = [body.outvars[i] for i in sorted(carried)], set(carried)
        left = opened(body, wanted, body.invars, nested=True)
        numbers = reached(left.eqns, makers_of(left.eqns), wanted)
        left = left.only(numbers)._replace(outvars=wanted)
        read = _read_by(left, wanted)
        carried |= {i for i, v in enumerate(of_body) if v in read}
    return left, sorted(carried)


def _loop(
    eqn: Equation, condition: Program, body: Program, carried: list[int], results: list[int]
) -> Equation:
    """The loop of this body, with these of what it carries as results."""
    num_tested, num_constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    read = _read_by(body, body.outvars)
    used = [i for i, v in enumerate(body.invars[:num_constants]) if v in read]

    def run(*operands):
        tested = dict(zip(condition.invars, operands[:num_tested]))
        constants = dict(zip([body.invars[i] for i in used], operands[num_tested:]))

        def test(carry):
            now = dict(zip([condition.invars[num_tested + i] for i in carried], carry))
            return evaluate(condition, tested | now, condition.outvars)[0]

        def turn(carry):
            now = dict(zip([body.invars[num_constants + i] for i in carried], carry))
            return evaluate(body, constants | now, body.outvars)

        with scoped(eqn.scope):
            last = lax.while_loop(test, turn, list(operands[num_tested + len(used) :]))
        return [value for i, value in zip(carried, last) if i in results]

    constants = eqn.invars[num_tested : num_tested + num_constants]
    starts = eqn.invars[num_tested + num_constants :]
    invars = [*eqn.invars[:num_tested], *(constants[i] for i in used)]
    return Equation(
        [*invars, *(starts[i] for i in carried)],
        [eqn.outvars[i] for i in results],
        run,
        is_product=True,
    )


def _read_by(program: Program, wanted: Iterable[Any]) -> set[Value]:
    """What a program's equations read, and what is wanted of it."""
    return variables(v for eqn in program.eqns for v in eqn.invars) | variables(wanted)
