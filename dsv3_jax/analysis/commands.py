"""What `python -m dsv3_jax estimate | plan | simulate | reproduce | what-if` do.

Plain functions of frozen dataclasses, so that a notebook calls them as the command line does. Each
prints a table and, when asked, writes JSON and a PNG; the return value is the exit code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from dsv3_jax.analysis import charts, reproduce, topology, what_if
from dsv3_jax.analysis.calibration import calibrate
from dsv3_jax.analysis.estimate import (
    DEFAULT_EFFICIENCY,
    StepEstimate,
    estimate_step,
    leaves_domain,
)
from dsv3_jax.analysis.hardware import Accelerator, accelerator, nearest
from dsv3_jax.analysis.model_cost import (
    activated_parameters,
    kv_bytes_per_token,
    parameters,
    training_flops_per_token,
)
from dsv3_jax.analysis.output import table, write_json
from dsv3_jax.analysis.planner import Goal, plan_decoding, plan_training
from dsv3_jax.analysis.scenarios import SimulateOptions, simulate
from dsv3_jax.analysis.serving import DecodeEstimate, estimate_decode
from dsv3_jax.analysis.study import plot_study
from dsv3_jax.config import Config, QuantConfig, UserError, load_config
from dsv3_jax.parallel.schedules import SCHEDULES

PLANES = 8  # of the network that estimate prices, as in the ISCA paper's cluster


@dataclass(frozen=True)
class MeshOptions:
    """Axis sizes that replace those of the config; None keeps the config's."""

    pipe: int | None = None
    data: int | None = None
    node: int | None = None
    local: int | None = None
    context: int | None = None
    tensor: int | None = None


@dataclass(frozen=True)
class EstimateOptions:
    """What a run costs: memory a device, step time, MFU, tokens a second, TPOT, dollars."""

    config: Path  # a Python file with get_config(), as in configs/
    hardware: str = "h800"  # a known accelerator, "host" (this CPU, measured), or a JSON file
    mesh: MeshOptions = field(default_factory=MeshOptions)
    schedule: str = "1f1b"  # 1f1b, eager_1f1b, interleaved, zb1p, dualpipe or dualpipev
    batch_size: int | None = None  # sequences a step; None: the config's, and so below
    micro_batch_size: int | None = None
    seq_len: int | None = None
    remat: Literal["none", "dots", "v3", "full"] | None = None
    quant_preset: str | None = None  # e.g. fp8_paper; the cost model reads only whether it is FP8
    decode_batch: int = 32  # requests on each device
    decode_context: int = 4096  # cached tokens of each
    mtp_acceptance: float | None = None  # decode speculatively with the MTP module
    price_per_hour: float | None = None  # dollars a device; None: the accelerator's, if sourced
    measured_tokens_per_second: float | None = None  # calibrate the efficiency on this
    json: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class PlanOptions:
    """The best ways to lay a model out on a cluster, with the bottleneck of each."""

    config: Path
    devices: int
    hardware: str = "h800"
    goal: Goal = "training"
    batch: int = 1024  # requests on all devices, for the goal tpot
    context: int = 4096  # cached tokens of each request, for the goal tpot
    best: int = 5
    price_per_hour: float | None = None
    json: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class ReproduceOptions:
    """Recompute the papers' tables and figure shapes; exits with 1 when one is off."""

    json: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class WhatIfOptions:
    """Weigh the ISCA paper's hardware recommendations; see docs/codesign.md."""

    study: str = "all"
    plots: Path | None = None  # a folder, one PNG a study
    json: Path | None = None


def estimate(options: EstimateOptions) -> int:
    """Prints what training and decoding the config would take on the hardware; 0."""
    config = _configured(options)
    device = _priced(options.hardware, options.price_per_hour)
    if options.schedule not in SCHEDULES:
        raise UserError(
            f"unknown schedule {options.schedule!r}: {nearest(options.schedule, SCHEDULES)}"
        )
    efficiency = DEFAULT_EFFICIENCY
    if options.measured_tokens_per_second is not None:
        efficiency = calibrate(
            config, device, options.measured_tokens_per_second, options.schedule, "this measurement"
        )
    step = estimate_step(config, device, options.schedule, efficiency)
    # Decoding holds the whole model on the expert axes: the pipeline's ranks serve as replicas.
    flat = dataclasses.replace(config.mesh, pipe=1, data=config.mesh.data * config.mesh.pipe)
    decode = estimate_decode(
        dataclasses.replace(config, mesh=flat),
        device,
        options.decode_batch,
        options.decode_context,
        efficiency,
        mtp_acceptance=options.mtp_acceptance,
    )
    _print_estimate(config, device, efficiency.source, step, decode)
    if options.json:
        write_json(
            options.json,
            {
                "device": device,
                "efficiency": efficiency,
                "config": config,
                "training": step,
                "decoding": decode,
            },
        )
    if options.plot:
        charts.plot_estimate(
            {"train": step.parts, "decode": decode.parts},
            {"train": step.memory, "decode": decode.memory},
            device.hbm_bytes,
            options.plot,
        )
    return 0


def _configured(options: EstimateOptions) -> Config:
    """The config of --config with the options that are given in place of its own."""
    config = load_config(options.config)
    given = {k: v for k, v in vars(options.mesh).items() if v is not None}
    names = ("batch_size", "micro_batch_size", "seq_len", "remat")
    changed = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **given),
        train=dataclasses.replace(config.train, **changed),
    )
    if options.quant_preset is not None:
        known = get_args(get_type_hints(QuantConfig)["preset"])
        if options.quant_preset not in known:
            raise UserError(
                f"unknown quant preset {options.quant_preset!r}: "
                f"{nearest(options.quant_preset, known)}"
            )
        quant = dataclasses.replace(config.quant, preset=options.quant_preset)  # pyright: ignore
        config = dataclasses.replace(config, quant=quant)
    _tell_adapters(config)
    return config.validate()


def _tell_adapters(config: Config) -> None:
    if rank := config.lora.rank:
        print(f"lora.rank={rank} is not modelled: the figures are of training all weights")


def _priced(name: str, price: float | None) -> Accelerator:
    device = accelerator(name)
    return device if price is None else dataclasses.replace(device, price_per_hour=price)


def _mfu_with_mtp(config: Config, step: StepEstimate) -> tuple[str, list[list[Any]]]:
    """The paper leaves MTP's FLOPs out of its MFU, a run's metrics count them: a remark on the
    first, and a row with the second."""
    if not config.model.num_nextn_predict_layers:
        return "", []
    flops = training_flops_per_token(config.model, config.train.seq_len, mtp=True)
    counted = 100 * step.mfu * flops / step.flops_per_token
    return "; MTP left out, as in the paper", [
        ["MFU, MTP counted", counted, "% of BF16 peak, causal; as train.py logs it"]
    ]


def _print_estimate(
    config: Config, device: Accelerator, source: str, step: StepEstimate, decode: DecodeEstimate
) -> None:
    count = parameters(config.model)
    print(f"{device.name}: {device.source}")
    print(f"efficiency: {source}")
    print(f"mesh: {charts.describe_mesh(config.mesh)}; {step.devices:,} devices\n")
    dollars = "no price: give --price-per-hour"
    network: list[list[Any]] = []
    if (
        leaves_domain(config.mesh, device)
        and step.devices <= PLANES * 2048
        and not step.devices % PLANES
    ):
        fabric = topology.fitted_fat_tree_2(step.devices, planes=PLANES)
        millions = topology.cost(fabric) / 1e6
        network = [[f"network, {PLANES} planes", millions, "M$, 64-port switches, fitted prices"]]
    alone, with_mtp = _mfu_with_mtp(config, step)
    rows: list[list[Any]] = [
        ["parameters, main model", count.main, ""],
        ["parameters, MTP", count.mtp, ""],
        ["parameters activated", activated_parameters(config.model), ""],
        ["KV cache a token", kv_bytes_per_token(config.model), "bytes, BF16"],
        ["training FLOPs a token", step.flops_per_token / 1e9, f"GFLOP, causal{alone}"],
        ["training step", step.seconds, "s"],
        *([] if step.in_ticks is None else [["the same in ticks", step.in_ticks, "s"]]),
        ["training rate", step.tokens_per_second, "tokens/s"],
        ["MFU", 100 * step.mfu, f"% of BF16 peak, causal{alone}"],
        *with_mtp,
        ["training cost", step.dollars_per_million_tokens or dollars, "$ a million tokens"],
        ["training bottleneck", step.bottleneck, ""],
        ["TPOT", decode.tpot * 1e3, "ms"],
        ["decode rate", decode.tokens_per_second, "tokens/s, all devices"],
        ["decode cost", decode.dollars_per_million_tokens or dollars, "$ a million tokens"],
        ["decode bottleneck", decode.bottleneck, ""],
        *network,
    ]
    print(table(["what", "value", "unit"], rows))
    print()
    names = list(vars(step.memory))
    print(
        table(
            ["GB a device", *names, "total", "of"],
            [
                [name, *(v / 1e9 for v in vars(m).values()), m.total / 1e9, device.hbm_bytes / 1e9]
                for name, m in (("training", step.memory), ("decoding", decode.memory))
            ],
        )
    )
    for name, memory in (("training", step.memory), ("decoding", decode.memory)):
        if memory.total > device.hbm_bytes:
            print(f"{name} does not fit: {memory.total / device.hbm_bytes:.2f} times the memory")
    print()
    for name, parts in (("training", step.parts), ("decoding", decode.parts)):
        total = sum(parts.values())
        print(table([name, "s", "%"], [[k, v, 100 * v / total] for k, v in parts.items()]))
        print()


def plan(options: PlanOptions) -> int:
    """Prints the best plans for the goal, each with its bottleneck; 0."""
    config = load_config(options.config)
    _tell_adapters(config)
    device = _priced(options.hardware, options.price_per_hour)
    if options.goal == "training":
        search = plan_training(config, device, options.devices, options.best)
        headers = [
            "mesh",
            "schedule",
            "state",
            "micro-batch",
            "remat",
            "step s",
            "in ticks s",
            "tokens/s",
            "MFU %",
            "GB",
            "bottleneck",
        ]
        rows: list[list[Any]] = []
        for p in search.plans:
            e = p.estimate
            assert isinstance(e, StepEstimate)
            rows.append(
                [
                    charts.describe_mesh(p.mesh),
                    p.schedule,
                    p.state,
                    p.micro_batch_size,
                    p.remat,
                    e.seconds,
                    "" if e.in_ticks is None else e.in_ticks,
                    e.tokens_per_second,
                    100 * e.mfu,
                    e.memory.total / 1e9,
                    e.bottleneck,
                ]
            )
    else:
        search = plan_decoding(
            config, device, options.devices, options.batch, options.context, options.best
        )
        headers = ["mesh", "batch a device", "TPOT ms", "tokens/s", "GB", "bottleneck"]
        rows = [
            [
                charts.describe_mesh(p.mesh),
                p.batch,
                1e3 / p.score,
                p.estimate.tokens_per_second,
                p.estimate.memory.total / 1e9,
                p.estimate.bottleneck,
            ]
            for p in search.plans
        ]
    print(f"{options.devices:,} x {device.name}, goal {options.goal}: best of {search.tried:,}\n")
    print(table(headers, rows))
    if options.goal == "training" and config.model.num_nextn_predict_layers:
        print("MFU: MTP's FLOPs left out, as in the paper; its time counts")
    for reason, count in search.dropped.items():
        print(f"dropped {count:,}: {reason}")
    if options.json:
        write_json(options.json, {"device": device, "search": search})
    if options.plot:
        charts.plot_plans(search, options.plot)
    return 0


def reproduce_tables(options: ReproduceOptions) -> int:
    """Prints every compared value with its ratio, and what is left out; 1 when one is off."""
    rows = reproduce.rows()
    print(
        table(
            ["table", "value", "paper", "ours", "ratio", "ok", "note"],
            [[r.table, r.name, r.paper, r.ours, r.ratio, r.ok, r.note] for r in rows],
        )
    )
    print()
    left = [[out.table, out.name, out.reason] for out in reproduce.LEFT_OUT]
    print(table(["left out", "value", "why"], left))
    off = [row for row in rows if not row.ok]
    print(f"\n{len(rows)} values compared, {len(off)} off; {len(left)} left out")
    for row in off:
        print(f"off: {row.table}, {row.name}: {row.ours:g} for {row.paper:g}")
    if options.json:
        entries = [vars(r) | {"ratio": r.ratio, "ok": r.ok} for r in rows]
        write_json(
            options.json, {"rows": entries, "left_out": [vars(x) for x in reproduce.LEFT_OUT]}
        )
    if options.plot:
        charts.plot_rows(rows, options.plot)
    return 1 if off else 0


def weigh(options: WhatIfOptions) -> int:
    """Prints the chosen what-if studies, and draws them when asked; 0."""
    names = list(what_if.STUDIES) if options.study == "all" else [options.study]
    if names[0] not in what_if.STUDIES:
        raise UserError(f"unknown study {names[0]!r}: {nearest(names[0], what_if.STUDIES)}")
    studies = [what_if.STUDIES[name]() for name in names]
    for study in studies:
        print(f"{study.name}\n{table(study.headers, study.rows)}\n")
        if options.plots:
            plot_study(study, options.plots / f"{study.name}.png")
    if options.json:
        write_json(options.json, studies)
    return 0


# Sub-command name: its options, and what runs them and returns the exit code.
COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "estimate": (EstimateOptions, estimate),
    "plan": (PlanOptions, plan),
    "simulate": (SimulateOptions, simulate),
    "reproduce": (ReproduceOptions, reproduce_tables),
    "what-if": (WhatIfOptions, weigh),
}
