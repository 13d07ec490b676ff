"""Pipeline schedules as they run: when each rank did what, and its idle time beside the prediction.

    python -m benchmarks.bench_pipeline                                  # all devices and schedules
    python -m benchmarks.bench_pipeline --virtual 2 --plot pipeline.png   # virtual CPU devices
    python -m benchmarks.bench_pipeline --config configs/h200_slice.py --local 2 --rows 1

Each schedule's gradients of a training step (`training.pipelined`) are timed without stamps, beside
those of the same devices by `data`; then once more with stamps, which callbacks take at the start
and the end of every act of a rank. F, I, W and B are medians between them, of a rank (the table
prints the longest rank's), and so is the hand-over: from the end of a tick's last act to the start
of the next tick's first, stamps included. The prediction lets each tick last as long as its slowest
rank, and the hand-over between two; what is counted beyond it is `rest`: acts that take other than
the median. `bubble` is without stamps: what the step takes beyond the acts' own time, which is that
of the same devices by `data`, and what the schedule has if acts take what they took and ranks
wait for nothing but each other. Without accelerators, devices are
virtual CPU devices: with more of them than cores, acts take each other's time.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    TrainConfig,
    load_config,
)
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.parallel.pipeline import Place
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.parallel.ticks import IDLE, TickTables
from dsv3_jax.training.pipelined import pipelined_gradients
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.stages import plan_stages
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import gradients

SCHEDULES = ("1f1b", "eager_1f1b", "interleaved", "zb1p", "dualpipev")
WHOLE = ("1f1b, whole", "eager_1f1b, whole", "interleaved, whole")  # --pipeline.backward whole
ACTS = "-FIWB"  # by the numbers of a table's ops
COLORS = {"F": "tab:blue", "I": "tab:orange", "W": "tab:green", "B": "tab:red"}


class Stamp(NamedTuple):
    """An edge of an act, in seconds."""

    time: float
    rank: int
    act: str
    chunk: int
    microbatch: int


class Span(NamedTuple):
    """An act of a rank from its start to its end, in seconds."""

    start: float
    end: float
    act: str
    chunk: int
    microbatch: int


def main() -> None:
    """Runs the schedules, prints the table, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--virtual", type=int, default=0, metavar="N", help="CPU devices")
    every = (*SCHEDULES, *WHOLE)
    parser.add_argument("--schedules", nargs="+", default=every, choices=every)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--config", default="", help="a run's model, rows and options instead")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch and device")
    parser.add_argument("--local", type=int, default=1, help="devices of a rank, with its experts")
    parser.add_argument("--jobs", type=int, default=4, help="programs compiled side by side")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.virtual:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.virtual)
    devices, local = jax.device_count(), options.local
    ranks = devices // local
    configs = {n: run_config(n, options, pipe=ranks, local=local) for n in options.schedules}
    by_data = run_config(SCHEDULES[0], options, data=devices)
    tokens = by_data.train.batch_size * by_data.train.seq_len
    print(
        f"{devices} x {jax.devices()[0].device_kind}, pipe {ranks} x local {local}, "
        f"{options.microbatches} micro-batches, ms"
    )
    stamps: list[Stamp] = []
    programs = [
        partial(lowered, by_data, None),
        *(partial(lowered, c, stamps) for c in configs.values()),
    ]
    begun = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        # Lowered one after the other, compiled side by side.
        compiled = [pool.submit(program().compile) for program in programs]
        compiled = [job.result() for job in compiled]
    print(f"lowered and compiled {len(programs)} programs in {time.perf_counter() - begun:.0f} s")
    plain = median_step(compiled[0], inputs(by_data), False)
    print(f"by data: step {1e3 * plain:.1f}, {tokens / plain:,.0f} tokens/s")
    print(
        f"{'schedule':18} {'step':>7} {'tokens/s':>9} {'of data':>7} {'stamped':>8} "
        f"{'F':>6} {'I':>6} {'W':>6} {'B':>6} {'hand-over':>9}  idle: counted, predicted, rest;  "
        "bubble: measured, predicted"
    )
    runs = {}
    for (name, config), step in zip(configs.items(), compiled[1:]):
        # What a schedule needs is given back before the next one's is there.
        runs[name], line = measured(config, step, stamps, plain)
        print(f"{name:18} {line}", flush=True)
    if options.plot:
        draw(runs, options.plot)


def measured(
    config: Config, step: Any, stamps: list[Stamp], plain: float
) -> tuple[list[list[Span]], str]:
    """What each rank did in a stamped step, and a schedule's line of the table.

    plain: seconds of a step of the same devices by `data`.
    """
    arguments, tables = inputs(config), plan_stages(config).tables
    own = median_step(step, arguments, False)
    for _ in range(2):  # the first callbacks take longer
        stamps.clear()
        median_step(step, arguments, True, times=0)
    rows = spans(stamps, config.mesh.pipe)
    times, length = median_times(rows), max(span.end for row in rows for span in row)
    over = median_hand_over(tables, rows)
    counted, predicted = idle_share(rows), predicted_idle_share(tables, times, over)
    bubble, of_schedule = 1 - plain / own, predicted_idle_share(tables, times, 0.0)
    each = " ".join(f"{1e3 * longest:6.2f}" for longest in times.max(0)[1:])
    tokens = config.train.batch_size * config.train.seq_len
    return rows, (
        f"{1e3 * own:7.1f} {tokens / own:9,.0f} {plain / own:7.1%} "
        f"{1e3 * length:8.1f} {each} {1e3 * over:9.2f}  "
        f"{counted:6.1%} {predicted:6.1%} {counted - predicted:+6.1%};  "
        f"{bubble:6.1%} {of_schedule:6.1%}"
    )


def run_config(name: str, options: argparse.Namespace, **mesh: int) -> Config:
    """The given config's, or a model whose layers are alike, so that stages are.

    name: one of SCHEDULES or WHOLE.
    """
    devices = mesh.get("data", 1) * mesh.get("local", 1)
    backward = "whole" if name in WHOLE else "apart"
    train = TrainConfig(seq_len=options.sequence)
    own = Config(model=alike(options), train=train)
    given = load_config(options.config) if options.config else own
    return dataclasses.replace(
        given,
        mesh=ParallelConfig(**mesh),
        pipeline=PipelineConfig(name.split(",")[0], backward),  # pyright: ignore[reportArgumentType]
        expert_parallel=ExpertParallelConfig(transport="auto"),
        train=dataclasses.replace(
            given.train,
            batch_size=options.rows * options.local * options.microbatches,
            micro_batch_size=options.rows * devices,
        ),
    ).validate()


def alike(options: argparse.Namespace) -> ModelConfig:
    """A model of MoE layers alone, of the width and number asked for."""
    width = options.hidden_size
    return ModelConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width // 2,
        num_hidden_layers=options.layers,
        first_k_dense_replace=0,
        num_attention_heads=width // 32,
        q_lora_rank=width // 2,
        kv_lora_rank=width // 4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=options.sequence,
    )


def lowered(config: Config, stamps: list[Stamp] | None) -> Any:
    """The gradients of a step, a program of `inputs` and of whether to take stamps."""
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)

    def of_pipeline(state, rows, settings, wanted):
        edge = partial(stamped, wanted=wanted, record=stamps.append)
        variables = {"params": state.params, "router": state.router}
        return pipelined_gradients(variables, rows, settings, config, layout, 1.0, edge)

    def of_data(state, rows, settings, wanted):
        return gradients(state, rows, settings, config, layout)

    return jax.jit(of_data if stamps is None else of_pipeline).lower(*shapes(config), False)


def inputs(config: Config) -> tuple[Any, Any, StepSettings]:
    """State, rows of random tokens, and settings, for all devices."""
    state, rows, settings = shapes(config)
    make = jax.jit(partial(init_state, config=config), out_shardings=placed(state))
    ids = jax.random.randint(jax.random.key(1), rows.shape, 0, config.model.vocab_size, jnp.int32)
    count = np.int32(len(ids))
    given = StepSettings(np.float32(0), np.float32(0), np.float32(0), count)
    return make(jax.random.key(0)), *jax.device_put((ids, given), placed((rows, settings)))


def shapes(config: Config) -> tuple[Any, Any, StepSettings]:
    """What `inputs` makes, as shapes with their shardings."""
    mesh = make_mesh(config.mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    count = config.train.batch_size // config.micro_batch_size
    shape = (count, config.micro_batch_size, config.train.seq_len + 1)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    settings = StepSettings(number, number, number, jax.ShapeDtypeStruct((), jnp.int32))
    state = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    state, settings = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (state, settings)
    )
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, 1))
    return state, rows, settings


def placed(tree: Any) -> Any:
    """The shardings of a tree's leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def median_step(step: Any, arguments: tuple, wanted: bool, times: int = 3) -> float:
    """Seconds of a step after one that warms up; of that one, if it is the only one."""
    seconds = []
    for _ in range(1 + times):
        begun = time.perf_counter()
        jax.block_until_ready(step(*arguments, wanted))
        jax.effects_barrier()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[min(times, 1) :])


def stamped(op: Any, place: Place, x: Any, wanted: Any, record: Callable[[Stamp], None]) -> Any:
    """What a tick begins or ends with, and a stamp of when, if wanted and not idle."""

    mesh = jax.sharding.get_abstract_mesh()
    inner = set(mesh.axis_names) - set(mesh.manual_axes)

    def on_host(device, rank, op, chunk, microbatch, _):
        now = time.perf_counter()
        if device == 0:  # of a rank's
            record(Stamp(now, int(rank), ACTS[int(op)], int(chunk), int(microbatch)))
        return np.float32(0)

    # What is added holds the program to the order; the array's corner waits for its making.
    values = lax.axis_index("pipe"), op, place.chunk, place.microbatch, x[(0,) * x.ndim]
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    call = jax.shard_map(  # callbacks want every axis manual
        lambda *values: io_callback(on_host, shape, lax.axis_index(tuple(inner)), *values),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=inner,
        check_vma=False,
    )
    zero = lax.cond(wanted & (op != IDLE), call, lambda *values: jnp.zeros(()), *values)
    return x + zero.astype(x.dtype)


def spans(stamps: list[Stamp], ranks: int) -> list[list[Span]]:
    """Starts and ends put together, by rank and in time, from the first start of all on."""
    first = min(stamp.time for stamp in stamps)
    rows: list[list[Span]] = [[] for _ in range(ranks)]
    begun: dict[tuple, float] = {}
    for stamp in sorted(stamps):
        key = stamp[1:]
        if key in begun:
            rows[stamp.rank].append(Span(begun.pop(key), stamp.time - first, *key[1:]))
        else:
            begun[key] = stamp.time - first
    assert not begun, "an act that began has no end"
    return rows


def median_times(rows: list[list[Span]]) -> np.ndarray:
    """Seconds [ranks, acts] by the numbers of ACTS; 0 for an act that there is none of."""

    def median(row: list[Span], act: str) -> float:
        times = [span.end - span.start for span in row if span.act == act]
        return statistics.median(times) if times else 0.0

    return np.array([[median(row, act) for act in ACTS] for row in rows])


def idle_share(rows: list[list[Span]]) -> float:
    """The share of the ranks' time, from the first start to the last end, in which none acts."""
    length = max(span.end for row in rows for span in row)
    busy = sum(span.end - span.start for row in rows for span in row)
    return 1 - busy / (len(rows) * length)


def median_hand_over(tables: TickTables, rows: list[list[Span]]) -> float:
    """Seconds from the end of a tick's last act to the start of the next tick's first."""
    ticks = {}
    for tick, rank in np.argwhere(tables.op != IDLE).tolist():
        op, chunk, m = (int(t[tick, rank]) for t in (tables.op, tables.chunk, tables.microbatch))
        ticks[rank, ACTS[op], chunk, m] = tick
    starts, ends = np.full(len(tables.op), np.inf), np.full(len(tables.op), -np.inf)
    for rank, row in enumerate(rows):
        for span in row:
            tick = ticks[(rank, *span[2:])]
            starts[tick], ends[tick] = min(starts[tick], span.start), max(ends[tick], span.end)
    return float(np.median(starts[1:] - ends[:-1]))


def predicted_idle_share(tables: TickTables, times: np.ndarray, hand_over: float) -> float:
    """The same of the tables: a tick as long as the slowest of its ranks, a hand-over after it."""
    each = times[np.arange(len(times)), tables.op]
    assert (each[tables.op == IDLE] == 0).all()
    length = each.max(1).sum() + (len(each) - 1) * hand_over
    return 1 - each.sum() / (length * each.shape[1])


def draw(runs: dict[str, list[list[Span]]], path: Path) -> None:
    """Writes a PNG: a row a rank, a bar an act with the number of its micro-batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ranks = len(next(iter(runs.values())))
    height = len(runs) * (0.55 * ranks + 0.55)
    figure, panels = pyplot.subplots(
        len(runs), figsize=(12, height), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (name, rows) in zip(panels[:, 0], runs.items(), strict=True):
        for rank, row in enumerate(rows):
            for span in row:
                width, shade = 1e3 * (span.end - span.start), 1.0 if span.chunk == 0 else 0.55
                axes.barh(
                    rank,
                    width,
                    left=1e3 * span.start,
                    height=0.9,
                    color=COLORS[span.act],
                    alpha=shade,
                    edgecolor="white",
                )
                middle = 1e3 * span.start + width / 2
                axes.text(middle, rank, span.microbatch, ha="center", va="center", fontsize=7)
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axes.invert_yaxis()
        axes.set_title(f"{name}: {idle_share(rows):.0%} idle", loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("ms; the second stage of a rank is paler")
    labels = {
        "F": "forward",
        "I": "gradient of the input",
        "W": "gradient of the weights",
        "B": "both gradients",
    }
    seen = {span.act for rows in runs.values() for row in rows for span in row}
    handles = [Patch(color=COLORS[act], label=labels[act]) for act in labels if act in seen]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
