"""Cases of parametrised tests: a few in every run of the tests, the others with --slow.

`in_every_run` names the few; `matrix` takes a diagonal of all combinations, in which each value of
each axis is met at least once, so that what goes wrong with one value fails in every run, and what
needs a certain pair of values in runs with --slow.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def in_every_run(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """`cases` for `parametrize`; those that are not among `chosen` are marked slow.

    A case is a value, a tuple of values, or a `pytest.param`, which is chosen by its values.
    """
    params = [_param(case) for case in cases]
    wanted = [_param(one).values for one in chosen]
    found = [param.values for param in params]
    if missing := [values for values in wanted if values not in found]:
        raise ValueError(f"{missing} are not among the cases {found}")
    return [param if param.values in wanted else _slow(param) for param in params]


def matrix(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the axes' values; those that are not on the diagonal are marked slow.

    An axis has values, tuples of values, or `pytest.param`s, whose marks their combinations get.
    The diagonal is as long as the longest axis: shorter ones begin again.
    """
    whole = [[_param(value) for value in axis] for axis in axes]
    longest = max(map(len, whole))
    diagonal = {tuple(n % len(axis) for axis in whole) for n in range(longest)}
    cases = []
    for places in product(*(range(len(axis)) for axis in whole)):
        param = _joined([axis[place] for axis, place in zip(whole, places, strict=True)])
        cases.append(param if places in diagonal else _slow(param))
    return cases


def _param(case: Any) -> Any:
    if hasattr(case, "values") and hasattr(case, "marks"):
        return case
    return pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)


def _joined(params: list[Any]) -> Any:
    values = [value for param in params for value in param.values]
    marks = [mark for param in params for mark in param.marks]
    name = None
    if any(param.id for param in params):
        name = "-".join(param.id or "-".join(map(str, param.values)) for param in params)
    return pytest.param(*values, marks=marks, id=name)


def _slow(param: Any) -> Any:
    return pytest.param(*param.values, marks=(*param.marks, pytest.mark.slow), id=param.id)
