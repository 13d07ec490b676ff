"""The import rows of the house: a room sees only the rows above it (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dsv3_jax"

ROWS = [
    {"config"},
    {"quantization"},
    {"kernels", "data"},
    {"parallel"},
    {"model", "analysis"},
    {"training", "inference", "interop"},
    {"starting"},
    {"frozen"},
    {"loading", "verifying", "notebook", "samples", "compiling"},
    {"saving", "running", "evaluating", "harness", "serving"},
    {"cli"},
    {"__main__"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

# Inside `model`, a file sees only the files before it; files of one set do not see each other.
MODEL_ROWS = [
    {"activation", "checks", "memory_order", "split_product", "unstacked"},
    {"remat"},
    {"fp8_operands", "quantized_slices"},
    {"fp8_products"},
    {"fp8", "fp8_feed_forward", "plain_products", "step_weights"},
    {"projection", "frozen_products"},
    {"fp8_weights", "adapters"},
    {"norm", "rope", "linear", "cache", "router", "placement", "parameters"},
    {"forward_pass", "quantized_inputs"},
    {"mlp", "ends", "expert_ffn"},
    {"mla", "moe"},
    {"block", "micro_batches"},
    {"stack", "mtp"},
    {"decode", "transformer"},
]
MODEL_ROW = {name: row for row, names in enumerate(MODEL_ROWS) for name in names}

# The one room where a library may be imported.
ONLY_HOME = {
    "flax": {"model"},
    "optax": {"training"},
    "orbax": {"training"},
    "tyro": {"cli"},
    "safetensors": {"interop"},
    "tokenizers": {"data"},
    "tiktoken": {"data"},
    "pyarrow": {"data"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "lm_eval": {"harness"},
}
# `analysis` may plan with these, which know no JAX.
ANALYSIS_MAY_SEE = {"parallel.schedules", "parallel.timeline", "parallel.load_balancer"}
WITHOUT_JAX = [
    "analysis",
    "data",
    "config",
    "parallel/schedules.py",
    "parallel/timeline.py",
    "parallel/load_balancer.py",
]


def files_of(*places: str) -> list[Path]:
    found = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()
    return found


def imports_of(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycle_in(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; [] if none do."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next(filter(None, map(visit, sorted(imports[module]))), [])
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(imports))), [])


ALL_FILES = [p for p in files_of("") if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_sees_only_the_rows_above(path):
    room = room_of(path)
    for name in imports_of(path):
        library = name.split(".")[0]
        if library != "dsv3_jax":
            home = ONLY_HOME.get(library, {room})
            assert room in home, f"{library} belongs in {home}, not in {room}"
            continue
        parts = name.split(".")[1:]
        if not parts or parts[0] not in ROW or parts[0] == room:
            continue
        allowed = ROW[parts[0]] < ROW[room] or (
            room == "analysis" and ".".join(parts[:2]) in ANALYSIS_MAY_SEE
        )
        assert allowed, f"{room} (row {ROW[room]}) must not import {name}"


def test_no_modules_import_each_other_in_a_circle():
    """Also not by an import inside a function, which hides a circle from Python alone."""
    names = {module_of(path): path for path in files_of("")}
    imports = {
        name: {
            target if target in names else target.rpartition(".")[0] for target in imports_of(path)
        }
        & names.keys() - {name}
        for name, path in names.items()
    }
    assert len(imports) > 100
    assert cycle_in(imports) == []


def test_a_circle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", files_of("model"), ids=lambda p: p.name)
def test_model_files_see_only_the_files_before(path):
    if path.stem == "__init__":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[:2] == ["dsv3_jax", "model"] and len(parts) > 2:
            assert MODEL_ROW[parts[2]] < MODEL_ROW[path.stem], f"{path.stem} must not import {name}"


@pytest.mark.parametrize("path", files_of(*WITHOUT_JAX), ids=lambda p: str(p.relative_to(ROOT)))
def test_planners_know_no_jax(path):
    assert not [n for n in imports_of(path) if n.split(".")[0] in ("jax", "jaxlib", "flax")]
