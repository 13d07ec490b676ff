"""Command lines: options on frozen dataclasses (tyro), exit codes, and `python -m dsv3_jax`.

`python -m dsv3_jax train ...` and `infer ...` run train.py and infer.py, which an installed package
has inside.

Exit codes: 0 done, 1 the environment failed (disk, backend, damaged files), 2 the user's mistake,
143 and 130 stopped by SIGTERM and SIGINT with the state saved. A traceback is shown only for our
own bugs, or with DSV3_DEBUG=1.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from dsv3_jax import running
from dsv3_jax.analysis.commands import COMMANDS as ANALYSES
from dsv3_jax.compiling.command import CompileOptions
from dsv3_jax.compiling.command import run as run_compile
from dsv3_jax.config import Config, RunError, UserError, load_config
from dsv3_jax.config.files import check_folder_of
from dsv3_jax.interop.commands import (
    ExportOptions,
    ImportOptions,
    LogitsOptions,
    run_export,
    run_import,
    run_logits,
)
from dsv3_jax.serving.options import ServeOptions

if TYPE_CHECKING:
    from dsv3_jax.starting import Weights

log = logging.getLogger(__name__)
Options = TypeVar("Options")

EXIT_ENVIRONMENT = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command line and exits with its code, turning expected errors into one message."""
    try:
        code = main(sys.argv[1:]) or 0
    except SystemExit as stopped:  # by a signal, or by wrong options
        _leave(stopped.code)
    except KeyboardInterrupt:  # where no run handles it
        _leave(EXIT_INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, UserError | RunError | OSError | NotImplementedError)
        if expected and not os.environ.get("DSV3_DEBUG"):
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        elif _one_of_several_processes():
            if type(error).__name__ == "JaxRuntimeError":
                time.sleep(2)  # of another's death `parallel/peers.py` tells, and ends this process
            traceback.print_exc()
        else:
            raise
        _leave(EXIT_USER if isinstance(error, UserError) else EXIT_ENVIRONMENT)
    if not _one_of_several_processes():  # those wait for each other, and must be stoppable
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # all is done: the exit code stays
    sys.exit(code)


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor spelt out: names come from strangers."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _one_of_several_processes() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _leave(code: Any) -> NoReturn:
    """Ends with this code; one of several processes does not wait for the others."""
    if isinstance(code, int) and _one_of_several_processes():
        from dsv3_jax.parallel.hosts import leave

        leave(code)
    if isinstance(code, int) and code >= 128:
        # By a signal: threads of XLA may be at work, and taking the interpreter down under them
        # can end in a segmentation fault in place of the code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse_options(
    kind: type[Options], argv: Sequence[str], *, repeated: bool = False, **about: Any
) -> Options:
    """The dataclass `kind` filled from `argv`; wrong options exit with 2 and name the nearest.

    repeated: a list's option is given once for each of its members; about: for tyro.
    """
    markers = (tyro.conf.AvoidSubcommands, *[tyro.conf.UseAppendAction] * repeated)
    return tyro.cli(kind, args=list(argv), config=markers, **about)


def parse_config(argv: Sequence[str], **how: Any) -> Config:
    """The Config of `parse_run`."""
    return parse_run(argv, **how)[0]


def parse_run(
    argv: Sequence[str],
    *,
    default_config: str | Path = "tiny",
    description: str,
    validate: Callable[[Config], Config] = Config.validate,
) -> tuple[Config, "Weights | None"]:
    """The run's Config: that of --config FILE (or of default_config), overridden by the options.

    Beside it the weights of --init-from, opened once: the defaults of all other options depend on
    them. Raises UserError for a config file that cannot be used or values that do not fit together.
    """
    argv = list(argv)
    path: Path | None = None
    for i, word in enumerate(argv):
        option, joined, value = word.partition("=")
        if option == "--config":
            if not joined and i + 1 == len(argv):
                raise UserError("--config needs the path of a Python file")
            path = Path(value if joined else argv[i + 1])
            del argv[i : i + 1 + (not joined)]
            break
    config, weights = load_config(path or default_config), None
    if folder := _init_from(argv) or config.init_from:
        from dsv3_jax import starting

        weights = starting.open_weights(folder)
        config = starting.with_model_of(config, weights)
    description += (
        "\n\n--config FILE picks a Python file with a get_config(), as in configs/, or one of "
        "those by its name."
    )
    config = parse_options(Config, argv, default=config, description=description)
    if weights is not None:
        from dsv3_jax import starting

        starting.check_model(config, weights)
    return validate(config), weights


def _init_from(argv: Sequence[str]) -> str | None:
    """What --init-from names; given twice, the last one counts, as for all options."""
    found = None
    for word, following in zip(argv, [*argv[1:], ""]):
        option, _, value = word.partition("=")
        if option.replace("_", "-") == "--init-from":
            found = value or following
    return found or None


def use_virtual_devices(count: int | None, *, all_cores: bool = False) -> None:
    """Makes JAX run on `count` virtual CPU devices; to be called before JAX is used. None: no.

    all_cores: where JAX finds nothing but CPUs, every core is a device, unless `count` is given.
    Raises RuntimeError, JAX's own, where JAX is already used. Source: this project
    (docs/parallelism.md).

    >>> import dsv3_jax as ds
    >>> ds.use_virtual_devices(None)  # as JAX finds them
    """
    import jax

    if count is not None:
        jax.config.update("jax_platforms", "cpu")
    elif all_cores:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count is not None:
        jax.config.update("jax_num_cpu_devices", count)


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenise text into the shards that --data.path reads."""

    inputs: tyro.conf.Positional[
        list[Path]
    ]  # .txt, .jsonl, .jsonl.gz, .parquet, or folders of text
    out: Path  # the folder to write
    tokenizer: str = "byte"  # "byte", or the path of a tokenizer.json
    train_tokenizer: int | None = None  # first train a BPE of this size on the inputs
    val_fraction: float = 0.02
    fim_rate: float = 0.1
    seed: int = 0
    text_field: str = "text"  # of JSON lines and parquet
    chat_template: Path | None = None
    """For conversations: None is the template beside the tokenizer, or else DeepSeek-V3's form."""
    on_error: Literal["stop", "skip"] = "stop"
    """A conversation that cannot be read ends it, or is left out and counted."""


def prepare(options: PrepareOptions) -> None:
    """python -m dsv3_jax prepare"""
    from dsv3_jax.data.corpus import prepare as prepare_corpus
    from dsv3_jax.data.documents import find_files, read_documents
    from dsv3_jax.data.supervised import holds_conversations
    from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer

    if not options.inputs:
        raise UserError("prepare needs at least one input file or folder")
    if options.out.exists():
        raise UserError(f"{options.out} exists: choose another output folder")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = options.tokenizer
        if options.train_tokenizer is not None:
            if options.tokenizer != "byte":
                raise UserError("--train-tokenizer makes a tokenizer: leave out --tokenizer")
            tokenizer_file = str(Path(folder) / "tokenizer.json")
            documents = read_documents(find_files(options.inputs), options.text_field)
            train_tokenizer(documents, options.train_tokenizer, tokenizer_file)
        tokenizer = load_tokenizer(tokenizer_file)
        if holds_conversations(options.inputs):
            summary = _prepare_conversations(options, tokenizer)
        else:
            if options.chat_template is not None:
                raise UserError(f"--chat-template: {options.inputs[0]} holds no conversations")
            summary = prepare_corpus(
                options.inputs,
                options.out,
                tokenizer,
                val_fraction=options.val_fraction,
                fim_rate=options.fim_rate,
                seed=options.seed,
                text_field=options.text_field,
            )
    print(summary)
    name = "byte" if tokenizer_file == "byte" else options.out  # it holds its tokenizer.json
    print(f"train with --data.path {options.out} --data.tokenizer {name}")


def _prepare_conversations(options: PrepareOptions, tokenizer: Any) -> Any:
    from dsv3_jax.data.supervised import find_template, prepare_supervised

    template = find_template(options.chat_template, Path(options.tokenizer), tokenizer)
    return prepare_supervised(
        *(options.inputs, options.out, tokenizer, template),
        val_fraction=options.val_fraction,
        seed=options.seed,
        on_error=options.on_error,
    )


@dataclass(frozen=True)
class ReportOptions:
    """Draw a run's plots from its metrics.jsonl, or write it as one page."""

    run_dir: tyro.conf.Positional[Path]
    html: bool = False  # one self-contained page, RUN/report.html, in place of plots


def draw_plots(run_dir: Path) -> None:
    """Writes plots/*.png where matplotlib is installed, and says so where it is not."""
    try:
        from dsv3_jax.analysis.report import write_report

        for path in write_report(run_dir):
            log.info("wrote %s", path)
    except (ImportError, UserError, OSError) as error:
        log.warning("no plots: %s; later: python -m dsv3_jax report %s", error, run_dir)


def report(options: ReportOptions) -> None:
    """python -m dsv3_jax report"""
    from dsv3_jax.analysis.report import write_report
    from dsv3_jax.analysis.report_page import write_page

    written = [write_page(options.run_dir)] if options.html else write_report(options.run_dir)
    print(*written, sep="\n")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model on a text or on prepared data: nats, bits, perplexity, drafts, experts."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    text: Path | None = None  # a text file, read whole
    data: Path | None = None  # a folder that `prepare` wrote; its validation side is read
    tokenizer: str | None = None  # None: the one the model was trained with
    step: str = "auto"  # of a run: the newest valid one, or its number
    seq_len: int = 512  # tokens of a row
    batch_size: int = 4
    batches: int = 64  # at most, of prepared data
    json: Path | None = None  # also write all numbers to this file


def evaluate(options: EvaluateOptions) -> None:
    """python -m dsv3_jax evaluate"""
    from dsv3_jax.evaluating import evaluate as evaluate_checkpoint

    asked = dataclasses.asdict(options)
    if (target := asked.pop("json")) is not None:
        check_folder_of(target, "--json")
    found = evaluate_checkpoint(**asked)
    for name, value in found.items():
        if name not in ("expert_load", "dead_experts"):
            print(f"{name:16} {_shown(value)}")
    if target is not None:
        target.write_text(json.dumps(found, indent=2) + "\n")
        print(f"wrote {target}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class VerifyOptions:
    """Read a run, an import, a Hugging Face folder or prepared data whole; name what is damaged."""

    folder: Path


def verify(options: VerifyOptions) -> int:
    """python -m dsv3_jax verify DIR: exit code 0 when all is whole, 1 when something is damaged."""
    from dsv3_jax import verifying

    kind, damaged = verifying.verify(options.folder)
    for problem in damaged:
        print(f"damaged: {printable(problem)}")
    print(f"{options.folder} is {kind}: " + (f"{len(damaged)} damaged" if damaged else "whole"))
    return EXIT_ENVIRONMENT if damaged else 0


def import_hf(options: ImportOptions) -> None:
    """python -m dsv3_jax import-hf SRC DST"""
    run_import(options)


def export_hf(options: ExportOptions) -> None:
    """python -m dsv3_jax export-hf SRC DST"""
    from dsv3_jax.loading import open_run

    run_export(options, open_run)


def logits(options: LogitsOptions) -> None:
    """python -m dsv3_jax logits --checkpoint DIR --tokens FILE --out FILE"""
    from dsv3_jax.loading import open_run

    run_logits(options, open_run)


def compile_for(options: CompileOptions, of_run: Sequence[str]) -> int:
    """python -m dsv3_jax compile --config FILE --topology NAME [options of train.py]"""
    how = {"description": "Options of the run that is compiled.", "validate": options.validate}
    return run_compile(options, parse_config(of_run, default_config=options.config, **how))


def serve(options: ServeOptions) -> None:
    """python -m dsv3_jax serve --checkpoint DIR"""
    use_virtual_devices(options.devices)
    from dsv3_jax.serving.command import serve as run_server

    run_server(options)


@dataclass(frozen=True)
class Command:
    """One sub-command: its options and what runs it."""

    options: type
    run: Callable[..., int | None] = field(repr=False)
    positional: bool = False  # its options without a default are words, not --options
    with_run: bool = False  # it is also given what its options leave over, a run's options


COMMANDS = {
    "prepare": Command(PrepareOptions, prepare),
    "report": Command(ReportOptions, report),
    "import-hf": Command(ImportOptions, import_hf, positional=True),
    "export-hf": Command(ExportOptions, export_hf, positional=True),
    "verify": Command(VerifyOptions, verify, positional=True),
    "evaluate": Command(EvaluateOptions, evaluate),
    "logits": Command(LogitsOptions, logits),
    "serve": Command(ServeOptions, serve),
    "compile": Command(CompileOptions, compile_for, with_run=True),
    **{name: Command(options, run) for name, (options, run) in ANALYSES.items()},
}


def main(argv: Sequence[str]) -> int | None:
    """`python -m dsv3_jax COMMAND ...`: parses the sub-command's options and runs it."""
    if not argv:
        argv = ["--help"]
    command = COMMANDS.get(argv[0])
    if command is not None and command.with_run:
        prog = f"python -m dsv3_jax {argv[0]}"
        options, of_run = tyro.cli(
            command.options, args=list(argv[1:]), prog=prog, return_unknown_args=True
        )
        return command.run(options, of_run)
    if argv[0] in running.SCRIPTS:
        return running.run_script(argv[0], argv[1:])
    choices = tuple(
        Annotated[
            Annotated[c.options, tyro.conf.PositionalRequiredArgs] if c.positional else c.options,
            tyro.conf.subcommand(name, prefix_name=False),
        ]
        for name, c in COMMANDS.items()
    )
    union: Any = choices[0]
    for choice in choices[1:]:
        union = union | choice
    options = tyro.cli(union, args=list(argv), prog="python -m dsv3_jax", description=__doc__)
    chosen = next(c for c in COMMANDS.values() if c.options is type(options))
    return chosen.run(options)
