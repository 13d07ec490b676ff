"""`help()` of every public function: shapes and dtypes, units, errors, source, and an example."""

import doctest
import inspect
import logging
import re
import typing

import jax
import numpy as np
import pytest

import dsv3_jax as ds

FUNCTIONS = [
    name for name in ds.__all__ if inspect.isfunction(inspect.unwrap(getattr(ds, name, None)))
]
OF_ARRAYS = r"\b(Float|Int|Bool|Key)\[|Variables|TrainState|ModelCache|BlockScaled"
DTYPE = r"\b(Float|Int|Bool|Key|[bf]+16|BF16|f32|FP8|E4M3|u?int\d+|integers|dtypes?)\b"
COUNTS = {  # what a number stands for
    "parameters": "number of weights",
    "kv_bytes_per_token": "bytes",
    "training_flops_per_token": "FLOPs",
    "training_loss": "nats",
    "simulate": "unit of",
    "accelerator": "FLOPs a second",
}


def doc_of(name: str) -> str:
    return inspect.getdoc(inspect.unwrap(getattr(ds, name))) or ""


def help_of(name: str) -> str:
    """What `help()` shows: the signature and the docstring."""
    function = inspect.unwrap(getattr(ds, name))
    return f"{inspect.signature(function)}\n{doc_of(name)}"


def test_every_function_is_looked_at():
    assert {"forward", "train_step", "route", "estimate", "save"} <= set(FUNCTIONS)
    assert len(FUNCTIONS) > 40


@pytest.fixture
def no_log():
    """A reader's session shows no log; tests before this one may have turned it on."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_its_example_runs_as_a_reader_would_paste_it(name, no_log):
    example = doctest.DocTestParser().get_doctest(doc_of(name), {}, name, None, None)
    assert example.examples, "no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_has_shapes_dtypes_units_errors_and_source(name):
    text, function = help_of(name), inspect.unwrap(getattr(ds, name))
    for place, kind in typing.get_type_hints(function, include_extras=True).items():
        # An array without its dims would leave the reader to guess them.
        assert kind not in (jax.Array, np.ndarray), f"{place} of {name} has no shape"
    if re.search(OF_ARRAYS, text):
        assert re.search(DTYPE, text), f"{name}: no dtype"
    if name in COUNTS:
        assert COUNTS[name] in doc_of(name), f"{name}: no unit"
    assert "Mesh('" not in text, f"{name}: a default that fills the screen"
    assert re.search(r"Error|[Rr]aises", doc_of(name)), f"{name}: no errors"
    assert re.search(r"Source:|V3 report|ISCA paper|arXiv|DeepSeek-V3:", doc_of(name)), name
