"""Kernels that XLA finds compiled: others compile them while it prepares the program around them.

XLA compiles a program's kernels one after the other, 0.75 s each, when it has done the rest of its
work. Processes that lower kernels (`lowering_process.py`) compile those of a first start as well,
side by side, and a thread loads each as soon as it is in the folder (`compiled_alone.py`). XLA
finds what is loaded by then and compiles what is not: it waits for nothing, and results are the
same.

A program that JAX finds compiled needs none of them. JAX tells that it looks for it, and that it
has found it; where it has not within a while, what the folder holds of its kernels is loaded, and
others compile what it lacks. What is new to this process is of no program that is compiled.
"""

import atexit
import functools
import pickle
import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.kernels import compiled_alone, kept_files, lowering_process
from dsv3_jax.kernels.compiled_alone import Alone

LOOKED_FOR = "/jax/compilation_cache/compile_requests_use_cache"
FOUND = "/jax/compilation_cache/cache_hits"
COMPILED = "/jax/core/compile/backend_compile_duration"
FINDING = 4.0  # seconds in which JAX finds a compiled program, and says so: 1.8 for a step of 86
ENOUGH = 8  # new kernels: for fewer, processes that start take longer than XLA does


@dataclass(eq=False)
class _Wanted:
    """A kernel that a program calls.

    Fields:
        new: no program that is compiled calls it.
        made: what ends when it is in its file ("") or will not be.
        over: the program is compiled.
    """

    kernel: Alone
    new: bool
    made: Future[str] | None = None
    over: bool = False


@dataclass
class Loaded:
    """What was loaded into this process.

    Fields:
        wanted: kernels that programs call.
        kernels: those of them that were loaded.
    """

    wanted: int = 0
    kernels: int = 0


class Primer:
    """Loads kernels that are wanted, in one thread.

    load: an executable into this process. submit: a request to another process, and its answer.
    """

    def __init__(
        self, load: Callable[[bytes], None], submit: Callable[[bytes], "Future[str]"]
    ) -> None:
        self.loaded = Loaded()
        self._load, self._submit = load, submit
        self._lock = threading.Lock()
        self._files: set[Path] = set()
        self._emitted: dict[int, list[_Wanted]] = {}  # by thread, until its next program
        self._compiling: dict[int, list[_Wanted]] = {}
        self._ready: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wrong = False

    def expect(self, kernel: Alone, new: bool) -> None:
        """A program that this thread will have compiled next calls the kernel."""
        with self._lock:
            if self._wrong or kernel.file in self._files:
                return
            self._files.add(kernel.file)
            self.loaded.wanted += 1
            emitted = self._emitted.setdefault(threading.get_ident(), [])
            emitted.append(_Wanted(kernel, new))
            if sum(x.new for x in emitted) >= ENOUGH:
                self._get([x for x in emitted if x.new], ask=True)

    def told(self, event: str, *_: Any, **__: Any) -> None:
        """Listens to JAX, in the thread that compiles."""
        if event not in (LOOKED_FOR, FOUND, COMPILED):
            return
        thread = threading.get_ident()
        with self._lock:
            if event == LOOKED_FOR:
                self._end(thread)
                wanted = self._compiling[thread] = self._emitted.pop(thread, [])
                if any(x.made is None for x in wanted):
                    timer = threading.Timer(FINDING, self._not_found, [wanted])
                    timer.daemon = True
                    timer.start()
            else:
                self._end(thread)

    def _not_found(self, wanted: list[_Wanted]) -> None:
        with self._lock:
            missing = [x for x in wanted if not x.kernel.file.exists()]
            self._get(wanted, ask=len(missing) >= ENOUGH)

    def _end(self, thread: int) -> None:
        for wanted in self._compiling.pop(thread, []):
            wanted.over = True
            if wanted.made is not None:
                wanted.made.cancel()

    def _get(self, wanted: list[_Wanted], ask: bool) -> None:
        """From their files, or, if so asked, by other processes."""
        for one in wanted:
            if one.made is not None or one.over:
                continue
            if one.kernel.file.exists():
                one.made = Future()
                one.made.set_result("")
            elif ask:
                one.made = self._submit(pickle.dumps(one.kernel))
            else:
                continue
            one.made.add_done_callback(functools.partial(self._answered, one))
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()

    def _answered(self, one: _Wanted, answer: "Future[str]") -> None:
        if not answer.cancelled():
            self._ready.put(one)

    def _serve(self) -> None:
        while (one := self._ready.get()) is not None:
            if one.over or self._wrong:
                continue
            assert one.made is not None
            if wrong := one.made.result() or self._loading(one.kernel):
                self._wrong = True
                warnings.warn(f"XLA compiles the kernels by itself: {wrong}", stacklevel=2)

    def _loading(self, kernel: Alone) -> str:
        """Loads it; returns what would be wrong with all others, too."""
        try:
            executable = compiled_alone.left(kernel)
        except OSError:
            return ""  # the folder keeps nothing, which was told when it refused
        except ValueError as error:
            kernel.file.unlink(missing_ok=True)
            warnings.warn(f"{kernel.file} is not used, and is removed: {error}", stacklevel=2)
            return ""
        try:
            self._load(executable)
        except Exception as error:  # jaxlib's refusals, and where its names are not 0.11's
            return f"{type(error).__name__}: {error}"
        self.loaded.kernels += 1
        return ""

    def stop(self) -> None:
        """Returns when nothing is being loaded; nothing is from then on."""
        self._wrong = True
        self._ready.put(None)
        if self._thread is not None:
            self._thread.join()


_primers: list[tuple[Primer, bytes] | None] = []


def expect(kernel: Any, operands: Any, results: Any, new: bool) -> None:
    """A program that this thread will have compiled next calls the kernel (`Lowered`).

    operands, results: have their shapes and dtypes. new: no program that is compiled has it. Does
    nothing where there is no GPU, no folder of compiled programs, or few cores.
    """
    folder = kept_files.folder()
    if folder is None or lowering_process.serving() or jax.default_backend() != "gpu":
        return
    if not _primers:
        _primers.append(_start())
    if (found := _primers[0]) is not None:
        primer, topology = found
        primer.expect(compiled_alone.alone(kernel, operands, results, topology, folder), new)


def _start() -> tuple[Primer, bytes] | None:
    try:
        topology = compiled_alone.attached()
    except Exception as error:  # whatever JAX has against it, XLA compiles kernels as it did
        warnings.warn(f"XLA compiles the kernels by itself: {error}", stacklevel=2)
        return None
    load = functools.partial(compiled_alone.load, device=jax.local_devices(backend="cuda")[0])
    primer = Primer(load, lambda asked: lowering_process.others().submit(asked, first=False))
    jax.monitoring.register_event_listener(primer.told)
    jax.monitoring.register_event_duration_secs_listener(primer.told)
    atexit.register(primer.stop)
    return primer, topology


def loaded() -> Loaded:
    """What was loaded into this process."""
    return _primers[0][0].loaded if _primers and _primers[0] else Loaded()
