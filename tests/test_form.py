"""What a reader may count on: short files, and a docstring for all that is public."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "dsv3_jax").rglob("*.py"))
MOST_LINES, NINE_OF_TEN, MEDIAN = 430, 320, 160


def test_no_module_is_long():
    lines = sorted((len(path.read_text().splitlines()), str(path)) for path in FILES)
    counts = [count for count, path in lines if not path.endswith("__init__.py")]
    assert lines[-1][0] <= MOST_LINES, lines[-1]
    assert statistics.quantiles(counts, n=10)[-1] <= NINE_OF_TEN
    assert statistics.median(counts) <= MEDIAN


def public_without_docstring(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public classes and functions of a module or class, and of classes in it."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from public_without_docstring(node.body, f"{prefix}{node.name}.")


def test_the_search_finds_what_is_bare():
    source = (
        "def f(): ...\nclass C:\n  'x'\n  def g(self): ...\n  def _h(self): ...\n  def i(self): 'y'"
    )
    assert list(public_without_docstring(ast.parse(source).body)) == ["f", "C.g"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "dsv3_jax")))
def test_what_is_public_has_a_docstring(path):
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module) or not module.body, "the module itself"
    assert list(public_without_docstring(module.body)) == []
