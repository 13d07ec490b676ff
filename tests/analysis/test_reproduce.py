"""Every recomputed row of the papers' tables and figure shapes lies within its tolerance."""

import dataclasses

import pytest

from dsv3_jax.analysis import reproduce


@pytest.fixture(scope="module")
def rows():
    return reproduce.rows()


def test_every_row_is_within_its_tolerance(rows):
    assert [f"{r.table}: {r.name}: {r.paper} {r.ours}" for r in rows if not r.ok] == []


def test_every_table_of_the_paper_is_covered(rows):
    tables = {r.table for r in rows}
    assert {f"ISCA table {n}" for n in range(1, 6)} <= tables
    assert {f"ISCA figure {n}" for n in range(5, 9)} <= tables
    assert "V3 table 2" in tables and len(rows) > 70


def test_what_is_left_out_says_why_and_is_not_compared(rows):
    compared = {(r.table, r.name) for r in rows}
    for left_out in reproduce.LEFT_OUT:
        assert len(left_out.reason) > 20
        assert (left_out.table, left_out.name) not in compared


def test_a_wrong_value_is_off(rows):
    for row in rows:
        assert not dataclasses.replace(row, ours=row.ours * 1.2 + 0.1).ok
