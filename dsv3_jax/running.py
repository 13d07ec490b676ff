"""train.py and infer.py run from Python, or from an installed package, which has them inside."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPTS = ("train", "infer")


def run_script(name: str, argv: Sequence[str], *arguments: Any) -> int:
    """The exit code of train.py or infer.py: of the repository, or inside an installed package."""
    package = Path(__file__).parent
    inside, beside = package / "scripts" / f"{name}.py", package.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, inside if inside.exists() else beside)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script.main(argv, *arguments)


def train(argv: Sequence[str], extensions: Any = None) -> int:
    """Trains as train.py does with these options; returns its exit code, 0 when all steps are done.

    `extensions` are an experiment's own functions, an `Extensions`. Raises what train.py shows as
    one message: UserError for options that do not fit, RunError and OSError for what fails. Source:
    this project (docs/runs.md).

    >>> import dsv3_jax as ds
    >>> ds.train(["--config", "tiny", "--mesh.data", "1", "--train.steps", "-1"])
    Traceback (most recent call last):
    dsv3_jax.config.rules.UserError: the configuration does not fit together:
      - train.steps=-1 must not be negative
    """
    return run_script("train", argv, *([extensions] if extensions is not None else []))
