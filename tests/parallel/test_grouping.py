"""Dispatch and combine: nothing lost, each other's adjoint, and deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel import grouping
from dsv3_jax.parallel.grouping import gather_rows, num_rows, plan, sum_rows
from tests.helpers import TOLERANCE, relative_error

TOKENS, PER_TOKEN, EXPERTS = 11, 3, 6


def routing(kind):
    if kind == "one_expert_for_all":  # top-1, everyone to expert 4
        return jnp.full((TOKENS, 1), 4)
    if kind == "empty_experts":  # 1 and 3 get nothing
        return jnp.tile(jnp.array([[0, 2, 5], [5, 4, 2]]), (6, 1))[:TOKENS]
    rng = np.random.default_rng(0)
    return jnp.asarray(np.stack([rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(TOKENS)]))


@pytest.mark.parametrize("alignment", [1, 4, 16])
@pytest.mark.parametrize("kind", ["random", "one_expert_for_all", "empty_experts"])
def test_every_entry_has_a_row_of_its_own_in_its_expert_s_group(kind, alignment):
    experts = routing(kind)
    groups, group_sizes, load = plan(experts, EXPERTS, alignment)
    np.testing.assert_array_equal(load, np.bincount(experts.ravel(), minlength=EXPERTS))
    assert not (np.asarray(group_sizes) % alignment).any()
    assert ((group_sizes >= load) & (group_sizes < load + alignment)).all()
    slots, ends = np.asarray(groups.slot_TK), np.cumsum(group_sizes)
    assert len(set(slots.ravel())) == experts.size
    np.testing.assert_array_equal(np.searchsorted(ends, slots, side="right"), experts)
    rows = np.full(len(groups.token_M), TOKENS)
    rows[slots] = np.arange(TOKENS)[:, None]
    np.testing.assert_array_equal(groups.token_M, rows)
    # The order within a group is that of the tokens, whatever the machine.
    for e in range(EXPERTS):
        assert (np.diff(slots[np.asarray(experts) == e]) > 0).all()


@pytest.mark.parametrize("alignment", [1, 3, 8, 128])
@pytest.mark.parametrize("entries, groups", [(1, 5), (5, 5), (33, 6), (64, 2), (7, 100)])
def test_num_rows_is_enough_for_any_routing(entries, groups, alignment):
    have = num_rows(entries, groups, alignment)
    assert have % alignment == 0
    # The worst: as many groups as can be hold one entry over a multiple of the alignment.
    filled = min(groups, entries)
    rest, needed = entries - filled, filled * alignment
    needed += -(-max(rest - filled * (alignment - 1), 0) // alignment) * alignment
    assert have >= needed


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("entries", [None, 5])
def test_few_entries_find_their_rows_as_many_do(entries, alignment, monkeypatch):
    """By comparing, not by a scatter; also where some choices have no row."""
    most = EXPERTS if entries is None else EXPERTS + 1
    experts = jnp.asarray(np.random.default_rng(4).integers(0, most, (4, 2)))
    if entries is not None:
        experts = experts.at[:2, 0].set(EXPERTS).at[2, 1].set(EXPERTS)
    few = plan(experts, EXPERTS, alignment, entries)
    monkeypatch.setattr(grouping, "FEW_ENTRIES", 0)
    many = plan(experts, EXPERTS, alignment, entries)
    jax.tree.map(np.testing.assert_array_equal, few, many)
    assert (np.asarray(few[0].token_M) < 4).sum() == (np.asarray(experts) < EXPERTS).sum()


def test_sum_undoes_gather():
    """With weights 1/K each token comes back as it went."""
    experts = routing("random")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, 5)), jnp.float32)
    groups, _, _ = plan(experts, EXPERTS, 4)
    rows = gather_rows(x, groups)
    padding = np.asarray(groups.token_M) == TOKENS
    assert padding.any() and not np.asarray(rows)[padding].any()
    back = sum_rows(rows, jnp.full(experts.shape, 1 / PER_TOKEN), groups)
    assert relative_error(back, x) < TOLERANCE["f32_op"]


def test_gather_and_sum_are_adjoint():
    """<gather_rows(x), r> = <x, sum_rows(r, 1)>, and each one's derivative is the other."""
    rng = np.random.default_rng(2)
    experts = routing("empty_experts")
    groups, _, _ = plan(experts, EXPERTS, 4)
    x = jnp.asarray(rng.normal(size=(TOKENS, 5)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(len(groups.token_M), 5)), jnp.float32)
    ones = jnp.ones(experts.shape)
    left = jnp.vdot(gather_rows(x, groups), rows)
    right = jnp.vdot(x, sum_rows(rows, ones, groups))
    assert float(left) == pytest.approx(float(right), rel=1e-5)
    (d_x,) = jax.vjp(lambda x: gather_rows(x, groups), x)[1](rows)
    assert relative_error(d_x, sum_rows(rows, ones, groups)) < TOLERANCE["f32_op"]
    (d_rows,) = jax.vjp(lambda r: sum_rows(r, ones, groups), rows)[1](x)
    assert relative_error(d_rows, gather_rows(x, groups)) < TOLERANCE["f32_op"]


def test_gradient_of_the_weights_is_the_row_s_share():
    rng = np.random.default_rng(3)
    experts = routing("random")
    groups, _, _ = plan(experts, EXPERTS, 4)
    rows = jnp.asarray(rng.normal(size=(len(groups.token_M), 5)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=experts.shape), jnp.float32)
    d_y = jnp.asarray(rng.normal(size=(TOKENS, 5)), jnp.float32)
    d_rows, d_weights = jax.vjp(lambda r, w: sum_rows(r, w, groups), rows, weights)[1](d_y)
    want_weights, want_rows = np.zeros(experts.shape), np.zeros(rows.shape)
    for t, k in np.ndindex(experts.shape):
        slot = int(groups.slot_TK[t, k])
        want_weights[t, k] = np.float64(rows[slot]) @ np.float64(d_y[t])
        want_rows[slot] = np.float64(weights[t, k]) * np.float64(d_y[t])
    assert relative_error(d_weights, want_weights) < TOLERANCE["f32_op"]
    assert relative_error(d_rows, want_rows) < TOLERANCE["f32_op"]


def test_plan_is_bitwise_the_same_when_compiled():
    experts = routing("random")
    eager, compiled = (p(experts, EXPERTS, 4) for p in (plan, jax.jit(plan, static_argnums=(1, 2))))
    jax.tree.map(np.testing.assert_array_equal, eager, compiled)
