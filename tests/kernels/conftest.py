"""What the kernel tests share: which implementations can run here, and operands."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from dsv3_jax.kernels import hopper, tpu
from dsv3_jax.quantization import block_scaled

OLD_JAX = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
INTERPRETER_IS_NEWER = pytest.mark.skipif(
    OLD_JAX, reason=f"Pallas interprets GPU kernels from jax 0.11 on; this is {jax.__version__}"
)
IMPLEMENTATIONS = ["reference", pytest.param("pallas_gpu", marks=INTERPRETER_IS_NEWER)]
ALL_IMPLEMENTATIONS = [*IMPLEMENTATIONS, "pallas_tpu"]

# Relative errors against float64: rounding a result to bfloat16 alone is 1.7e-3. Float32 results
# are sums in float32, but a Hopper's tensor core keeps about 14 bits of FP8 products (1.3e-4).
BF16_LIMIT = 2e-3
F32_LIMIT = 1e-3 if jax.default_backend() == "gpu" else 1e-6

# One program for each shape: called as they are, their operations compile one by one.
quantize = jax.jit(block_scaled.quantize, static_argnames=("tile", "scale_format"))
dequantize = jax.jit(block_scaled.dequantize, static_argnames="dtype")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def running(monkeypatch):
    """A context in which an implementation runs on this machine, interpreted if need be."""

    def enter(implementation: str):
        if implementation == "pallas_tpu" and jax.default_backend() != "tpu":
            return tpu.interpreting()
        if implementation != "pallas_gpu" or jax.default_backend() == "gpu":
            return contextlib.nullcontext()
        # Two simulated blocks: enough to divide the work, and each costs threads.
        monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
        return hopper.interpreting()

    return enter


def lower_for_an_h200(function, *operands) -> None:
    """Lowers the program to GPU code; what the interpreter lets pass may be refused here."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text, "no kernel, but plain JAX"


def one_program(function, implementation: str):
    """The function of (function, arrays, ...), compiled whole where nothing is interpreted.

    Op by op it is some hundred programs. A kernel that is interpreted cannot be in one.
    """
    return jax.jit(function, static_argnums=0) if implementation == "reference" else function


def differentiated(function, operands, d_out):
    """(the results of function(*operands), the gradients of its operands)."""
    out, pull_back = jax.vjp(function, *operands)
    return out, pull_back(d_out)


def normal(rng, *shape):
    """Standard normal numbers, float32."""
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def relative_error(out, exact) -> float:
    """Frobenius norm of the difference over that of `exact`, in float64."""
    out, exact = np.asarray(out, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
