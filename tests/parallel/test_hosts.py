"""How processes find each other: options, SLURM, JobSet; all of it without starting any."""

import socket

import pytest

from dsv3_jax.config import DistributedConfig, RunError, UserError
from dsv3_jax.parallel.hosts import Processes, check_coordinator, find_processes, first_host

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[003-006],other",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "2",
}
JOBSET = {"JOBSET_NAME": "dsv3", "REPLICATED_JOB_NAME": "hosts", "JOB_COMPLETION_INDEX": "3"}


def test_a_run_of_one_process_starts_nothing():
    assert find_processes(DistributedConfig(), {}) is None
    # Inside sbatch but not srun, and an srun of one task.
    assert find_processes(DistributedConfig(), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None
    assert find_processes(DistributedConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_options_alone_are_enough():
    options = DistributedConfig(coordinator="a:1234", num_processes=2, process_id=1)
    assert find_processes(options, {}) == Processes("a:1234", 2, 1)


def test_slurm_says_everything():
    found = find_processes(DistributedConfig(), SLURM)
    assert found == Processes(f"gpu003:{61440 + 70001 % 4096}", 5, 2)


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x5)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,1"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "JAX_LOCAL_DEVICE_IDS": "2,3"}, None),
    ],
)
def test_of_several_tasks_on_a_host_each_takes_one_device(environ, device):
    environ = SLURM | {"SLURM_LOCALID": "3"} | environ
    found = find_processes(DistributedConfig(), environ)
    assert found is not None and found.device == device


def test_options_go_before_the_scheduler():
    options = DistributedConfig(coordinator="login:99")
    assert find_processes(options, SLURM) == Processes("login:99", 5, 2)


def test_jobset_says_all_but_the_number():
    found = find_processes(DistributedConfig(num_processes=4), JOBSET)
    assert found == Processes("dsv3-hosts-0-0.dsv3:55527", 4, 3)
    with pytest.raises(UserError, match=r"needs --distributed\.num-processes as well"):
        find_processes(DistributedConfig(), JOBSET)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("n[001-016]", "n001"),
        ("n[007,010-012],m1", "n007"),
        ("a1,n[001-016]", "a1"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("rack[1-2]-ib,other", "rack1-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"\.num-processes and --distributed\.process-id as well"):
        find_processes(DistributedConfig(coordinator="a:1"), {})
    with pytest.raises(UserError, match=r"process_id=2 must be below distributed\.num_processes=2"):
        find_processes(DistributedConfig("a:1", 2, 2), {})


def test_a_port_in_use_is_told():
    """JAX 0.10 dies of it with a segmentation fault."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"process 0 cannot listen on port {port}: Address alr"):
            check_coordinator(Processes(f"localhost:{port}", 2, 0), 0)
    check_coordinator(Processes(f"localhost:{port}", 2, 0), 0)


def test_a_process_0_that_is_not_there_is_told():
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        RunError, match=f"process 1 of 2 cannot reach process 0 at localhost:{port}"
    ):
        check_coordinator(Processes(f"localhost:{port}", 2, 1), 0.5)


def test_options_that_no_run_has_are_refused():
    wrong = DistributedConfig("host", 0, -1, heartbeat_timeout=0)
    assert len(wrong.problems()) == 4
