"""Kernels lowered once: what is kept is what Mosaic makes, and is never another kernel's."""

import hashlib
import pickle
import re
import subprocess
import sys
import warnings
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core as mosaic
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from jaxlib.mlir import ir

from dsv3_jax.kernels import (
    backend,
    kept_files,
    lowered,
    lowered_form,
    lowered_name,
    lowering_process,
    lowering_worker,
)
from dsv3_jax.kernels.gemm import api as gemm
from dsv3_jax.kernels.sums import new_sum
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled
from tests.kernels.conftest import OLD_JAX

pytestmark = pytest.mark.skipif(
    OLD_JAX, reason=f"kernels for Hopper need jax 0.11, and this is {jax.__version__}"
)

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@pytest.fixture(autouse=True)
def counted(monkeypatch, tmp_path):
    """An empty process and folder; the kernels that Mosaic lowered for it since."""
    found, lower = [], lowered.lower
    monkeypatch.delenv("DSV3_KEPT_KERNELS", raising=False)
    monkeypatch.setattr(lowered, "_kept", {})
    monkeypatch.setattr(kept_files, "folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr(lowered, "_here", [0.0])
    monkeypatch.setattr(lowered, "lower", lambda *args: found.append(args[1]) or lower(*args))
    return found


def program(function, *shapes, mesh=None, debug_info=False) -> str:
    """The program for an H200, as text, traced as if by a process that has traced nothing yet."""
    jax.clear_caches()
    mesh = mesh or mesh_of(1)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        return lowered.as_text(debug_info=debug_info)


def mesh_of(devices: int) -> AbstractMesh:
    return AbstractMesh((devices,), ("x",), abstract_device=H200, axis_types=(AxisType.Auto,))


def weight(rows=128, columns=256):
    return jax.ShapeDtypeStruct((rows, columns), jnp.float32)


def quantized(x, **options):
    """As `fused.quantize_blocks`, but that XLA may not cut it, which asks for devices."""
    package, how = "dsv3_jax.kernels.fused", {"implementation": "pallas_gpu", **options}
    return backend.run(package, "quantize_blocks", x, **how)


def gradient(a, b):
    """Both layers of a sum, each with its square."""
    total = new_sum((2, 1, 128, 128), adds=False, squares=True)
    for number in range(2):
        gemm.scaled_wgrad(a, b, total.of_layer(number), implementation="pallas_gpu")
    return jax.freeze(total.total), jax.freeze(total.squares)


def operands_of_gradient():
    of = jax.ShapeDtypeStruct
    x = BlockScaled(of((128, 256), jnp.float8_e4m3fn), of((128, 2), jnp.float32), PER_TOKEN)
    return x, x


def as_mosaic_makes_it(function, *shapes, **options) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowered, "run", lambda kernel, options, out_type, args: kernel(*args))
        return program(function, *shapes, **options)


_KERNEL = re.compile(r'kernel_hash = "(?:[^"\\]|\\.)*", module = "((?:[^"\\]|\\.)*)"')


def kernels(text: str) -> list[str]:
    """Their programs, without the number and the places of the source that Mosaic writes down."""
    found = []
    for escaped in _KERNEL.findall(text):
        pattern = rb'\\([0-9A-F]{2}|["\\])'
        content = re.sub(pattern, lambda m: _byte(m.group(1)), escaped.encode("latin1"))
        context = mlir.make_ir_context()
        context.allow_unregistered_dialects = True
        mosaic.dialect.register_dialect(context)
        parsed = ir.Module.parse(content, context)
        del parsed.operation.attributes[lowered_form.NUMBERED]
        found.append(parsed.operation.get_asm(enable_debug_info=False))
    return found


def _byte(escaped: bytes) -> bytes:
    return escaped if len(escaped) == 1 else bytes([int(escaped, 16)])


@pytest.mark.parametrize(
    "function, shapes", [(quantized, [weight()]), (gradient, operands_of_gradient())]
)
def test_a_program_is_the_same_with_kernels_that_are_kept(function, shapes, counted):
    kept, own = program(function, *shapes), as_mosaic_makes_it(function, *shapes)
    assert len(counted) == 1
    assert _KERNEL.sub("", kept) == _KERNEL.sub("", own)
    assert kernels(kept) == kernels(own) != []


def test_equal_calls_are_lowered_once(counted):
    def twice(x, y):
        return quantized(x), quantized(y)

    program(twice, weight(), weight())
    program(lambda x: quantized(2 * x), weight())
    assert len(counted) == 1
    program(twice, weight(), weight(256, 128))
    assert len(counted) == 2
    program(quantized, jax.ShapeDtypeStruct((128, 256), jnp.bfloat16))
    with backend.leaving(4):
        program(quantized, weight())
    assert len(counted) == 4


def test_a_later_process_lowers_nothing(counted, tmp_path):
    first = program(gradient, *operands_of_gradient())
    assert len(list((tmp_path / "kernels").iterdir())) == 1
    lowered._kept.clear()
    assert program(gradient, *operands_of_gradient()) == first
    assert len(counted) == 1


def test_other_source_or_settings_are_another_kernel(counted, monkeypatch):
    program(quantized, weight())
    world = lowered_name.world()
    monkeypatch.setattr(lowered_name, "world", lambda: world + "x")
    program(quantized, weight())
    assert len(counted) == 2


def test_the_source_of_every_kernel_and_settings_count(monkeypatch, tmp_path):
    lowered_name.source.cache_clear()
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "one.py"
    monkeypatch.setattr(lowered_name, "_PACKAGE", tmp_path)
    worlds = []
    for text in ("a", "b"):
        source.write_text(text)
        lowered_name.source.cache_clear()
        worlds.append(lowered_name.world())
    monkeypatch.setenv("MOSAIC_GPU_SOMETHING", "1")
    worlds.append(lowered_name.world())
    with jax.numpy_dtype_promotion("standard"):  # of a thread: kernels have one of their own
        assert lowered_name.world() == worlds[-1]
    lowered_name.source.cache_clear()
    assert len(set(worlds)) == 3


@pytest.mark.parametrize("how, place", [("changed", 0), ("changed", 300), ("cut", 0), ("cut", -1)])
def test_a_damaged_file_is_told_and_written_anew(counted, tmp_path, how, place):
    first = program(quantized, weight())
    (file,) = (tmp_path / "kernels").iterdir()
    content = bytearray(file.read_bytes())
    damaged = bytearray(content)
    damaged[place] ^= 1
    file.write_bytes(damaged if how == "changed" else content[:place])
    lowered._kept.clear()
    with pytest.warns(UserWarning, match="is not used, and is written anew"):
        assert program(quantized, weight()) == first
    assert len(counted) == 2
    assert file.read_bytes() == content


def test_a_file_of_another_kernel_is_not_used(counted, tmp_path):
    program(quantized, weight())
    (file,) = (tmp_path / "kernels").iterdir()
    (name,), (kernel,) = lowered._kept, lowered._kept.values()
    file.write_bytes(kernel.to_bytes(name + " of another"))
    lowered._kept.clear()
    with pytest.warns(UserWarning, match="it is of another kernel"):
        program(quantized, weight())
    assert len(counted) == 2


def test_a_folder_that_refuses_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_files, "folder", lambda: tmp_path / "file")
    with pytest.warns(UserWarning, match="is not kept"):
        program(quantized, weight())


def test_a_kept_kernel_has_the_name_that_profiles_and_counts_go_by():
    arguments = quantized, weight()
    plain = re.findall(r'(\w+)/mpmd_map"', as_mosaic_makes_it(*arguments, debug_info=True))
    kept = re.findall(r'(\w+)/hopper_kernel"', program(*arguments, debug_info=True))
    assert plain and kept == plain


@pytest.mark.parametrize(
    "why", ["a form that is not known", "dumps", "a value of no known form", "off"]
)
def test_other_kernels_are_mosaics_own(counted, monkeypatch, why):
    function, shape = quantized, weight()
    expected = kernels(as_mosaic_makes_it(function, shape))
    if why == "dumps":
        monkeypatch.setenv("MOSAIC_GPU_DUMP_SOMETHING", "1")
    elif why == "off":
        monkeypatch.setenv("DSV3_KEPT_KERNELS", "0")
    elif why == "a value of no known form":
        monkeypatch.setattr(lowered_name, "described", partial(_refuse, TypeError))
    else:
        monkeypatch.setattr(lowered_form, "CALL", "another")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert kernels(program(function, shape)) == expected
    assert bool(said) == (why == "a form that is not known")
    assert len(counted) == (why == "a form that is not known")
    assert lowered._kept in ({}, dict.fromkeys(lowered._kept))


def _refuse(error, *_):
    raise error("no")


def test_what_values_are_made_of_tells_them_apart():
    struct = jax.ShapeDtypeStruct
    values = [
        *(None, True, 1, 1.0, "1", b"1", (1,), [1], {"1": 1}, jnp.float32, jnp.bfloat16),
        *(struct((1,), jnp.float32), struct((1,), jnp.int32), struct((1, 1), jnp.int32)),
        *(
            AxisType.Auto,
            AxisType.Explicit,
            lowered_form.Lowered(b"1", (), ()),
            lowered_form.Lowered(b"2", (), ()),
        ),
    ]
    assert len({lowered_name.described(value) for value in values}) == len(values)
    for value in (lambda: 1, object(), (1, object())):
        with pytest.raises(TypeError):
            lowered_name.described(value)


def test_in_a_shard_map_and_mapped_over(counted):
    """Results differ between devices as operands do; a kernel that is mapped over is its own."""
    mesh = mesh_of(2)
    cut = jax.shard_map(
        quantized, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")
    )
    text = program(cut, weight(256, 256), mesh=mesh)
    assert kernels(text) == kernels(program(quantized, weight()))
    assert len(counted) == 1
    mapped, rows = jax.vmap(quantized), jax.ShapeDtypeStruct((3, 128, 256), jnp.float32)
    assert kernels(program(mapped, rows)) == kernels(as_mosaic_makes_it(mapped, rows))


def test_a_file_is_its_own_proof():
    kernel = lowered_form.Lowered(b"program\nof lines", (("a", True),), ((0, 1),))
    content = kernel.to_bytes("name\nof lines")
    assert lowered_form.Lowered.from_bytes(content, "name\nof lines") == kernel
    assert kernel.attributes["kernel_hash"] == hashlib.sha256(kernel.module).digest()
    assert "program" not in repr(kernel)


@pytest.fixture
def others(monkeypatch):
    """Other processes are asked from the first kernel on."""
    monkeypatch.setattr(lowered, "PATIENCE", 0.0)
    monkeypatch.setattr(lowering_process, "_cores", lambda: lowering_process.AT_LEAST)
    monkeypatch.setattr(lowering_process, "_others", [])
    monkeypatch.setattr(lowering_process, "AT_MOST", 1)


def test_another_process_lowers_under_the_same_names(counted, others, monkeypatch):
    """What it does, done here: the call is told in bytes, and its kernel is found afterwards."""
    served = []

    def serve(asked):
        with monkeypatch.context() as there:
            there.setattr(lowering_process, "serves", [True])
            there.setattr(lowered, "_kept", {})
            there.setattr(jax.config, "update", lambda *_: None)
            served.append(lowering_worker.lower(pickle.loads(asked)))
        answer = Future()
        answer.set_result("")
        return answer

    monkeypatch.setattr(lowering_process, "others", lambda: SimpleNamespace(submit=serve))
    first = program(gradient, *operands_of_gradient())
    assert len(served) == len(counted) == 1
    monkeypatch.setattr(lowered, "PATIENCE", 1e9)
    lowered._kept.clear()
    assert program(gradient, *operands_of_gradient()) == first
    assert len(counted) == 1


@pytest.mark.slow
def test_in_a_process_of_its_own(counted, others):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = program(gradient, *operands_of_gradient())
    assert counted == []
    assert kernels(first) == kernels(as_mosaic_makes_it(gradient, *operands_of_gradient()))


def test_a_process_that_ends_is_told(counted, others, monkeypatch):
    """As does one that refuses; the kernel is lowered here."""
    command = [sys.executable, "-c", "pass"]
    ended = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    monkeypatch.setattr(lowering_process, "_start", ended)
    with pytest.warns(UserWarning, match="the process that lowers kernels ended"):
        text = program(quantized, weight())
    assert len(counted) == 1
    assert kernels(text) == kernels(as_mosaic_makes_it(quantized, weight()))


def test_a_process_that_says_nothing_is_not_waited_for(counted, others, monkeypatch):
    silent = SimpleNamespace(submit=lambda asked: Future())
    monkeypatch.setattr(lowering_process, "others", lambda: silent)
    monkeypatch.setattr(lowered, "_waits", [0.1])
    with pytest.warns(UserWarning, match="has not answered"):
        program(quantized, weight())
    assert len(counted) == 1
    assert lowered._waits == [0.0]


def test_what_cannot_be_told_is_lowered_here(counted, others, monkeypatch):
    monkeypatch.setattr(lowering_process, "_struct", lambda leaf: lambda: leaf)
    program(quantized, weight())
    assert len(counted) == 1
