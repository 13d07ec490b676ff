"""What `import dsv3_jax` offers by name: importable, documented, cheap, and installed whole."""

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dsv3_jax as ds

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/api.md").read_text()
NAMES = [name for name in ds.__all__ if not name.startswith("_")]
# A row of the page: | `name` | what it is |
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))


def is_documented(thing: object) -> bool:
    return inspect.isfunction(inspect.unwrap(thing)) or inspect.isclass(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_its_row_in_the_page(name):
    assert getattr(ds, name) is not None
    assert len(ROWS.get(name, "")) > 20, f"docs/api.md lacks `{name}`"


def test_the_page_names_nothing_else():
    assert set(ROWS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_public_has_a_docstring_of_its_own(name):
    thing = getattr(ds, name)
    if is_documented(thing):
        # A dataclass or NamedTuple without one gets its signature.
        assert not (inspect.getdoc(thing) or "").startswith(f"{name}("), name


def test_the_surface_holds_what_everybody_needs():
    needed = "init forward generate train_step load save export estimate __version__"
    assert set(needed.split()) <= set(dir(ds))
    assert set(dir(ds)) == set(ds.__all__)
    assert (ROOT / "dsv3_jax/py.typed").exists()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dsv3_jax' has no attribute 'forwards'"):
        _ = ds.forwards  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_else_of_it():
    """Nor JAX; the costs need none either."""
    code = (
        "import sys, dsv3_jax as ds\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert [name for name in sys.modules if name.startswith('dsv3_jax.')] == []\n"
        "ds.load_config, ds.parameters, ds.estimate\n"
        "assert 'jax' not in sys.modules, 'the costs need no JAX'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_run_that_has_no_kernels_imports_none_of_pallas():
    """0.4 s of every start, where only a GPU or a TPU has any."""
    code = (
        "import sys, dsv3_jax.running, dsv3_jax.kernels.priming\n"
        "assert 'jax' in sys.modules\n"
        "print([name for name in sys.modules if name.startswith('jax.experimental.pallas')])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    assert ran.stdout.decode().strip() == "[]"


def test_type_checkers_and_python_read_one_list():
    stub = ast.parse((ROOT / "dsv3_jax/__init__.pyi").read_text())
    names = [a.asname for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(names) == NAMES  # each once


@pytest.mark.slow
def test_an_installed_wheel_trains_and_writes_in_an_empty_folder(tmp_path):
    """Nothing of the checkout is in reach: the configs and both scripts are in the wheel."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert ds.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
        names = packed.namelist()
    assert {"dsv3_jax/py.typed", "dsv3_jax/__init__.pyi", "dsv3_jax/configs/tiny.py"} <= set(names)
    shipped = {name for name in files.stdout.decode().split("\0") if name.startswith("configs/")}
    assert {f"dsv3_jax/{name}" for name in shipped} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "configs/", "benchmarks/"))]
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # two steps: compiling takes longest

    def command(*words: str) -> str:
        done = subprocess.run(
            # -P: the folder of the script is not looked in.
            [sys.executable, "-P", "-m", "dsv3_jax", *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    where = "import dsv3_jax, dsv3_jax.config as c; print(dsv3_jax.__file__, c.shipped_configs())"
    found = subprocess.run(
        [sys.executable, "-P", "-c", where],
        cwd=empty,
        env=environment,
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert str(tmp_path) in found
    assert str(ROOT) not in found.replace(str(tmp_path), "")
    short = ["--train.steps", "2", "--train.eval-batches", "1", "--train.sample-tokens", "0"]
    short += ["--model.num-hidden-layers", "2", "--model.num-nextn-predict-layers", "0"]
    command("train", "--config", "tiny", "--run-dir", "run", "--devices", "1", *short)
    assert "def" in command("infer", "--checkpoint", "run", "--prompt", "def", "--temperature", "0")
    assert "tokens" in command("estimate", "--config", "half_billion", "--hardware", "h800")
