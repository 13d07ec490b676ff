"""Kernels that XLA finds compiled: loaded only for a program that is not."""

import pickle
import queue
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import compiled_alone, kept_files, lowered_form, lowering_process, priming
from dsv3_jax.kernels.compiled_alone import alone
from dsv3_jax.kernels.lowered_form import Lowered
from dsv3_jax.kernels.priming import COMPILED, ENOUGH, FOUND, LOOKED_FOR, Primer


class Others:
    """Other processes, of which the test says when they have done what."""

    def __init__(self):
        self.asked: list[tuple[bytes, Future[str]]] = []

    def submit(self, asked):
        self.asked.append((asked, Future()))
        return self.asked[-1][1]

    def do(self, number):
        asked, answer = self.asked[number]
        told = pickle.loads(asked)
        kept_files.write(Path(told.file), kept_files.sealed(told.name, told.kernel.module))
        assert answer.set_running_or_notify_cancel()
        answer.set_result("")


@pytest.fixture
def others():
    return Others()


@pytest.fixture
def primer(others, monkeypatch):
    monkeypatch.setattr(priming, "FINDING", 0.05)
    loaded = queue.SimpleQueue()
    made = Primer(loaded.put, others.submit)
    made.got = lambda: loaded.get(timeout=20)  # type: ignore[attr-defined]
    made.none = loaded.empty  # type: ignore[attr-defined]
    yield made
    made.stop()


def kernel(number, folder, there=False):
    types = [jax.ShapeDtypeStruct((number + 1,), jnp.float32)]
    made = alone(Lowered(b"%d" % number, (), ()), types, types, b"a GPU", folder)
    if there:
        kept_files.write(Path(made.file), kept_files.sealed(made.name, made.kernel.module))
    return made


def settled(primer):
    """Nothing is loaded that was not to be: a second after, as the thread would have by then."""
    time.sleep(0.3)
    return primer.none()


def test_what_the_folder_holds_is_loaded_for_a_program_that_is_not_found(primer, others, tmp_path):
    for number in range(3):
        primer.expect(kernel(number, tmp_path, there=number != 1), new=False)
    assert settled(primer)
    primer.told(LOOKED_FOR)
    assert [primer.got(), primer.got()] == [b"0", b"2"]
    assert settled(primer) and others.asked == []  # one that lacks is not worth a process
    assert (primer.loaded.wanted, primer.loaded.kernels) == (3, 2)


def test_nothing_is_loaded_for_a_program_that_is_found(primer, others, tmp_path):
    for number in range(ENOUGH):
        primer.expect(kernel(number, tmp_path, there=number < 3), new=False)
    primer.told(LOOKED_FOR)
    primer.told(FOUND)
    primer.told(COMPILED, 1.0, fun_name="step")
    primer.told(LOOKED_FOR)  # of a program without kernels
    assert settled(primer) and others.asked == []


def test_others_compile_what_is_new_and_it_is_loaded_as_it_comes(primer, others, tmp_path):
    for number in range(ENOUGH - 1):
        primer.expect(kernel(number, tmp_path), new=True)
    primer.expect(kernel(0, tmp_path), new=True)  # again
    assert others.asked == []
    for number in range(ENOUGH - 1, ENOUGH + 1):
        primer.expect(kernel(number, tmp_path), new=True)
    assert [pickle.loads(asked).kernel.module for asked, _ in others.asked] == [
        b"%d" % number for number in range(ENOUGH + 1)
    ]
    others.do(2)
    assert primer.got() == b"2"
    primer.told(LOOKED_FOR)
    others.do(0)
    assert primer.got() == b"0"


def test_others_compile_what_lacks_where_it_is_much(primer, others, tmp_path):
    for number in range(ENOUGH + 1):
        primer.expect(kernel(number, tmp_path, there=number == 3), new=False)
    primer.told(LOOKED_FOR)
    assert primer.got() == b"3"
    assert len(others.asked) == ENOUGH


def test_a_program_that_is_compiled_waits_for_no_kernel(primer, others, tmp_path):
    for number in range(ENOUGH):
        primer.expect(kernel(number, tmp_path), new=True)
    primer.told(LOOKED_FOR)
    assert others.asked[0][1].set_running_or_notify_cancel()  # a process has it
    primer.told(COMPILED, 1.0)
    assert all(answer.cancelled() for _, answer in others.asked[1:])
    others.asked[0][1].set_result("")
    assert settled(primer)


@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_file_is_told_and_removed(primer, tmp_path, place):
    made = [kernel(number, tmp_path, there=True) for number in range(2)]
    file = Path(made[0].file)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    for one in made:
        primer.expect(one, new=False)
    with pytest.warns(UserWarning, match="is not used, and is removed"):
        primer.told(LOOKED_FOR)
        assert primer.got() == b"1"
    assert not file.exists()


def test_a_file_of_another_kernel_is_not_loaded(tmp_path):
    one, other = kernel(0, tmp_path), kernel(1, tmp_path, there=True)
    Path(other.file).rename(one.file)
    with pytest.raises(ValueError, match="of another kernel"):
        compiled_alone.left(one)


def refusing(_):
    raise RuntimeError("not for this device")


@pytest.mark.parametrize("who", ["the loader", "another process"])
def test_what_is_refused_is_told_once(who, others, tmp_path):
    primer = Primer(refusing, others.submit)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(ENOUGH):
            primer.expect(kernel(number, tmp_path, there=who == "the loader"), new=True)
        for _, answer in others.asked:
            answer.set_result("no compiler")
        primer.told(LOOKED_FOR)
        time.sleep(0.3)
        primer.stop()
    (one,) = said
    why = "RuntimeError: not for this device" if who == "the loader" else "no compiler"
    assert str(one.message) == f"XLA compiles the kernels by itself: {why}"


@pytest.mark.parametrize("why", ["few cores", "no folder", "no GPU"])
def test_elsewhere_nothing_is_expected(why, monkeypatch, tmp_path):
    monkeypatch.setattr(lowering_process, "_cores", lambda: 7 if why == "few cores" else 8)
    monkeypatch.setattr(kept_files, "folder", lambda: None if why == "no folder" else tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if why == "no GPU" else "gpu")
    monkeypatch.setattr(priming, "_start", lambda: pytest.fail("nothing starts"))
    priming.expect(Lowered(b"", (), ()), [], [], new=True)
    assert priming.loaded() == priming.Loaded()


def test_devices_that_jax_does_not_write_down_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(lowering_process, "_cores", lambda: 8)
    monkeypatch.setattr(kept_files, "folder", lambda: tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(priming, "_primers", [])
    with pytest.warns(UserWarning, match="XLA compiles the kernels by itself"):
        priming.expect(Lowered(b"", (), ()), [], [], new=True)
    priming.expect(Lowered(b"", (), ()), [], [], new=True)  # not again: warnings are errors here


def test_the_name_is_of_all_that_decides_the_binary(tmp_path, monkeypatch):
    one, other = kernel(0, tmp_path), kernel(1, tmp_path)
    elsewhere = alone(one.kernel, [], [], b"another GPU", tmp_path)
    files = {one.file, other.file, elsewhere.file}
    for variable in ("XLA_FLAGS", "MOSAIC_GPU_SOMETHING"):
        monkeypatch.setenv(variable, "--another")
        compiled_alone.makers.cache_clear()
        files.add(kernel(0, tmp_path).file)
    compiled_alone.makers.cache_clear()
    assert len(files) == 5
    assert f"('jaxlib', '{jax.lib.__version__}')" in compiled_alone.makers()


def test_what_jax_loads_programs_by_takes_what_it_compiled():
    """And refuses what is none, as an error."""
    jitted = jax.jit(lambda x: x + 1)
    executable = jitted.lower(np.zeros(3)).compile().runtime_executable()
    device = jax.devices()[0]
    compiled_alone.load(device.client.serialize_executable(executable), device)
    for content in (b"", b"another"):
        with pytest.raises(jax.errors.JaxRuntimeError):
            compiled_alone.load(content, device)


def test_jax_tells_of_programs_as_is_listened_to(tmp_path):
    """In order, in the thread that compiles: looked for, found if so, compiled."""
    told = []

    def listen(event, *_, **__):
        if event in (LOOKED_FOR, FOUND, COMPILED):
            told.append(event)

    config: Any = jax.config
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: config.values[name] for name in names}
    before["jax_enable_compilation_cache"] = config.values["jax_enable_compilation_cache"]
    from jax.experimental.compilation_cache import compilation_cache

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_enable_compilation_cache", True)
        lowered = jax.jit(lambda x: 3 * x + 7).lower(jax.ShapeDtypeStruct((5,), jnp.float32))
        lowered.compile()
        first = list(told)
        jax.clear_caches()
        lowered = jax.jit(lambda x: 3 * x + 7).lower(jax.ShapeDtypeStruct((5,), jnp.float32))
        told.clear()
        lowered.compile()
    finally:
        for name, value in before.items():
            config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(listen)
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == [LOOKED_FOR, COMPILED]
    assert told == [LOOKED_FOR, FOUND, COMPILED]


def test_processes_lower_before_they_compile(monkeypatch):
    """And what is taken back is not done."""
    processes = lowering_process.Processes(0)
    second = processes.submit(b"compile", first=False)
    gone = processes.submit(b"compile this, too", first=False)
    processes.submit(b"lower")
    processes.submit(b"lower that")
    assert gone.cancel()
    done = []

    class Pipe:
        def __init__(self):
            self.stdin = self.stdout = self

        def communicate(self):
            """Ended, as when nothing is asked for a while."""

    monkeypatch.setattr(lowering_process, "_start", Pipe)
    monkeypatch.setattr(lowering_process, "send", lambda _, asked: done.append(asked))
    monkeypatch.setattr(lowering_process, "receive", lambda _: b"")
    processes.add(1)
    assert second.result(timeout=20) == ""
    assert done == [b"lower", b"lower that", b"compile"]


def test_what_is_emitted_is_told_with_its_types(monkeypatch):
    assert lowered_form.on_emit
    types = (jax.ShapeDtypeStruct((2,), jnp.bfloat16),)
    told = []
    monkeypatch.setattr(lowered_form, "on_emit", [lambda *args: told.append(args)])
    one = Lowered(b"module", (("use_custom_barrier", False),), ())
    call = jax.jit(lambda x: lowered_form.call_lowered(one, types, x))
    operand = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    call.trace(operand).lower(lowering_platforms=("cuda",))
    ((kernel, operands, results),) = told
    assert (kernel, results) == (one, types)
    assert [(x.shape, x.dtype) for x in operands] == [((3, 4), jnp.float32)]
