"""The guides in docs/guides: a newcomer's way through each page, its blocks run in order.

Blocks marked sh run in a shell and those marked python in one interpreter a page, from a folder
with links to the repository's files, so that nothing is written here. Others are not run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax import cli
from dsv3_jax.config import UserError

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs/figures.md"
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


def measured_rows() -> list[tuple[str, str]]:
    """(row, its command) of each table of the page of figures that has such a column."""
    found, column = [], None
    for line in FIGURES.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "command" in cells:
            column = cells.index("command")
        elif column is not None and not set(line) <= set("|- "):
            found.append((line, cells[column]))
    return found


def check_command(command: str) -> None:
    """That what a page says to type is there: the script, and its options or its whole config."""
    words = shlex.split(command)
    if words[:2] == ["./run", "bench"]:
        words[:2] = ["python", "-m", "benchmarks.bench_" + words.pop(2)]
    if words[:2] == ["./run", "train"]:
        cli.parse_config(words[2:], description="")
        return
    assert words[0] == "python"
    script = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    text = (ROOT / script).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in text or f"{option[2:].replace('-', '_')}:" in text, command


def test_every_figure_has_its_command():
    rows = measured_rows()
    assert len(rows) > 10
    for row, cell in rows:
        commands = [c for c in re.findall(r"`([^`]+)`", cell) if c.startswith(("./run", "python"))]
        assert commands, row
        for command in commands:
            check_command(command)


def test_commands_beside_the_tables_are_there():
    text = FIGURES.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    commands += re.findall(r"`(python examples[^`]+)`", text)
    assert len(commands) >= 4
    for command in commands:
        check_command(command)


def test_a_command_that_is_not_there_is_found():
    with pytest.raises(AssertionError):
        check_command("python -m benchmarks.bench_step --never")
    with pytest.raises(UserError):
        check_command("./run train --config configs/h200_slice.py --train.batch-size 0")
