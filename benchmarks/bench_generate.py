"""Generation: time to the first token, time a token, tokens/s, acceptance, host time between steps.

    python benchmarks/bench_generate.py --checkpoint runs/tiny --batch 1 8 --speculative 0 1 2
    python benchmarks/bench_generate.py --checkpoint EXPORTED --peer transformers

Variants are timed in turn, several rounds, so that what else the machine does falls on all alike;
the table has medians, and the ratio to the first variant of the same round.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Completion, Request, describe_speculation, seed_of
from dsv3_jax.loading import load
from dsv3_jax.model.cache import PagedCache


@dataclass
class Times:
    """What one run of a batch took."""

    first: float  # s to the first token of the last request that had it
    each: float  # s a decoding step
    rate: float  # tokens/s after the first ones
    host: float  # s of the host's work a step, while the devices may be computing
    completions: list[Completion]


def prompts_of(args, config) -> list[list[int]]:
    """Pieces of this repository's own text in the checkpoint's tokens, or random ids."""
    rng = np.random.default_rng(0)
    if args.tokens is None:
        return [
            rng.integers(0, config.vocab_size, args.prompt).tolist() for _ in range(max(args.batch))
        ]
    from dsv3_jax.loading import find_tokenizer

    tokenizer = find_tokenizer(args.checkpoint)
    ids = tokenizer.encode(Path(args.tokens).read_text(errors="replace"))
    starts = rng.integers(0, len(ids) - args.prompt, max(args.batch))
    return [[*tokenizer.prompt_prefix, *map(int, ids[s : s + args.prompt - 1])] for s in starts]


def engine_for(model, args, batch: int, drafts: int) -> Engine:
    """An engine that has compiled what a batch of these prompts needs."""
    options = EngineOptions(
        slots=batch,
        max_length=args.prompt + args.new,
        chunks=(args.prompt,),
        chunk_rows=(batch,),
        token_budget=batch * args.prompt + batch * (1 + drafts),
        drafts=drafts,
        paged=args.paged,
        fp8_cache=args.fp8_cache,
        share_prefixes=False,
    )
    engine = Engine(model.variables, model.config.model, options, model.layout)
    engine.warm_up()
    return engine


def run(engine: Engine, prompts: list[list[int]], args) -> Times:
    """One batch from its submission to its last token."""
    requests = [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=args.new,
            temperature=args.temperature,
            seed=seed_of(0, number),
            ignore_eos=True,
        )
        for number, prompt in enumerate(prompts)
    ]
    before, steps = engine.statistics.host_seconds, engine.statistics.steps
    began = time.perf_counter()
    completions = engine.run(requests)
    ended = time.perf_counter()
    started = max(c.started or ended for c in completions)
    taken = engine.statistics.steps - steps
    written = sum(len(c.tokens) - 1 for c in completions)
    return Times(
        started - began,
        (ended - started) / max(taken, 1),
        written / (ended - started),
        (engine.statistics.host_seconds - before) / max(taken, 1),
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


class Transformers:
    """transformers' `generate` on the same weights, greedy, with its cache."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rate(self, prompts: list[list[int]], new: int) -> float:
        """Tokens/s after the prompt's."""
        ids = self.torch.tensor(prompts)
        with self.torch.no_grad():
            times = []
            for count in (1, new):
                began = time.perf_counter()
                self.model.generate(
                    ids, max_new_tokens=count, min_new_tokens=count, do_sample=False
                )
                times.append(time.perf_counter() - began)
        return len(prompts) * (new - 1) / (times[1] - times[0])


def main() -> None:
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--speculative", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", help="a text file to cut prompts from; else random ids")
    parser.add_argument("--paged", action="store_true")
    parser.add_argument("--fp8-cache", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--peer", choices=["transformers"], help="the checkpoint is a HF folder")
    args = parser.parse_args()
    model = load(args.checkpoint, fp8=args.fp8)
    prompts = prompts_of(args, model.config.model)
    peer = Transformers(args.checkpoint) if args.peer else None
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.prompt} + {args.new} tokens"
    )
    print("batch drafts  first ms  step ms  host ms  tokens/s  x plain  cache B/token/layer")
    for batch in args.batch:
        engines = {drafts: engine_for(model, args, batch, drafts) for drafts in args.speculative}
        rounds: list[dict[int, Times]] = []
        rates = []
        for number in range(args.rounds + 1):
            times = {d: run(engine, prompts[:batch], args) for d, engine in engines.items()}
            texts = {tuple(tuple(c.ids) for c in t.completions) for t in times.values()}
            if len(texts) > 1:
                print(f"      the variants' texts differ ({len(texts)}): rounding")
            if number:  # the first warms up
                rounds.append(times)
                if peer is not None:
                    rates.append(peer.rate(prompts[:batch], args.new))
        for drafts, engine in engines.items():
            mine = [times[drafts] for times in rounds]
            ratio = statistics.median(
                times[drafts].rate / times[args.speculative[0]].rate for times in rounds
            )

            def middle(name: str, mine=mine) -> float:
                return statistics.median(getattr(times, name) for times in mine)

            print(
                f"{batch:5} {drafts:6} {1e3 * middle('first'):9.2f} {1e3 * middle('each'):8.3f} "
                f"{1e3 * middle('host'):8.3f} {middle('rate'):9.1f} {ratio:8.2f} "
                f"{cache_bytes(engine):10.0f}"
            )
            if drafts:
                print(f"      {describe_speculation(mine[-1].completions)}")
        if rates:
            plain = [times[args.speculative[0]].rate for times in rounds]
            ratio = statistics.median(a / b for a, b in zip(plain, rates))
            print(f"      transformers {statistics.median(rates):.1f} tokens/s; we {ratio:.2f} x")


if __name__ == "__main__":
    main()
