"""examples/mesh_pictures.py draws the pictures of docs/parallelism.md from today's shardings."""

import importlib.util
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(
        "mesh_pictures", ROOT / "examples/mesh_pictures.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["data", "tensor", "context"])
def test_every_picture_of_the_docs_is_drawn(example, name, tmp_path):
    getattr(example, f"draw_{name}")(tmp_path)
    drawn = matplotlib.image.imread(tmp_path / f"{name}.png")
    kept = matplotlib.image.imread(ROOT / f"docs/plots/parallelism/{name}.png")
    assert drawn.shape == kept.shape
    assert len({tuple(pixel) for pixel in drawn[::4, ::4].reshape(-1, drawn.shape[-1])}) > 4
