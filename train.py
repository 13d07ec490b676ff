"""Trains a DeepSeek-V3 model. Read from top to bottom: config, mesh, state, data, loop.

    python train.py --config configs/tiny.py --train.steps 300 --optimizer.learning-rate 1e-3

Writes a run directory: config.json, metrics.jsonl, log.txt, checkpoints/, plots/, sample.txt.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsv3_jax import cli
from dsv3_jax.analysis.model_cost import training_flops_per_token
from dsv3_jax.config import Config
from dsv3_jax.data.batches import prefetch
from dsv3_jax.data.checks import check_run
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.frozen import abstract_base, load_base
from dsv3_jax.parallel import hosts
from dsv3_jax.parallel.mesh import fill_mesh, make_mesh, mesh_of
from dsv3_jax.parallel.sharding import Layout, make_layout
from dsv3_jax.samples import write_sample
from dsv3_jax.starting import open_origin
from dsv3_jax.training.banner import banner, batch_line
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.continuation import checkpoint_meta, find_continuation
from dsv3_jax.training.divergence import LossGuard
from dsv3_jax.training.dry_run import dry_run_report
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.feed import batches
from dsv3_jax.training.metrics import MetricsLog
from dsv3_jax.training.profiling import ProfileWindow
from dsv3_jax.training.record import Throughput, step_values
from dsv3_jax.training.restore import state_bytes
from dsv3_jax.training.run_folder import RunFolder
from dsv3_jax.training.run_log import keep_log, set_up_logging
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.sinks import open_sinks
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step_program import compiled_step
from dsv3_jax.training.stopping import StopRequest
from dsv3_jax.training.watchdog import Watchdog

log = logging.getLogger("dsv3_jax.train")


def main(argv: Sequence[str], extensions: Extensions = NONE) -> int:
    """Trains; returns the exit code. The extensions are an experiment's own functions."""
    config, weights = cli.parse_run(argv, description="Train a DeepSeek-V3 model.")
    clock = Clock()
    with clock("init"):
        cli.use_virtual_devices(config.devices, all_cores=config.mesh.data == 0)
        hosts.start(config.distributed)
        set_up_logging(process=jax.process_index())
        config = fill_mesh(config)
        mesh = make_mesh(config.mesh)
        layout = make_layout(mesh, config.sharding, config.expert_parallel)
        frozen = abstract_base(config, weights, layout)
    if config.dry_run:
        print(dry_run_report(config, layout, frozen))
        return 0
    process, steps, run_dir = jax.process_index(), config.train.steps, Path(config.run_dir)
    with StopRequest(clock) as stop, RunFolder(run_dir) as folder:
        with clock("init"):
            abstract = abstract_state(config, layout, extensions)
            for line in banner(config, abstract) + extensions.told():
                log.info(line)
            with clock("data"):
                corpus = open_corpus(config.data, config.seed)
                check_run(config, corpus)
            hosts.check_agreement(config, data_sha256=corpus.sha256("train"))
            # What was saved is compared with what is asked before anything there is touched.
            start, schedule, losses = find_continuation(run_dir, config, corpus, abstract)
            origin = open_origin(config, weights, start)
            if folder.has_nothing_to_do(start, steps):
                log.info("nothing to do: at step %d of %d; --train.steps N goes on", start, steps)
                return 0
            keep_log(run_dir, process=process)
            log.info(batch_line(config, schedule, start))
            checkpoints = Checkpoints(
                run_dir / "checkpoints",
                every_steps=config.checkpoint.every_steps,
                keep=config.checkpoint.keep,
            )
            checkpoints.probe(state_bytes(abstract))
            step_fn = None
            if (start or 0) < steps:  # before weights are read: XLA's memory never adds to theirs
                with clock("compile"), Watchdog(config.watchdog, run_dir), stop.requests():
                    step_fn = compiled_step(config, layout, abstract, frozen, corpus, extensions)
            if stop.requested:
                return stop.exit_code
            saved, _ = checkpoints.resume_from(start, abstract._asdict())
            folder.claim(config, corpus.tokenizer, corpus.chat_template, new=start is None)
            state = TrainState(**saved) if saved else origin.create_state(abstract, extensions)
            base = load_base(config, weights, layout)
        sinks = open_sinks(config, start) if process == 0 else []
        metrics = MetricsLog(
            run_dir, steps=steps, resumed_from=start, primary=process == 0, sinks=sinks
        )
        with checkpoints, metrics:
            run = Run(
                *(config, layout, corpus, schedule, checkpoints, metrics, clock, stop),
                *(base, extensions),
            )
            state = train(run, step_fn, state, start or 0, losses)
            if stop.requested:
                log.warning("stopped by signal %d at step %d", stop.signal, int(state.step))
                metrics.record(int(state.step), {"seconds": clock.seconds()})
                return stop.exit_code
            with clock("sample"):
                if extensions.generates:
                    write_sample(config, layout, corpus, state, steps, base)
            metrics.record(steps, {"seconds": clock.seconds()})
        if process == 0:
            cli.draw_plots(run_dir)
    log.info("infer.py continues from it: ./run infer --checkpoint %s --prompt TEXT", run_dir)
    return 0


class Run(NamedTuple):
    """All that the loop needs besides the state."""

    config: Config
    layout: Layout
    corpus: Corpus
    schedule: Schedule
    checkpoints: Checkpoints
    metrics: MetricsLog
    clock: Clock
    stop: StopRequest
    base: Any  # frozen weights, of which the state holds adapters; None: it holds all
    extensions: Extensions


def train(run: Run, step_fn: Any, state: TrainState, start: int, losses: list[float]) -> TrainState:
    """The loop, from step `start` on; returns the last state, which has been saved."""
    config, layout, corpus, schedule, checkpoints, metrics, clock, stop, base, extensions = run
    plan, mesh, run_dir = config.train, mesh_of(state.step), Path(config.run_dir)
    evaluate = Evaluation(config, mesh, layout, corpus, base, extensions)
    flops = training_flops_per_token(config.model, plan.seq_len, mtp=True, frozen=base is not None)
    throughput = Throughput(clock, flops, list(mesh.devices.flat))
    profile = ProfileWindow(run_dir / "profile", start, plan.steps, plan.profile_steps)
    feed = partial(batches, config, extensions.data or corpus, schedule, mesh, start)
    guard, last = LossGuard(checkpoints, plan.max_nonfinite_steps, losses), None
    with prefetch(feed) as stream, Watchdog(config.watchdog, run_dir) as watchdog, stop.requests():
        for step in range(start, plan.steps):
            first, done = step == start, step + 1
            is_last = done == plan.steps
            logs = first or is_last or done % plan.log_every == 0
            evaluates = is_last or done % plan.eval_every == 0
            profile.before(step)
            stop.poll()
            watchdog.beat()
            with clock("data"):
                batch = next(stream)
            with clock("step"):
                settings, previous = schedule.settings(step), last
                state, last = step_fn(state, batch, settings, base=base)
                # One step late unless this one is looked at, so that the device need not wait.
                jax.block_until_ready(last if logs or evaluates else previous)
            if not first:  # which warms up
                throughput.add(schedule.rows(step) * plan.seq_len)
            guard.see(step, last, ready=logs or evaluates)
            values = step_values(state, last, schedule, step) | throughput.read() if logs else {}
            if evaluates:
                with clock("eval"):
                    values |= evaluate(state, stop)
            if values:
                metrics.log(done, values)
                extensions.on_metrics(done, values)
            samples = extensions.generates and plan.sample_every and not is_last
            if samples and done % plan.sample_every == 0:
                with clock("sample"):
                    write_sample(config, layout, corpus, state, done, base)
            due = checkpoints.due(done) or is_last or stop.requested
            if guard.may_save(done, due=due, last=is_last):
                meta = checkpoint_meta(config, corpus, schedule, done, guard.recent)
                with clock("checkpoint"):
                    checkpoints.save(done, state._asdict(), meta)
            if stop.requested:
                break
        profile.close()
        if plan.steps == 0:
            checkpoints.save(0, state._asdict(), checkpoint_meta(config, corpus, schedule, 0))
        with clock("checkpoint"):
            checkpoints.wait()
    return state


if __name__ == "__main__":
    cli.run_command(main)
