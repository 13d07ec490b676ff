"""Generation: time to the first token, time a token, tokens/s, acceptance, host time between steps.

    python -m benchmarks.bench_generate --checkpoint runs/tiny --batch 1 8 --speculative 0 1 2
    python -m dsv3_jax export-hf runs/tiny runs/tiny-hf
    python -m benchmarks.bench_generate --checkpoint runs/tiny --peer runs/tiny-hf --batch 1 \\
        --speculative 0 1 --tokens dsv3_jax/inference/engine.py
    python -m benchmarks.bench_generate --config configs/h200_slice.py --paged --batch 1 8 32 128 \\
        --prompt 128 128 128 4096 --rounds 5 5 5 1 --speculative 0 --fp8 0 1 --trace --forward 4096

Variants are timed in turn, several rounds, so that what else the machine does falls on all alike;
the table has medians, and the ratio to the first variant of the same round. Each round has prompts
of its own: of one prompt 44 % of drafts are accepted, and of another 79 %. `model` and `program`
are chains of the model's own step and of the engine's that nobody waits for (generate_timing.py);
`floor` is what `analysis.serving` predicts. --trace adds the GPU's kernels and gaps, --forward a
prompt beside a forward pass of training. With --config weights are random, in BF16.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generate_timing as timing
from benchmarks.transformers_generate import Transformers
from dsv3_jax.analysis.hardware import accelerator
from dsv3_jax.analysis.serving import estimate_decode
from dsv3_jax.config import Config, ParallelConfig, QuantConfig, load_config
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Completion, Request, describe_speculation, seed_of
from dsv3_jax.loading import Model, load
from dsv3_jax.model.cache import PagedCache
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.parallel.sharding import ONE_DEVICE


class Variant(NamedTuple):
    """What is timed beside the others."""

    drafts: int
    fp8: bool


@dataclass
class Times:
    """What one run of a batch took."""

    first: float  # s to the first token of the last request that had it
    each: float  # s a decoding step
    rate: float  # tokens/s after the first ones
    host: float  # s of the host's work a step, while the devices may be computing
    completions: list[Completion]


def random_model(path: Path) -> Model:
    """Weights of a config's shapes: random, matrices in BF16, as loading published ones makes."""
    config = load_config(path)

    @jax.jit
    def make(key):
        variables = init_variables(key, config.model)
        params = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if x.ndim >= 2 else x, variables["params"]
        )
        return {**variables, "params": params}

    return Model(config, ONE_DEVICE, make(jax.random.key(0)))


def prompts_of(args, config, batch: int, length: int, rounds: int) -> list[list[list[int]]]:
    """For each round, pieces of a text in the checkpoint's tokens, or random ids."""
    rng = np.random.default_rng(0)
    count = rounds * batch
    if args.tokens is None:
        pieces = rng.integers(2, config.vocab_size, (count, length)).tolist()
    else:
        from dsv3_jax.loading import find_tokenizer

        tokenizer = find_tokenizer(args.checkpoint)
        ids = tokenizer.encode(Path(args.tokens).read_text(errors="replace"))
        starts = rng.integers(0, len(ids) - length, count)
        pieces = [[*tokenizer.prompt_prefix, *map(int, ids[s : s + length - 1])] for s in starts]
    return [pieces[first : first + batch] for first in range(0, count, batch)]


def engine_for(model: Model, args, batch: int, length: int, drafts: int) -> Engine:
    """An engine with room for a batch of these prompts."""
    rows = max(1, min(batch, args.chunk_tokens // length))
    options = EngineOptions(
        slots=batch,
        max_length=length + args.new,
        chunks=(length,),
        chunk_rows=(rows,),
        token_budget=rows * length + batch * (1 + drafts),
        drafts=drafts,
        paged=args.paged,
        fp8_cache=args.fp8_cache,
        share_prefixes=False,
    )
    return Engine(model.variables, model.config.model, options, model.layout)


def requests_of(prompts, new: int, temperature: float) -> list[Request]:
    """A request for each prompt, of exactly so many new tokens."""
    return [
        Request(tuple(prompt), new, temperature, seed=seed_of(0, number), ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]


def run(engine: Engine, prompts: list[list[int]], args) -> Times:
    """One batch from its submission to its last token."""
    completions = [engine.submit(r) for r in requests_of(prompts, args.new, args.temperature)]
    began = time.perf_counter()
    while any(not c.tokens for c in completions):
        engine.step()
    started, before = time.perf_counter(), dataclasses.replace(engine.statistics)
    written = sum(len(c.tokens) for c in completions)
    while engine.busy:
        engine.step()
    ended, after = time.perf_counter(), engine.statistics
    taken = max(after.steps - before.steps, 1)
    return Times(
        started - began,
        (ended - started) / taken,
        (sum(len(c.tokens) for c in completions) - written) / (ended - started),
        (after.host_seconds - before.host_seconds) / taken,
        completions,
    )


def cache_bytes(engine: Engine) -> float:
    """Bytes a token and layer of the model's cache, from its arrays."""
    cache = engine._slots.cache
    arrays = [x for x in jax.tree.leaves(cache) if x.ndim > 2]
    if isinstance(cache, PagedCache):
        rows = cache.k_rope.shape[0] * cache.k_rope.shape[1]
        return sum(x.nbytes for x in arrays) / rows
    layers = engine.config.num_hidden_layers
    rows = engine.options.slots * arrays[0].shape[-2] * layers
    return sum(x.nbytes for x in arrays) / rows


def floor(config: Config, variant: Variant, batch: int, context: int) -> float:
    """Seconds of a step by the cost model, on an H200."""
    quant = QuantConfig("fp8_paper" if variant.fp8 else "bf16")
    config = dataclasses.replace(config, quant=quant, mesh=ParallelConfig())
    return estimate_decode(config, accelerator("h200"), batch, context).tpot


class Batch(NamedTuple):
    """The prompts of each round, and an engine for each variant."""

    rounds: list[list[list[int]]]
    engines: dict[Variant, Engine]


def batches_of(models: dict[bool, Model], args) -> list[Batch]:
    """What is to be timed, compiled side by side: each program in a thread of its own."""
    variants = [Variant(drafts, bool(fp8)) for fp8 in args.fp8 for drafts in args.speculative]
    batches = []
    for number, batch in enumerate(args.batch):
        length, rounds = (x[min(number, len(x) - 1)] for x in (args.prompt, args.rounds))
        engines = {v: engine_for(models[v.fp8], args, batch, length, v.drafts) for v in variants}
        config = models[variants[0].fp8].config.model
        batches.append(Batch(prompts_of(args, config, batch, length, rounds), engines))

    def compiled(prompts: list[list[int]], engine: Engine) -> None:
        engine.run(requests_of(prompts, 3, args.temperature))
        for queued in (timing.queued_model, timing.queued_engine):
            queued(engine, len(prompts[0]))

    with ThreadPoolExecutor(args.threads) as pool:
        jobs = [(b.rounds[0], engine) for b in batches for engine in b.engines.values()]
        list(pool.map(compiled, *zip(*jobs)))
    return batches


def medians(rounds: list[dict[Variant, Times]], variant: Variant) -> Callable[[str], float]:
    """The median of a field over the rounds."""
    return lambda name: statistics.median(getattr(times[variant], name) for times in rounds)


def time_batch(config: Config, args, timed: Batch, peer) -> None:
    """Prints the lines of one batch."""
    prompts, engines = timed.rounds[0], timed.engines
    variants, batch, length = [*engines], len(prompts), len(prompts[0])
    rounds, rates = [], []
    for prompts in timed.rounds:
        rounds.append({v: run(engine, prompts, args) for v, engine in engines.items()})
        for fp8 in {v.fp8 for v in variants}:
            of_kind = [t for v, t in rounds[-1].items() if v.fp8 == fp8]
            if len({tuple(tuple(c.ids) for c in t.completions) for t in of_kind}) > 1:
                print("      the variants' texts differ: rounding")
        if peer is not None:
            rates.append(peer.rate(prompts, args.new))
    for variant, engine in engines.items():
        middle = medians(rounds, variant)
        of_first = (t[variant].rate / t[variants[0]].rate for t in rounds)
        queued = [f(engine, length) for f in (timing.queued_model, timing.queued_engine)]
        print(
            f"{batch:5} {length:6} {variant.drafts:6} {'fp8' if variant.fp8 else '':3} "
            f"{1e3 * middle('first'):9.2f} {1e3 * middle('each'):8.3f} "
            f"{1e3 * middle('host'):8.3f} {1e3 * queued[0]:8.3f} {1e3 * queued[1]:8.3f} "
            f"{middle('each') / queued[0]:8.2f} "
            f"{1e3 * floor(config, variant, batch, length):8.3f} {middle('rate'):9.1f} "
            f"{statistics.median(of_first):8.2f} {cache_bytes(engine):8.0f}",
            flush=True,
        )
        if variant.drafts:
            completions = [done for times in rounds for done in times[variant].completions]
            print(f"      {describe_speculation(completions)}")
        if args.trace:
            show_trace(engine, prompts, args)
    if rates:
        plain = [times[variants[0]].rate for times in rounds]
        ratio = statistics.median(a / b for a, b in zip(plain, rates))
        print(f"      transformers {statistics.median(rates):.1f} tokens/s; we {ratio:.2f} x")


def show_trace(engine: Engine, prompts, args) -> None:
    """Prints the kernels' time and the gaps of the engine's steps, read by the host as always."""
    completions = [engine.submit(r) for r in requests_of(prompts, args.new, args.temperature)]
    while any(len(c.tokens) < 4 for c in completions):
        engine.step()
    before = engine.statistics.steps

    def steps():
        for _ in range(timing.STEPS):
            engine.step()

    seen = timing.trace(steps)
    taken = engine.statistics.steps - before
    while engine.busy:
        engine.step()
    if seen is None:
        print("      the profiler saw no GPU")
        return
    gaps = 1 - seen.busy / seen.window
    print(
        f"      traced: {1e3 * seen.window / taken:.3f} ms a step, of it kernels "
        f"{1e3 * seen.busy / taken:.3f} in {seen.launches / taken:.0f} launches; gaps {gaps:.1%}",
        flush=True,
    )


def main() -> None:
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--config", type=Path, help="random weights of this shape instead")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--speculative", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64], help="of each batch, or all")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--rounds", type=int, nargs="+", default=[5], help="likewise")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", help="a text file to cut prompts from; else random ids")
    parser.add_argument("--paged", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--fp8-cache", action="store_true")
    parser.add_argument("--fp8", type=int, nargs="+", default=[0], choices=[0, 1])
    parser.add_argument("--chunk-tokens", type=int, default=2**15, help="of prompts in a program")
    parser.add_argument("--threads", type=int, default=4, help="that compile")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--forward", type=int, help="tokens of a row, forward as in training")
    parser.add_argument("--peer", type=Path, help="the same weights for transformers, in f32")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.config is None):
        parser.error("give --checkpoint or --config")
    plain = load(args.checkpoint) if args.checkpoint else random_model(args.config)
    models = {False: plain}
    if 1 in args.fp8:
        held = to_fp8_weights(plain.variables, plain.config.model)
        models[True] = plain._replace(variables=held)
    peer = Transformers(args.peer) if args.peer else None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.new} new tokens; in ms")
    print(
        "batch prompt drafts fp8  first     step     host    model  program  x model    floor "
        " tokens/s  x first  B/token/layer"
    )
    for timed in batches_of(models, args):
        time_batch(plain.config, args, timed, peer)
    if args.forward:
        seconds = timing.training_forward(plain.variables, plain.config.model, args.forward)
        print(f"forward of {args.forward} tokens, as in training: {1e3 * seconds:.2f} ms")


if __name__ == "__main__":
    main()
