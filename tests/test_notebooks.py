"""The notebooks: without outputs in git, rendered in docs, run from another folder; first cell."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dsv3_jax.notebook import _use_cache

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MINUTES = 3  # that a notebook may take on two cores


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def what_is_kept(notebook: dict) -> list[str]:
    """What running a notebook leaves in it, and git should not have."""
    kept = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"]):
            kept.append(f"outputs of {cell['id']}")
        kept += [f"{cell['id']}: {name}" for name in cell["metadata"]]
    return kept + [name for name in notebook["metadata"] if name == "widgets"]


def test_what_a_run_leaves_is_found():
    cell = {"cell_type": "code", "id": "a", "metadata": {"scrolled": 1}, "source": []}
    ran = cell | {"outputs": [{"text": "1"}], "execution_count": 1}
    found = what_is_kept({"cells": [ran], "metadata": {}})
    assert found == ["outputs of a", "a: scrolled"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_stripped(path):
    assert what_is_kept(json.loads(path.read_text())) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_each_ends_with_one_thing_to_change_and_a_picture(path):
    assert cells(path, "markdown")[-1].startswith("## Change one thing")
    last = cells(path, "code")[-1]
    assert "# change this" in last
    # It draws, or calls a function of the notebook that does.
    drawing = [code for code in cells(path, "code") if "plt." in code]
    drawers = re.findall(r"^def (\w+)", "\n".join(drawing), re.MULTILINE)
    assert "plt." in last or "Image(" in last or any(f"{name}(" in last for name in drawers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_rendered_copy_is_of_this_text_and_has_its_pictures(path):
    rendered = ROOT / "docs/notebooks" / f"{path.stem}.md"
    text = rendered.read_text()
    shown = re.findall(r"^```python\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert shown == cells(path, "code"), "run notebooks/render.py"
    for prose in cells(path, "markdown"):
        assert re.sub(r"[ \t]+$", "", prose.strip(), flags=re.MULTILINE) in text, "render.py, again"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    assert all((rendered.parent / name).stat().st_size < 120_000 for name in pictures)
    assert sorted(pictures) == sorted(p.name for p in rendered.parent.glob(f"{path.stem}_*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_in_another_folder(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=MINUTES * 60, resources=where).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in str(o)]
    assert pictures
    assert list(tmp_path.iterdir()) == []


def first_cell(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A first cell in a process of its own, with IPython's way to show errors."""
    shown = f"""
try:
    {code}
except Exception as error:
    print(*error._render_traceback_(), sep="\\n")
"""
    return subprocess.run(
        [sys.executable, "-c", "from dsv3_jax.notebook import start\n" + shown],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env,
        cwd="/",
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_a_missing_extra_is_one_line():
    done = first_cell("import importlib.util as u; u.find_spec = lambda name: None; start()")
    assert done.stdout.startswith("error: the notebooks need matplotlib: open them with ./run")
    assert len(done.stdout.splitlines()) == 1 and not done.stderr


def test_an_unwritable_home_and_one_core_are_a_line_each():
    code = "import os; os.sched_getaffinity = lambda pid: {0}; print(os.listdir(start(2)))"
    done = first_cell(code, HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    home, runs_on, core, files = done.stdout.splitlines()
    caches = Path(tempfile.gettempdir()) / "dsv3_jax-notebook-"
    assert home.startswith(f"/nonexistent cannot be written: caches go to {caches}")
    assert runs_on.endswith("on 2 x cpu; 1 CPU cores")
    assert core.startswith("One core: ")
    assert files == "['cache']"


def test_caches_may_be_sent_where_nothing_is_yet(tmp_path):
    caches = str(tmp_path / "not" / "yet")
    done = first_cell("start()", HOME=str(tmp_path), XDG_CACHE_HOME=caches)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jax "), done.stdout


def test_a_cache_folder_of_somebody_else_is_one_line(tmp_path, monkeypatch, capsys):
    """A home folder that can be written says nothing of the .cache in it."""
    (tmp_path / ".cache").touch()  # takes no files, whoever asks
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that both are as before afterwards
    monkeypatch.setenv("HOME", str(tmp_path))
    _use_cache(tmp_path)
    said = capsys.readouterr().out
    assert said == (
        f"{tmp_path}/.cache cannot be written: caches go to {tmp_path}/cache, "
        "for this notebook alone.\n"
    )


def test_other_devices_than_jax_runs_on_are_one_line(tmp_path):
    done = first_cell("import jax; jax.devices(); start(8)", HOME=str(tmp_path))
    assert done.stdout.splitlines()[0].startswith("error: JAX already runs on 1 x cpu: restart the")


def test_a_kernel_without_the_package_shows_the_way_beside_the_error():
    for path in NOTEBOOKS:
        first = cells(path, "code")[0].splitlines()
        assert first[0].startswith("# No module named dsv3_jax? Open this with ./run notebook")
        assert first[1] == "from dsv3_jax.notebook import start"
