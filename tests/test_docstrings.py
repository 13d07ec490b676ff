"""`help()` of every public function and class: shapes and dtypes, units, errors and source.

Of a function also an example. A class is read by its docstring and the types of its fields.
"""

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
CLASSES = [name for name in ds.__all__ if inspect.isclass(getattr(ds, name, None))]
OF_ARRAYS = r"\b(Float|Int|Bool|Key)\[|Variables|TrainState|ModelCache|BlockScaled"
DTYPE = r"\b(Float|Int|Bool|Key|[bf]+16|BF16|f32|FP8|E4M3|u?int\d+|integers|dtypes?)\b"
COUNTS = {  # what a number stands for
    "parameters": "number of weights",
    "kv_bytes_per_token": "bytes",
    "training_flops_per_token": "FLOPs",
    "training_loss": "nats",
    "simulate": "unit of",
    "accelerator": "FLOPs a second",
    "Accelerator": "FLOPs a second",
    "StepEstimate": "seconds",
    "StepMetrics": "nats",
}
SOURCE = r"Source:|V3 report|ISCA paper|arXiv|DeepSeek-V3:"


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


# Their examples compile for three seconds and more.
LONG = ("export", "generate", "save")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FUNCTIONS],
)
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
    assert not re.search(r"Mesh\('| at 0x", text), f"{name}: a default that says nothing"
    assert re.search(r"Error|[Rr]aises", doc_of(name)), f"{name}: no errors"
    assert re.search(SOURCE, doc_of(name)), name


def test_every_class_is_looked_at():
    assert {"Config", "Outputs", "BlockScaled", "Layout", "UserError"} <= set(CLASSES)
    assert len(CLASSES) > 30


@pytest.mark.parametrize("name", CLASSES)
def test_help_of_a_class_has_shapes_dtypes_units_errors_and_source(name):
    cls, doc = getattr(ds, name), vars(getattr(ds, name)).get("__doc__") or ""
    # A dataclass or NamedTuple without a docstring gets its signature for one.
    assert len(doc.split("\n")[0]) > 25 and not doc.startswith(f"{name}("), f"{name}: no docstring"
    for field, kind in typing.get_type_hints(cls, include_extras=True).items():
        kinds = (kind, *typing.get_args(kind))
        of_array = any(k in (jax.Array, np.ndarray) for k in kinds)
        # Or the docstring says of the field what its type cannot.
        assert not of_array or re.search(rf"{field}: .*\[", doc), f"{field} of {name} has no shape"
    if name in COUNTS:
        assert COUNTS[name] in doc, f"{name}: no unit"
    makers = [vars(cls)[m] for m in ("__init__", "__post_init__", "__new__") if m in vars(cls)]
    if any("raise " in source_of(maker) for maker in makers):
        assert re.search(r"Error|[Rr]aises", doc), f"{name}: no errors"
    # Options have their page; a class of exceptions has no source.
    if not (name.endswith("Config") or issubclass(cls, Exception)):
        assert re.search(SOURCE + r"|docs/", doc), f"{name}: no source"


def source_of(function: object) -> str:
    """Its text; "" for one that was made, as a dataclass's `__init__` is."""
    try:
        return inspect.getsource(function)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
