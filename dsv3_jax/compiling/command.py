"""`python -m dsv3_jax compile`: a program for devices that are not here, and what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsv3_jax.analysis.charts import describe_mesh
from dsv3_jax.analysis.estimate import StepEstimate
from dsv3_jax.analysis.output import table, write_json
from dsv3_jax.analysis.planner import plan_training
from dsv3_jax.compiling.apart import Task, compile_apart
from dsv3_jax.compiling.text import GIB, lines, over
from dsv3_jax.config import Config, RunError, UserError

if TYPE_CHECKING:  # they import jax, for which a command line that asks for help need not wait
    from dsv3_jax.compiling.report import Report
    from dsv3_jax.compiling.targets import Target


@dataclass(frozen=True)
class CompileOptions:
    """Compile a step for GPUs or TPUs that are not here: memory, FLOPs and bytes between devices.

    Every option of train.py is understood too, such as --mesh.data 32 or --quant.preset bf16.
    """

    config: Path  # a Python file with get_config(), as in configs/
    topology: str  # h200:256x8, h100:32x8, v5p:8x16x16, v6e:16x16, tpu7x:4x4x8, ...
    program: Literal["train", "prefill", "decode"] = "train"
    batch: int | None = None  # prefill, decode: sequences on all devices; None: one (32) a device
    context: int = 4096  # prefill: tokens of a prompt; decode: of the cache
    redundant_experts: int = 0  # prefill, decode: places for experts beyond one each
    fp8_weights: bool = True  # prefill, decode: projections held in FP8, as published
    fp8_cache: bool = False  # decode: latents held in FP8
    micro_batches: int = 1  # decode: 2 computes half of the sequences beside the others' exchange
    plan: int = 0  # train: search meshes for the topology, and compile this many of the best
    remedies: int = 2  # tried when it does not fit; each is compiled
    json: Path | None = None
    plot: Path | None = None
    hlo: Path | None = None  # keep the compiled program's text

    def validate(self, config: Config) -> Config:
        """The config of the run, or UserError where it does not fit the program."""
        if self.program == "train":
            return config.validate()
        return config.validate_to_serve(self.redundant_experts)


# The programs, or the search, that an option is for; where it is given elsewhere, it is refused.
_FOR = {
    "batch": ("prefill", "decode"),
    "context": ("prefill", "decode"),
    "redundant_experts": ("prefill", "decode"),
    "fp8_weights": ("prefill", "decode"),
    "fp8_cache": ("decode",),
    "micro_batches": ("decode",),
    "plan": ("train",),
}
_NOT_WITH_PLAN = ("remedies", "plot", "hlo")


def _check(options: CompileOptions) -> None:
    """Raises UserError for an option that the program asked for would not read."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = [name for name, value in defaults.items() if getattr(options, name) != value]
    for name in given:
        flag = "--" + name.replace("_", "-")
        if options.program not in _FOR.get(name, (options.program,)):
            raise UserError(f"{flag} is for --program {' or '.join(_FOR[name])}")
        if options.plan and name in _NOT_WITH_PLAN:
            raise UserError(f"{flag} is for one program: leave it out, or leave out --plan")
    for name in ("plan", "remedies"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} must not be negative")


def run(options: CompileOptions, config: Config) -> int:
    """Compiles, prints and writes; 1 when the program does not fit the topology's devices."""
    from dsv3_jax.compiling import targets

    _check(options)
    target = targets.parse_topology(options.topology)
    if reason := targets.missing(target.platform):
        raise UserError(reason)
    from dsv3_jax.compiling import programs, remedies
    from dsv3_jax.parallel.mesh import fill_mesh

    config = fill_mesh(config, target.num_devices)

    def serving() -> programs.Serving | None:
        if options.program == "train":
            return None
        each = 32 if options.program == "decode" else 1
        tokens_on = config.mesh.data * config.mesh.node * config.mesh.local
        return programs.Serving(
            options.batch or each * tokens_on,
            options.context,
            options.redundant_experts,
            options.fp8_weights,
            options.fp8_cache,
            options.micro_batches,
        )

    def compiled(
        config: Config, what: programs.Serving | None = None, hlo: Path | None = None
    ) -> Report:
        return compile_apart(Task(config, target.name, options.program, what, hlo))

    what = serving()
    if options.plan:
        return _planned(options, config, target, compiled)
    report = compiled(config, what, options.hlo)
    for line in lines(report, target.accelerator):
        print(line)
    tried = []
    if not report.fits:
        print(f"\ndoes not fit: {over(report.peak, report.capacity)}")
        offers = (
            remedies.of_training(config)
            if what is None
            else remedies.of_serving(config, what, options.program == "decode")
        )
        for remedy in offers[: options.remedies]:
            after = compiled(remedy.config, remedy.serving or what)
            tried.append({"option": remedy.option, "peak": after.peak, "fits": after.fits})
            verdict = "fits" if after.fits else over(after.peak, after.capacity)
            print(
                f"with {remedy.option}: {after.peak / GIB:.1f} GiB instead of "
                f"{report.peak / GIB:.1f}, {verdict} ({remedy.costs})"
            )
        if not tried:
            print("nothing cheap is left to try: more devices, or a smaller batch")
    if options.json:
        values = dataclasses.asdict(report) | {
            "fits": report.fits,
            "config": config,
            "serving": what,
            "remedies": tried,
        }
        write_json(options.json, values)
    if options.plot:
        from dsv3_jax.compiling.picture import draw

        print(f"wrote {draw(report, target.accelerator, options.plot)}")
    return 0 if report.fits else 1


def _planned(
    options: CompileOptions, config: Config, target: Target, compiled: Callable[[Config], Report]
) -> int:
    """The best plans for the topology that compile, in a table; 1 when none of them fits.

    A plan that cannot be compiled is told in one line, and the next one is taken.
    """
    search = plan_training(config, target.accelerator, target.num_devices, best=4 * options.plan)
    candidates = [(plan, plan.configured(config)) for plan in search.plans]
    runnable = [(plan, run) for plan, run in candidates if plan.executed and not run.problems()]
    others = sorted({plan.schedule for plan in search.plans if not plan.executed})
    if others:
        print(f"left out: plans under {', '.join(others)}, which training does not run")
    if not runnable:
        found = next((run.problems() for _, run in candidates if run.problems()), [])
        raise UserError(f"none of the best {len(candidates)} plans can run: {'; '.join(found)}")
    rows, results = [], []
    for plan, planned in runnable:
        if len(rows) == options.plan:
            break
        name = describe_mesh(plan.mesh, plan.schedule if plan.mesh.pipe > 1 else plan.state)
        print(f"compiling {name}, micro-batch {plan.micro_batch_size}", flush=True)
        try:
            report = compiled(planned)
        except RunError as error:
            print(f"  left out: {error}")
            results.append({"plan": plan, "refused": str(error)})
            continue
        assert isinstance(plan.estimate, StepEstimate)
        expected, peak = plan.estimate.memory.total / GIB, report.peak / GIB
        seconds = plan.estimate.seconds
        rows.append([name, plan.micro_batch_size, plan.remat, seconds, expected, peak, report.fits])
        results.append({"plan": plan, "report": dataclasses.asdict(report)})
    if options.json:
        write_json(options.json, results)
    if not rows:
        raise RunError(f"none of {len(runnable)} plans for {target.name} compiles")
    print(f"{target.name}: the best of {search.tried:,} plans, compiled\n")
    headers = ["mesh", "micro-batch", "remat", "step s", "GiB planned", "compiled", "fits"]
    print(table(headers, rows))
    return 0 if any(row[-1] for row in rows) else 1
