"""Several processes as one program: they find each other, agree before step 0, and end together.

Plain multi-controller JAX: every host runs the same command, with one process that sees all devices
of the host or with one for each of them; jitted programs run on all devices. With one process in
all, all of this does nothing.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import DistributedConfig, RunError, UserError, by_name
from dsv3_jax.parallel import peers

log = logging.getLogger(__name__)

# Where JobSet does not say one; that of jax's own Kubernetes start-up.
JOBSET_PORT = 55527


class Processes(NamedTuple):
    """The processes of a run, and which of them this one is."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    device: int | None = None  # the only one of the host's that is this process's; None: all


def find_processes(options: DistributedConfig, environ: Mapping[str, str]) -> Processes | None:
    """The processes of this run, by the options and then the scheduler; None for a run of one.

    SLURM: the tasks of an srun step. JobSet: the pods of an indexed Job, by the variables that
    launch/jobset.yaml sets. Raises UserError for a part that neither sets.
    """
    told = {"coordinator": options.coordinator, "num_processes": options.num_processes}
    told |= {"process_id": options.process_id}
    found: dict[str, Any] = {name: None for name in told}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # A port of the job's own in the ephemeral range, as several jobs may share a host.
        port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
        found = {
            "coordinator": f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
            "num_processes": int(environ["SLURM_STEP_NUM_TASKS"]),
            "process_id": int(environ["SLURM_PROCID"]),
        }
    elif "JOBSET_NAME" in environ:
        name, job = environ["JOBSET_NAME"], environ["REPLICATED_JOB_NAME"]
        found["coordinator"] = f"{name}-{job}-0-0.{name}:{JOBSET_PORT}"
        found["process_id"] = int(environ["JOB_COMPLETION_INDEX"])
    elif not any(value is not None for value in told.values()):
        return None
    known = {name: found[name] if told[name] is None else told[name] for name in told}
    if missing := [name.replace("_", "-") for name, value in known.items() if value is None]:
        raise UserError(
            "a run on several hosts needs "
            + " and ".join(f"--distributed.{name}" for name in missing)
            + " as well: no scheduler sets it"
        )
    if known["process_id"] >= known["num_processes"]:
        raise UserError(
            f"distributed.process_id={known['process_id']} must be below "
            f"distributed.num_processes={known['num_processes']}"
        )
    index = known["process_id"]
    return Processes(known["coordinator"], known["num_processes"], index, own_device(environ))


def own_device(environ: Mapping[str, str]) -> int | None:
    """The device that SLURM means for this task; None when it may have all that it sees.

    Of several tasks on a host each takes one, as jax's own start-up has it, unless each sees only
    one anyway or JAX_LOCAL_DEVICE_IDS says which.
    """
    of_hosts = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")  # "8(x2),4"
    several = any(int(tasks.partition("(")[0]) > 1 for tasks in of_hosts)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    bound = visible is not None and "," not in visible
    if not several or bound or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    return int(environ["SLURM_LOCALID"])


def first_host(node_list: str) -> str:
    """The first of SLURM's node list: a1 of "a1,b2", a001 of "a[001-016,020],b2"."""
    prefix, bracket, rest = node_list.partition("[")
    if not bracket or "," in prefix:
        return prefix.partition(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.replace("-", ",").partition(",")[0] + suffix.partition(",")[0]


def start(options: DistributedConfig) -> None:
    """Joins the run's other processes; to be called before JAX looks for devices.

    Returns once all are there. Raises RunError when process 0 cannot be reached in time, or cannot
    listen; when another process does not come, JAX ends those that wait, with its own message.
    """
    processes = find_processes(options, os.environ)
    if processes is None or processes.count == 1:
        return
    check_coordinator(processes, options.start_timeout)
    # SIGTERM is handled by training/stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=processes.coordinator,
        num_processes=processes.count,
        process_id=processes.index,
        local_device_ids=processes.device,
        cluster_detection_method="deactivate",
        initialization_timeout=options.start_timeout,
        heartbeat_timeout_seconds=options.heartbeat_timeout,
    )
    peers.watch(processes.coordinator)


def check_coordinator(processes: Processes, timeout: float) -> None:
    """Raises RunError where JAX would end the process without a word about why.

    That is when process 0 finds its port in use, or another cannot reach it for `timeout` seconds.
    """
    host, _, port = processes.coordinator.rpartition(":")
    if processes.index == 0:
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", int(port)))
        except OSError as error:
            raise RunError(f"process 0 cannot listen on port {port}: {error.strerror}") from error
        return
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(timeout, 1)).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise RunError(
                    f"process {processes.index} of {processes.count} cannot reach process 0 at "
                    f"{processes.coordinator} for {timeout:g} s: {error.strerror or error}"
                ) from error
            time.sleep(0.2)


@functools.cache
def host_of_each_process() -> list[str]:
    """By process, the name of its host, with what tells apart hosts of one name.

    That is the kernel's boot id, as for NCCL (getHostHash).
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    mine = f"{socket.gethostname()} {boot_id.read_text().strip() if boot_id.exists() else ''}"
    return _gather_texts(mine) if jax.process_count() > 1 else [mine]


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Inside, what any process but the first prints is lost; all of them would say the same."""
    with contextlib.ExitStack() as stack:
        if jax.process_index():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def file_name(name: str) -> str:
    """The name of this process's own file: log.txt of process 0, log.3.txt of process 3."""
    stem, dot, suffix = name.rpartition(".")
    index = jax.process_index()
    return f"{stem}.{index}{dot}{suffix}" if index else name


def check_agreement(options: Any, **facts: str) -> None:
    """Raises UserError, on every process, when one has other options than process 0.

    `options` is a dataclass, whose `distributed` may differ.

    So may not `facts` (a hash of the data), the version of JAX and the number of devices.
    """
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            "every process must have as many devices as the others: "
            + ", ".join(f"process {i} has {n}" for i, n in sorted(devices.items()))
        )
    ours = dataclasses.asdict(options) | {"distributed": None, "jax": jax.__version__} | facts
    said = [json.loads(text) for text in _gather_texts(json.dumps(ours, default=str))]
    first = by_name(said[0])
    wrong = []
    for index, theirs in enumerate(map(by_name, said)):
        for name in sorted(first.keys() | theirs.keys()):
            has, wants = theirs.get(name, "absent"), first.get(name, "absent")
            if has != wants:
                wrong.append(f"{name} is {has} on process {index}, {wants} on process 0")
    if wrong:
        raise UserError("the processes do not agree:\n  " + "\n  ".join(wrong))


class LargestOfAll:
    """The largest number that any process gave, learnt one call late so that no device waits.

    Every process calls it equally often, between the same steps.
    """

    def __init__(self) -> None:
        # Axis types as everywhere: the default would be Explicit.
        mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
        self._given = NamedSharding(mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """The largest number of the call before; 0 at the first."""
        shape = (len(jax.devices()),)
        values = jax.make_array_from_callback(
            shape, self._given, lambda index: np.full(shape, number, np.int32)[index]
        )
        before, self._last = self._last, self._largest(values)
        return 0 if before is None else int(before)


def leave(code: int) -> NoReturn:
    """Ends a process that has failed; one of several does not wait for the others.

    At a normal exit JAX waits for all processes, for minutes, while they may wait for this one.
    Process 0, whose end ends the others, goes last: they may have the same to say.
    """
    if jax.distributed.is_initialized():
        peers.say_goodbye(failed=code != 0)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(2)
        os._exit(code)
    sys.exit(code)


def _gather_texts(text: str) -> list[str]:
    """The text of every process, on every process."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(mine))))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
