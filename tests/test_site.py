"""The reference site: every page is in it, and every public name; `.ci/run` builds it strictly."""

import ast
import re
from pathlib import Path

import dsv3_jax as ds

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages_of_nav() -> set[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    return set(re.findall(r"^\s+- ([\w/.-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE))


def test_every_page_is_in_the_navigation_and_there():
    assert pages_of_nav() == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_public_name_is_on_a_reference_page():
    shown = set()
    for page in (DOCS / "reference").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))
    surface = ast.parse((ROOT / "dsv3_jax/__init__.pyi").read_text())
    homes = {
        alias.asname or alias.name: node.module
        for node in surface.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) >= set(ds.__all__) - {"__version__"}
    # Defined there, or imported there from where the page shows it.
    missing = {
        name
        for name, home in homes.items()
        if not any(f"{home}.".startswith(f"{m}.") or m.startswith(f"{home}.") for m in shown)
    }
    assert not missing


def test_what_is_shown_exists():
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            assert (ROOT / Path(*name.split("."))).with_suffix(".py").exists(), name
