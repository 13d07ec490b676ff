"""The guides in docs/guides: a newcomer's way through each page, its blocks run in order.

Blocks marked sh run in a shell and those marked python in one interpreter a page, from a folder
with links to the repository's files, so that nothing is written here. Others are not run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/guides").glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MINUTES = 8  # a page may take on two busy cores


def script_of(page: Path) -> str:
    """A shell script of the page's blocks; Python ones become files that see those before them."""
    lines = ["set -eu"]
    for number, (kind, code) in enumerate(BLOCK.findall(page.read_text()), start=1):
        lines.append(f"echo '== block {number}'")
        if kind == "sh":
            lines.append(code)
        else:
            lines.append(f"cat >>page.py <<'BLOCK'\n{code}\nBLOCK")
    if "page.py" in "\n".join(lines):
        lines.append("python page.py")
    return "\n".join(lines)


def checkout(folder: Path) -> dict[str, str]:
    """Links to the repository's files in an empty folder, and the environment to run them in."""
    for path in ROOT.iterdir():
        if path.name not in {".git", ".venv", ".cache", "runs"}:
            (folder / path.name).symlink_to(path)
    commands = folder / "bin"
    commands.mkdir()
    (commands / "python").symlink_to(sys.executable)
    # A link to a virtual environment's Python finds its packages by this.
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{commands}:{os.environ['PATH']}",
        "DSV3_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DSV3_ACCELERATOR": "cpu",
    }


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60)
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_block_of_the_page_runs(page, tmp_path):
    done = subprocess.run(
        ["bash", "-c", script_of(page)],
        cwd=tmp_path,
        env=checkout(tmp_path),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_blocks_run_in_order_and_the_first_failure_ends_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\necho one >f\n```\n```\nfalse\n```\n```sh\ncat f; false\necho no\n```\n")
    done = subprocess.run(
        ["bash", "-c", script_of(page)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["== block 1", "== block 2", "one"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"\w+://|mailto:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
