"""The reference site: its pages and what they show are there; `.ci/run` builds it strictly."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages_of_nav() -> set[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    return set(re.findall(r"^\s+- ([\w/.-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE))


def test_the_navigation_leads_to_pages_and_has_all_guides_and_notebooks():
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages_of_nav() <= found
    assert {page for page in found if "/" in page} <= pages_of_nav()


def test_what_is_shown_exists():
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            assert (ROOT / Path(*name.split("."))).with_suffix(".py").exists(), name
