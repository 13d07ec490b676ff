"""Which cases of a parametrised test are in every run, and which are slow."""

import pytest

from tests.cases import in_every_run, matrix


def quick(params):
    """The values of those that are not marked slow."""
    return [p.values for p in params if not any(mark.name == "slow" for mark in p.marks)]


def test_only_what_is_chosen_is_in_every_run():
    assert quick(in_every_run(["a", "b", "c"], "b")) == [("b",)]
    pairs = in_every_run([("a", 1), pytest.param("b", 2, id="of a name")], ("a", 1))
    assert quick(pairs) == [("a", 1)] and pairs[1].id == "of a name"


def test_a_choice_that_is_no_case_is_refused():
    with pytest.raises(ValueError, match=r"\('d',\)\] are not among the cases"):
        in_every_run(["a", "b"], "d")


def test_a_matrix_is_whole_and_its_diagonal_has_every_value():
    axes = [1, 2, 3], [("a", "A"), "b"], [pytest.param(True, marks=pytest.mark.misuse), False]
    params = matrix(*axes)
    assert len(params) == len({param.values for param in params}) == 12
    assert quick(params) == [(1, "a", "A", True), (2, "b", False), (3, "a", "A", True)]
    misused = [p.values for p in params if any(mark.name == "misuse" for mark in p.marks)]
    assert len(misused) == 6 and all(values[-1] for values in misused)


def test_a_matrix_joins_names():
    named = [pytest.param((2, 3), id="wide"), pytest.param((4,), id="flat")]
    assert [param.id for param in matrix(["a"], named)] == ["a-wide", "a-flat"]
