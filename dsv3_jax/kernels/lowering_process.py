"""Kernels lowered and compiled side by side, in processes of their own: Mosaic's Python holds the
interpreter, and its compiler a lock.

A process is asked for all kernels of one call of a function (`lowered.within`). It traces the call
for the same device with the same settings, and `lowered.py` leaves what it lowers in the folder,
where the process that asked looks for its names: what was lowered under another name is not found,
and is lowered here. When nothing is left to lower, kernels are compiled (`priming.py`). It sees no
GPU.
"""

import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax

AT_LEAST = 8  # cores; on fewer, processes that start take what they give
AT_MOST = 8  # processes
WORKER = "dsv3_jax.kernels.lowering_worker"  # what a process runs
IDLE = 20.0  # seconds after which a process that nothing is asked of ends
_DEVICE = ("platform", "device_kind", "compute_capability", "num_cores", "core_count")


@dataclass(frozen=True)
class Array:
    """The type of an array, or of a reference to one."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool
    is_ref: bool


@dataclass(frozen=True)
class Request:
    """A call as another process makes it: the function by name, arrays by their types.

    Fields:
        device: attributes of the device that it is for.
        left: multiprocessors that are left to others.
        settings: of JAX.
        folder: where kernels are left.
    """

    module: str
    function: str
    arguments: tuple[Any, dict[str, Any]]
    device: dict[str, Any]
    left: int
    settings: dict[str, Any]
    folder: str


class Device:
    """The device of a request: it has the attributes that are told, and no others."""

    def __init__(self, attributes: dict[str, Any]):
        self.__dict__.update(attributes)


def request(function: Any, device: Any, left: int, arguments: Any, folder: Path) -> bytes | None:
    """The request for the kernels of function(*arguments[0], **arguments[1]); None where it cannot
    be written down."""
    from dsv3_jax.kernels import lowered_name

    names = {name: getattr(device, name) for name in _DEVICE if hasattr(device, name)}
    names = {name: x for name, x in names.items() if isinstance(x, str | int)}
    args = jax.tree.map(_struct, arguments)
    told = Request(
        function.__module__,
        function.__qualname__,
        args,
        names,
        left,
        dict(lowered_name.settings()),
        str(folder.parent),
    )
    try:
        return pickle.dumps(told)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _struct(leaf: Any) -> Any:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return Array(tuple(leaf.shape), leaf.dtype, weak, isinstance(leaf, jax.Ref))


class Processes:
    """Up to `count` processes that do what is asked for; they end when nothing is for a while, and
    with this one."""

    def __init__(self, count: int):
        # By rank, and in turn: (rank, number, request, answer).
        self._asked: queue.PriorityQueue[tuple[int, int, bytes, Future[str]]]
        self._asked = queue.PriorityQueue()
        self._numbers = itertools.count()
        self.add(count)

    def add(self, count: int) -> None:
        """As many more."""
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, asked: bytes, first: bool = True) -> "Future[str]":
        """Ends when it is in the folder ("") or will not be: what went wrong. It can be cancelled
        until a process has it.

        first: before what is not.
        """
        answer: Future[str] = Future()
        self._asked.put((0 if first else 1, next(self._numbers), asked, answer))
        return answer

    def _serve(self) -> None:
        process = None
        while True:
            try:
                *_, asked, answer = self._asked.get(timeout=None if process is None else IDLE)
            except queue.Empty:
                assert process is not None
                process.communicate()
                process = None
                continue
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                process = process or _start()
                assert process.stdin is not None and process.stdout is not None
                send(process.stdin, asked)
                answer.set_result(receive(process.stdout).decode())
            except (OSError, EOFError) as error:
                ended = None if process is None else process.wait()
                answer.set_result(f"the process that lowers kernels ended ({ended}): {error}")
                process = None


def _start() -> "subprocess.Popen[bytes]":
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Its JAX must not take a GPU's memory, nor an environment's word for what it runs on.
    apart = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", f"from {WORKER} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **apart, "PYTHONPATH": os.pathsep.join(paths)},
    )


_others: list[Processes] = []
serves = [False]  # whether this process is one of them


def serving() -> bool:
    """Whether this process asks no others: it is one of them, or there are few cores."""
    return serves[0] or _cores() < AT_LEAST


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others() -> Processes:
    """The processes that work for this one, as many as there are cores for; they end with it."""
    if not _others:
        _others.append(Processes(min(AT_MOST, _cores() // 2)))
    return _others[0]


def send(stream: IO[bytes], content: bytes) -> None:
    """Writes what `receive` reads."""
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """What was sent; EOFError where nothing will be."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("no answer")
    return stream.read(int.from_bytes(size, "little"))
