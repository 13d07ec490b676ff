"""Runs the notebooks and writes them with their outputs to docs/notebooks, as Markdown and PNG.

    python notebooks/render.py            # all of them
    python notebooks/render.py 1_mla      # one

Needs the extra `notebook`. The notebooks themselves stay without outputs, which git keeps out of
diffs that way; a test compares the code of both.
"""

import argparse
import io
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from PIL import Image

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parent / "docs/notebooks"


def render(path: Path) -> None:
    """Writes NAME.md and NAME_1.png, NAME_2.png, ... in the place of those that were there."""
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    exporter = MarkdownExporter()  # it fails where templates are missing: before minutes of running
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": FOLDER}}).execute()
    text, resources = exporter.from_notebook_node(notebook)
    DOCS.mkdir(parents=True, exist_ok=True)
    for old in DOCS.glob(f"{path.stem}*"):
        old.unlink()
    for number, (name, data) in enumerate(resources["outputs"].items(), start=1):
        picture = f"{path.stem}_{number}{Path(name).suffix}"
        (DOCS / picture).write_bytes(smaller(data))
        text = text.replace(f"![png]({name})", f"![picture {number}]({picture})")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{4,}", "\n\n", text).strip()
    note = f"*`notebooks/{path.name}` with its outputs, written by notebooks/render.py.*"
    (DOCS / f"{path.stem}.md").write_text(f"{note}\n\n{text}\n")
    print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)


def smaller(png: bytes) -> bytes:
    """The picture in 256 colours, which take a third of the bytes."""
    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    return made.getvalue()


def main() -> None:
    """Renders those that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    every = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", choices=[*every, []], metavar="NAME")
    names = parser.parse_args().names or every
    # A kernel looks for dsv3_jax in its own folder first, which is notebooks/.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    for name in names:
        render(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
