"""Continues prompts with a trained model: prefill, then decode from the latent cache.

    python infer.py --checkpoint runs/tiny --prompt "import os" --max-new-tokens 200
    python infer.py --checkpoint runs/tiny --token-ids 256,105,109 --temperature 0
    python infer.py --checkpoint DeepSeek-V3 --fp8 --prompt "import os" --speculative 1
    python infer.py --checkpoint runs/chat --chat
    python infer.py --checkpoint runs/tiny --batch requests.jsonl --out completions.jsonl

Text is streamed as it comes; several prompts are decoded together and printed one after the other.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from dsv3_jax.config.files import check_folder_of
from dsv3_jax.data.supervised import find_template
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.batch_file import run_batch
from dsv3_jax.inference.conversation import Conversation, talk
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import engine_for
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request, describe_speculation
from dsv3_jax.inference.streaming import IdStream, TextStream, listener_of
from dsv3_jax.loading import (
    Model,
    find_tokenizer,
    load,
    unread_settings,
    with_redundant_experts,
)
from dsv3_jax.model.fp8_weights import describe_weights
from dsv3_jax.parallel import hosts
from dsv3_jax.verifying import verify

CHAT_LENGTH = 8192  # tokens of a conversation, where the model can take as many


@dataclass(frozen=True)
class InferOptions:
    """Continue prompts with a trained model."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A text to continue; repeat the option for several."""
    token_ids: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Comma-separated token ids to continue, printed as ids; repeat the option for several."""
    chat: bool = False
    """Prompts are what a user says, in the folder's chat template; none: a conversation."""
    system: str | None = None  # the system prompt of a chat
    chat_template: Path | None = None  # None: the tokenizer's own, or DeepSeek-V3's form
    batch: Path | None = None
    """Requests, one JSON object a line: prompt, messages or token_ids, and settings if others."""
    out: Path | None = None  # of --batch; None: beside it, .completions.jsonl
    slots: int = 16  # of --batch: requests that are written at once
    max_new_tokens: int = 200
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.95
    seed: int = 0
    stop: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A text that ends the continuation, and is not shown; repeat the option for several."""
    speculative: int = 0
    """Draft this many tokens a step by the MTP modules; the text stays the same."""
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
    if jax.process_count() > 1 and (options.batch is not None or not has_prompts(options)):
        raise UserError("--batch and a conversation are for one process: give --prompt")
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
    if unread := unread_settings(options.checkpoint):
        names = ", ".join(unread)
        told = f"generation_config.json also has {names}: not read, use infer.py's options"
        print(told, file=sys.stderr)
    if options.fp8:
        print(describe_weights(model.variables), file=sys.stderr)
    template = None
    if tokenizer is None:
        prompts = [parse_ids(text) for text in options.token_ids]
    elif options.chat or options.batch is not None:
        template = find_template(options.chat_template, options.checkpoint, tokenizer)
        system = options.system
        prompts = [Conversation(template, tokenizer, system).ask(p) for p in options.prompt]
    else:
        prompts = [[*tokenizer.prompt_prefix, *tokenizer.encode(p)] for p in options.prompt]
    if options.redundant_experts:
        logged = options.checkpoint / "metrics.jsonl"
        load_from = logged if options.expert_load == "logged" else options.expert_load
        model = with_redundant_experts(model, options.redundant_experts, load_from, prompts)
    config = model.config.model
    expert_load = ExpertLoad(config) if options.save_expert_load else None
    if options.batch is not None:
        assert tokenizer is not None and template is not None
        files, request, stops = (options.batch, options.out), settings_of(options), options.stop
        engine_of = partial(make_engine, model, options, options.slots, expert_load)
        count = run_batch(*files, engine_of, config, tokenizer, template, request, tuple(stops))
        print(f"{count[0]} of {count[1]} requests were left, and are completed", file=sys.stderr)
    elif prompts:
        continue_prompts(model, prompts, tokenizer, options, expert_load)
    else:
        assert tokenizer is not None and template is not None
        length = options.cache_length or min(CHAT_LENGTH, config.max_position_embeddings)
        engine = make_engine(model, options, 1, expert_load, length)
        conversation = Conversation(template, tokenizer, options.system)
        talk(engine, conversation, tokenizer, settings_of(options), options.stop)
    if expert_load is not None and options.save_expert_load and jax.process_index() == 0:
        expert_load.write(options.save_expert_load)
    return 0


def make_engine(
    model: Model, options: InferOptions, slots: int, expert_load: ExpertLoad | None, length: int
) -> Engine:
    """An engine for sequences of up to `length` tokens."""
    slots += -slots % model.layout.size("batch")
    how = EngineOptions(
        slots=slots,
        max_length=options.cache_length or length,
        chunk_rows=(model.layout.size("batch"),),
        drafts=options.speculative,
        fp8_cache=options.fp8_cache,
    )
    return Engine(model.variables, model.config.model, how, model.layout, expert_load)


def settings_of(options: InferOptions) -> Request:
    """How requests are completed that do not say so themselves; the prompt is theirs."""
    return Request(
        prompt=(),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def continue_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
    options: InferOptions,
    expert_load: ExpertLoad | None,
) -> None:
    """Writes on from all prompts at once; one is shown as it comes, several when all have ended."""
    engine, requests = engine_for(
        model.variables,
        prompts,
        model.config.model,
        max_new_tokens=options.max_new_tokens,
        cache_length=options.cache_length,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        layout=model.layout,
        fp8_cache=options.fp8_cache,
        speculative=options.speculative,
        expert_load=expert_load,
    )
    ends, one, texts = model.config.model.eos_token_ids, len(prompts) == 1, []
    for number, request in enumerate(requests):
        text: list[str] = []
        show = partial(print, end="", flush=True) if one else text.append
        if tokenizer is None:
            stream = IdStream(ends)
        else:
            stream = TextStream(tokenizer, ends, options.stop)
            if not options.chat:
                show(options.prompt[number])
        requests[number] = replace(request, listener=listener_of(stream, show))
        texts.append((text, stream))
    completions = engine.run(requests)
    for number, (text, stream) in enumerate(texts):
        if not one and tokenizer is not None:
            print(f"--- {number}")
        print("".join(text) + stream.flush())
    if options.speculative:
        print(describe_speculation(completions), file=sys.stderr)


def has_prompts(options: InferOptions) -> bool:
    """Whether what is to be continued is given on the command line."""
    return bool(options.prompt or options.token_ids)


def check(options: InferOptions) -> None:
    """Raises UserError for options that do not fit together."""
    given = bool(options.prompt) + bool(options.token_ids) + (options.batch is not None)
    if given > 1 or (not given and not options.chat):
        raise UserError(
            "give --prompt TEXT or --token-ids 1,2,3 (each may be repeated), --batch FILE.jsonl, "
            "or --chat alone for a conversation"
        )
    if options.token_ids and (options.chat or options.stop):
        raise UserError("--chat and --stop are for text: give --prompt instead of --token-ids")
    batch = options.batch is not None
    if batch and options.chat:
        raise UserError("--chat is for --prompt: a line of --batch with messages is a conversation")
    for name, fits, place in (
        ("system", options.chat, "a conversation: add --chat"),
        ("chat_template", options.chat or batch, "conversations: add --chat, or give --batch"),
        ("out", batch, "--batch"),
        ("slots", batch, "--batch"),
        ("expert_load", options.redundant_experts, "--redundant-experts"),
    ):
        if not fits and getattr(options, name) != getattr(InferOptions, name):
            raise UserError(f"--{name.replace('_', '-')} is for {place}")
    if options.expert_load == "prompts" and not has_prompts(options):
        raise UserError("--expert-load prompts counts on --prompt or --token-ids: give one")
    for name in ("out", "save_expert_load"):
        if (path := getattr(options, name)) is not None:
            check_folder_of(path, f"--{name.replace('_', '-')}")
    for name in ("max_new_tokens", "slots", "cache_length", "devices"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
    for name in ("redundant_experts", "speculative"):
        if getattr(options, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must not be negative"
            )
    if "" in options.stop:
        raise UserError("--stop is empty: every text would end before its first letter")
    if not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} must be finite and not negative, and --top-p "
            f"{options.top_p} must lie in (0, 1]"
        )


def parse_ids(text: str) -> list[int]:
    """Token ids from "1,2,3"; UserError when one is no number."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--token-ids {text!r} must be numbers with commas between") from None


if __name__ == "__main__":
    cli.run_command(main)
