"""32 devices, 8 nodes of 4: a token crosses to a node once. In a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a process with 32 devices
ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).parent / "count_copies.py"


@pytest.fixture(scope="module")
def counted():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plans_cross_to_each_node_at_most_once(counted):
    """8 groups, at most 4 nodes, 8 experts a token: remote copies a token."""
    hierarchical, flat = counted["hierarchical"]["copies"], counted["flat"]["copies"]
    assert hierarchical == pytest.approx(counted["distinct_remote_nodes"], abs=1e-6)
    assert hierarchical <= 3.6
    assert flat == pytest.approx(counted["distinct_remote_devices"], abs=1e-6)
    assert 6.1 < flat < 6.5
    assert counted["remote_experts"] == pytest.approx(7.0, abs=0.1)


def test_the_lowered_program_moves_what_the_plan_says(counted):
    """Buffers for an even load: 7/8 of 4 rows a token between nodes, and 28/32 of 8 when flat."""
    assert counted["hierarchical"]["lowered_copies"] == pytest.approx(3.5, rel=0.02)
    assert counted["flat"]["lowered_copies"] == pytest.approx(7.0, rel=0.02)


def test_no_data_spans_both_axes(counted):
    spans = {"+".join(axes) for axes in counted["hierarchical"]["axes"]}
    assert spans == {"node", "local"}
    assert counted["flat"]["axes"] == [["node", "local"]]


def test_replicas_bring_a_token_to_no_further_node(counted):
    """Where they keep to the nodes of their groups, and where a plan puts them anywhere."""
    hierarchical, everywhere = counted["replicas"]["hierarchical"], counted["replicas"]["global"]
    assert hierarchical["near"]["copies"] == hierarchical["without"]["copies"] <= 3.6
    assert everywhere["near"]["copies"] < everywhere["without"]["copies"]
    assert everywhere["near"]["copies"] < 0.93 * everywhere["any"]["copies"]
    for plan in (hierarchical, everywhere):  # and devices are as busy as when taken in turn
        assert plan["near"]["busiest"] < 1.05 * plan["any"]["busiest"]


def test_values_and_gradients_are_the_same_on_32_devices(counted):
    assert counted["hierarchical"]["distance"] < 1e-6
    assert counted["flat"]["distance"] < 1e-6
