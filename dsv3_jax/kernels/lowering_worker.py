"""What a process does that lowers and compiles kernels for another one (`lowering_process.py`)."""

import importlib
import os
import pickle
import sys
from typing import Any

import jax

from dsv3_jax.kernels import backend, compiled_alone, lowering_process
from dsv3_jax.kernels.compiled_alone import Alone
from dsv3_jax.kernels.lowering_process import Array, Device, Request, receive, send


def lower(asked: Request) -> None:
    """Traces the call, which lowers its kernels."""
    config: Any = jax.config
    for name, value in asked.settings.items():
        if config.values.get(name) != value:
            config.update(name, value)
    config.update("jax_compilation_cache_dir", asked.folder)
    function = getattr(importlib.import_module(asked.module), asked.function)
    leaves, tree = jax.tree.flatten(asked.arguments)
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
        for x in leaves
        if isinstance(x, Array)
    ]

    def call(*traced):
        new = iter(traced)

        def given(leaf):
            if not isinstance(leaf, Array):
                return leaf
            return jax.new_ref(next(new)) if leaf.is_ref else next(new)

        args, kwargs = jax.tree.unflatten(tree, map(given, leaves))
        backend.decided(function)(*args, **kwargs)
        return ()

    with backend.compiling_for(Device(asked.device)), backend.leaving(asked.left):
        jax.jit(call).trace(*arrays)


def main() -> None:
    """Answers requests on standard input until it ends."""
    lowering_process.serves[0] = True
    config: Any = jax.config  # JAX's folder is not for kernels compiled alone
    config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may be written among the answers
    while True:
        try:
            asked = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            told = pickle.loads(asked)
            compiled_alone.leave(told) if isinstance(told, Alone) else lower(told)
            answer = ""
        except Exception as error:  # whatever it is, the process that asked finds it itself
            answer = f"{type(error).__name__}: {error}"
        send(answers, answer.encode())
