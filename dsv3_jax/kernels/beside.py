"""Work that a GPU does beside other work: on a second stream, and not on all multiprocessors.

For what leaves most of a GPU idle while it lasts: rows on their way over NVLink, and the many short
kernels of a plan. XLA starts what `beside` wraps when its operands are there, and waits for it
where its result is read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental import compute_on
from jax.extend.core import Literal, jaxpr_as_fun

from dsv3_jax.kernels import backend

STREAM = "gpu_stream:1"


def beside(function: Callable[..., Any], leaving: int | None) -> Callable[..., Any]:
    """`function` on a stream of its own; its products leave so many multiprocessors to others.

    Needs jax 0.11 or newer, and a GPU. Not to be nested. What function does not read is no operand
    there, and operands that it returns are no results: XLA would write them anew. leaving None:
    the function itself.
    """
    if leaving is None:
        return function

    def placed(*operands):
        given = jax.tree.leaves(operands)
        with backend.leaving(leaving):
            traced, shape = jax.make_jaxpr(function, return_shape=True)(*operands)
        jaxpr = traced.jaxpr
        place = {var: i for i, var in enumerate(jaxpr.invars)}
        uses = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
        read = [i for var, i in place.items() if var in uses]
        made = [not isinstance(var, Literal) and var not in place for var in jaxpr.outvars]

        def run(*some):
            every = dict(zip(read, some, strict=True))
            # Traced before: here, each call of a jitted function would be put on the stream anew.
            results = jaxpr_as_fun(traced)(*(every.get(i) for i in range(len(given))))
            return [x for x, is_made in zip(results, made) if is_made]

        there: Any = partial(compute_on.compute_on, compute_type=STREAM)
        new = iter(there(run, out_memory_spaces=jax.memory.Space.Device)(*(given[i] for i in read)))
        results = [
            next(new) if is_made else var.val if isinstance(var, Literal) else given[place[var]]
            for var, is_made in zip(jaxpr.outvars, made)
        ]
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return placed
