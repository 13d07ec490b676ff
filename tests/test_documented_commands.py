"""Commands in the README and in docs: what they name is there, and their options parse.

Those of the guides are run, by test_guides.py; the others may need hours or devices. Usage lines
count too: of `[--dtype stored|bf16]` the first alternative is read.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from dsv3_jax import cli
from dsv3_jax.config import Config, UserError, load_config
from dsv3_jax.inference.infer_options import InferOptions

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs/figures.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\.venv/bin/)?(?:\./run|python) ")
LEFT_OUT = {"log.md"}  # a diary: what was typed then


def commands_of(page: Path) -> Iterator[str]:
    """The commands in the page's blocks, continued lines joined and comments cut off."""
    for block in BLOCK.findall(page.read_text().replace("\\\n", " ")):
        for line in map(str.strip, block.splitlines()):
            if COMMAND.match(line):
                yield re.sub(r"\s+#.*|\s*&$", "", line)


def words_of(command: str) -> list[str]:
    """Words to parse: of alternatives the first, for variables of the shell a number."""
    command = re.sub(r"\[([^]]*)\]", r"\1", command)
    command = re.sub(r"\((--[^()|]*)\|[^()]*\)", r"\1", command)
    command = re.sub(r"(\w+)(\|\w+)+", r"\1", command)
    return shlex.split(re.sub(r"\$\w+", "0", command.replace(" ... ", " ").removesuffix(" ...")))


def check(command: str) -> None:
    """Raises where a script, a benchmark or a command is not there, or does not take them."""
    program, *words = words_of(command)
    if Path(program).name == "run" and words[0] == "bench":
        words = ["-m", f"benchmarks.bench_{words[1]}", *words[2:]]
    elif Path(program).name == "run":
        words[0] = {"train": "train.py", "infer": "infer.py"}.get(words[0], words[0])
    match words:
        case ["train.py", *options]:
            check_run(options)
        case ["infer.py", *options]:
            cli.parse_options(InferOptions, options, repeated=True).check()
        case ["-m", "dsv3_jax", name, *options]:
            check_sub_command(name, options)
        case ["-m", module, *options]:
            check_text(module.replace(".", "/") + ".py", options)
        case [script, *options] if script.endswith(".py"):
            check_text(script, options)
        case _:
            assert words[0] in {"test", "notebook"}, command


def check_run(options: list[str], config: str = "tiny", validate=Config.validate) -> None:
    """As train.py reads them, but for weights, for which a page has a word."""
    if "--config" in options:
        at = options.index("--config")
        config, options = options[at + 1], options[:at] + options[at + 2 :]
    path = ROOT / config
    default = load_config(path if path.is_file() else config)
    parsed = cli.parse_options(Config, options, default=default)
    validate(dataclasses.replace(parsed, init_from=None, lora=Config().lora))


def check_sub_command(name: str, options: list[str]) -> None:
    command = cli.COMMANDS[name]
    if command.with_run:
        found, rest = tyro.cli(command.options, args=options, return_unknown_args=True)
        check_run(rest, str(found.config), found.validate)
    else:
        positional = Annotated[command.options, tyro.conf.PositionalRequiredArgs]
        cli.parse_options(positional if command.positional else command.options, options)


def check_text(script: str, options: list[str]) -> None:
    """Its options stand in its text; those after -- are train.py's."""
    text = (ROOT / script).read_text()
    if "--" in options:
        at = options.index("--")
        check_run(options[at + 1 :])
        options = options[:at]
    for option in (word for word in options if word.startswith("--")):
        assert f'"{option}"' in text or f" {option[2:].replace('-', '_')}:" in text, option


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in LEFT_OUT], ids=lambda p: p.stem)
def test_commands_of_a_page_parse(page):
    for command in commands_of(page):
        try:
            check(command)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_commands_are_found():
    assert sum(len([*commands_of(page)]) for page in PAGES) > 30


@pytest.mark.parametrize(
    "command, error",
    [
        ("python -m benchmarks.bench_step --never", AssertionError),
        ("python -m benchmarks.bench_nothing", FileNotFoundError),
        ("./run train --train.batch-size 0", UserError),
        ("./run infer --checkpoint runs/tiny", UserError),
        ("python -m dsv3_jax evaluate --checkpoint RUN --never", SystemExit),
        ("python -m dsv3_jax compile --config tiny --topology h200:1 --never 1", SystemExit),
        ("python -m dsv3_jax nothing", KeyError),
    ],
)
def test_a_command_that_is_not_there_is_found(command, error):
    with pytest.raises(error):
        check(command)


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


def test_every_figure_has_its_command():
    rows = measured_rows()
    assert len(rows) > 10
    for row, cell in rows:
        commands = [c for c in re.findall(r"`([^`]+)`", cell) if COMMAND.match(c)]
        assert commands, row
        for command in commands:
            check(command)
