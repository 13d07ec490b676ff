"""Pipeline schedules as they run: when each rank did what, and its idle time beside the prediction.

    python -m benchmarks.bench_pipeline                                  # all devices and schedules
    python -m benchmarks.bench_pipeline --virtual 2 --plot pipeline.png   # virtual CPU devices

Time stamps are taken by callbacks at the start and the end of every act of a rank, in the gradients
of a training step (`training.pipelined`), one after the other after a first run that compiles. The
prediction takes the median time of F, I and W and lets each tick last as long as its slowest rank,
because all ranks meet at the hand-over. Without accelerators, devices are virtual CPU devices: with
more of them than cores, acts take each other's time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec

from dsv3_jax.config import Config, ModelConfig, ParallelConfig, PipelineConfig, TrainConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline import RankActs
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.parallel.ticks import IDLE, TickTables
from dsv3_jax.training.pipelined import pipelined_gradients
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.stages import plan_stages
from dsv3_jax.training.state import init_state

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipev")
ACTS = "-FIW"  # by the numbers of a table's ops
COLORS = {"F": "tab:blue", "I": "tab:orange", "W": "tab:green"}


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
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.virtual:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.virtual)
    ranks = jax.device_count()
    print(f"{ranks} x {jax.devices()[0].device_kind}, {options.microbatches} micro-batches, ms")
    print(f"{'schedule':12} {'step':>8} {'F':>7} {'I':>7} {'W':>7}  idle: counted, predicted")
    runs = {}
    for name in options.schedules:
        tables, rows = run(run_config(name, ranks, options))
        runs[name] = rows
        times = median_times(rows)
        length = max(span.end for row in rows for span in row)
        counted, predicted = idle_share(rows), predicted_idle_share(tables, times)
        each = " ".join(f"{1e3 * times[act]:7.2f}" for act in "FIW")
        print(f"{name:12} {1e3 * length:8.1f} {each}  {counted:6.1%} {predicted:6.1%}", flush=True)
    if options.plot:
        draw(runs, options.plot)


def run_config(schedule: str, ranks: int, options: argparse.Namespace) -> Config:
    """A model whose layers are alike, so that stages are."""
    width = options.hidden_size
    model = ModelConfig(
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
    return Config(
        model=model,
        mesh=ParallelConfig(pipe=ranks),
        pipeline=PipelineConfig(schedule=schedule),
        train=TrainConfig(
            batch_size=2 * options.microbatches, micro_batch_size=2, seq_len=options.sequence
        ),
    ).validate()


def run(config: Config) -> tuple[TickTables, list[list[Span]]]:
    """The tables, and each rank's spans in the second of two steps, from its first start on."""
    layout = make_layout(make_mesh(config.mesh), config.sharding, config.expert_parallel)
    state = jax.jit(partial(init_state, config=config))(jax.random.key(0))
    count = config.train.batch_size // config.micro_batch_size
    shape = (count, config.micro_batch_size, config.train.seq_len + 1)
    rows = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size, jnp.int32)
    settings = StepSettings(np.float32(0), np.float32(0), np.float32(0), np.int32(count))
    stamps: list[Stamp] = []
    gradients = jax.jit(
        partial(
            pipelined_gradients,
            config=config,
            layout=layout,
            per_token=1.0,
            around=partial(stamped, record=stamps.append),
        )
    )
    for _ in range(2):
        stamps.clear()
        variables = {"params": state.params, "router": state.router}
        jax.block_until_ready(gradients(variables, rows, settings))
        jax.effects_barrier()
    return plan_stages(config).tables, spans(stamps, config.mesh.pipe)


def stamped(acts: RankActs, record: Callable[[Stamp], None]) -> RankActs:
    """The acts, with a stamp before what each reads and after what it makes."""

    def note(act: str, x: Any, *place: Any) -> Any:
        def on_host(rank, chunk, microbatch, _):
            numbers = int(rank), act, int(chunk), int(microbatch)
            record(Stamp(time.perf_counter(), *numbers))
            return np.float32(0)

        # What is added holds the program to the order; the array's corner waits for its making.
        values = lax.axis_index("pipe"), *place, x[(0,) * x.ndim]
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        mesh = jax.sharding.get_abstract_mesh()
        call = jax.shard_map(  # callbacks want every axis manual
            lambda *values: io_callback(on_host, shape, *values),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            check_vma=False,
        )
        return x + call(*values).astype(x.dtype)

    def forward(totals, chunk, m, x):
        x = note("F", x, chunk, m)
        totals, y, saved = acts.forward(totals, chunk, m, x)
        return totals, note("F", y, chunk, m), saved

    def input_backward(totals, chunk, m, saved, dy):
        dy = note("I", dy, chunk, m)
        totals, dx, for_weights = acts.input_backward(totals, chunk, m, saved, dy)
        return totals, note("I", dx, chunk, m), for_weights

    def weight_backward(totals, chunk, m, saved, for_weights):
        totals = totals._replace(ce=note("W", totals.ce, chunk, m))
        totals = acts.weight_backward(totals, chunk, m, saved, for_weights)
        made = jax.tree.leaves(totals.layers)[-1]
        done = note("W", made[(0,) * made.ndim], chunk, m)
        return totals._replace(ce=totals.ce + 0 * done)

    return RankActs(forward, input_backward, weight_backward)


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


def median_times(rows: list[list[Span]]) -> dict[str, float]:
    """Seconds of F, I and W: what is left of a rank's acts are hand-overs."""
    of = {act: [s.end - s.start for row in rows for s in row if s.act == act] for act in "FIW"}
    return {act: statistics.median(times) if times else 0.0 for act, times in of.items()}


def idle_share(rows: list[list[Span]]) -> float:
    """The share of the ranks' time, from the first start to the last end, in which none acts."""
    length = max(span.end for row in rows for span in row)
    busy = sum(span.end - span.start for row in rows for span in row)
    return 1 - busy / (len(rows) * length)


def predicted_idle_share(tables: TickTables, times: dict[str, float]) -> float:
    """The same of the tables, a tick as long as the slowest of its ranks."""
    each = np.array([0.0, *(times[act] for act in ACTS[1:])])[tables.op]
    assert (each[tables.op == IDLE] == 0).all()
    return 1 - each.sum() / (each.max(1).sum() * each.shape[1])


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
    labels = {"F": "forward", "I": "gradient of the input", "W": "gradient of the weights"}
    handles = [Patch(color=COLORS[act], label=label) for act, label in labels.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
