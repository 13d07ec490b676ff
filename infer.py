"""Continues prompts with a trained model: prefill, then decode from the latent cache.

    python infer.py --checkpoint runs/tiny --prompt "import os" --max-new-tokens 200
    python infer.py --checkpoint runs/tiny --token-ids 256,105,109 --temperature 0
    python infer.py --checkpoint DeepSeek-V3 --fp8 --prompt "import os"

Text is streamed as it comes; several prompts are decoded together and printed one after the other.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dsv3_jax import cli
from dsv3_jax.config import (
    DistributedConfig,
    ExpertParallelConfig,
    ParallelConfig,
    RunError,
    ShardingConfig,
    UserError,
)
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.streaming import print_ids, print_text
from dsv3_jax.loading import find_tokenizer, load, with_redundant_experts
from dsv3_jax.model.fp8_weights import describe_weights
from dsv3_jax.parallel import hosts
from dsv3_jax.verifying import verify


@dataclass(frozen=True)
class InferOptions:
    """Continue prompts with a trained model."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A text to continue; repeat the option for several."""
    token_ids: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Comma-separated token ids to continue, printed as ids; repeat the option for several."""
    max_new_tokens: int = 200
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.95
    seed: int = 0
    cache_length: int | None = None  # tokens the cache holds; None: what the longest prompt needs
    step: str = "auto"  # "auto": the newest valid checkpoint; or its number
    tokenizer: str | None = None  # None: the one the model was trained with
    verify: bool = False
    """First read all of the checkpoint and compare it with its checksums, as the command does."""
    fp8: bool = False
    """Hold the projections as FP8 (a byte a number, and scales) and multiply in FP8."""
    fp8_cache: bool = False
    """Keep the latent cache as FP8 with scales: 57 % of the bytes of BF16."""
    redundant_experts: int = 0
    """Give busy experts this many more places in every MoE layer; the text stays the same."""
    expert_load: str = "logged"
    """Which are busy: as "logged" by the run, counted on the "prompts", or a metrics.jsonl."""
    save_expert_load: Path | None = None
    """Append the load of each expert while writing to this file, which --expert-load reads."""
    mesh: ParallelConfig = field(default_factory=ParallelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    devices: int | None = None  # run on this many virtual CPU devices


def main(argv: Sequence[str]) -> int:
    """Generates; returns the exit code."""
    options = cli.parse_options(InferOptions, argv, description=__doc__)
    check(options)
    cli.use_virtual_devices(options.devices)
    hosts.start(options.distributed)
    hosts.check_agreement(options)
    with hosts.first_speaks():
        return write(options)


def write(options: InferOptions) -> int:
    """Loads the model and prints what it writes; returns the exit code."""
    if options.verify and (damaged := verify(options.checkpoint).damaged):
        raise RunError("\n".join(damaged))
    tokenizer = None
    if not options.token_ids:
        tokenizer = find_tokenizer(options.checkpoint, options.tokenizer)
    model = load(
        options.checkpoint,
        mesh=options.mesh,
        sharding=options.sharding,
        expert_parallel=options.expert_parallel,
        step=options.step,
        fp8=options.fp8,
    )
    if options.fp8:
        print(describe_weights(model.variables), file=sys.stderr)
    if tokenizer is None:
        prompts = [parse_ids(text) for text in options.token_ids]
    else:
        prompts = [[*tokenizer.prompt_prefix, *tokenizer.encode(p)] for p in options.prompt]
    if options.redundant_experts:
        logged = options.checkpoint / "metrics.jsonl"
        load_from = logged if options.expert_load == "logged" else options.expert_load
        model = with_redundant_experts(model, options.redundant_experts, load_from, prompts)
    config = model.config.model
    expert_load = ExpertLoad(config) if options.save_expert_load else None
    tokens = generate(
        model.variables,
        prompts,
        config,
        max_new_tokens=options.max_new_tokens,
        cache_length=options.cache_length,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        layout=model.layout,
        fp8_cache=options.fp8_cache,
        expert_load=expert_load,
    )
    one = len(prompts) == 1  # shown as it comes
    texts = [(int(ids[0]) for ids in tokens)] if one else zip(*(ids.tolist() for ids in tokens))
    for number, text in enumerate(texts):
        if tokenizer is None:
            print_ids(text, config.eos_token_ids)
            continue
        if not one:
            print(f"--- {number}")
        print_text(options.prompt[number], text, tokenizer, config.eos_token_ids)
    if expert_load is not None and options.save_expert_load and jax.process_index() == 0:
        expert_load.write(options.save_expert_load)
    return 0


def check(options: InferOptions) -> None:
    """Raises UserError for options that do not fit together."""
    if bool(options.prompt) == bool(options.token_ids):
        raise UserError("give either --prompt TEXT or --token-ids 1,2,3 (each may be repeated)")
    if options.max_new_tokens <= 0:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be positive")
    if options.redundant_experts < 0:
        raise UserError(f"--redundant-experts {options.redundant_experts} must not be negative")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} must not be negative and --top-p {options.top_p} "
            "must lie in (0, 1]"
        )


def parse_ids(text: str) -> list[int]:
    """Token ids from "1,2,3"; UserError when one is no number."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--token-ids {text!r} must be numbers with commas between") from None


if __name__ == "__main__":
    cli.run_command(main)
