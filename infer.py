"""Continues prompts with a trained model: prefill, then decode from the latent cache.

    python infer.py --checkpoint runs/tiny --prompt "import os" --max-new-tokens 200
    python infer.py --checkpoint runs/tiny --token-ids 256,105,109 --temperature 0
    python infer.py --checkpoint DeepSeek-V3 --fp8 --prompt "import os" --speculative 1
    python infer.py --checkpoint runs/chat --chat
    python infer.py --checkpoint runs/tiny --batch requests.jsonl --out completions.jsonl

Text is streamed as it comes; several prompts are decoded together and printed one after the other.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax

from dsv3_jax import cli
from dsv3_jax.config import RunError, UserError
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.supervised import find_template
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.batch_file import run_batch
from dsv3_jax.inference.conversation import Conversation, talk
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import engine_for
from dsv3_jax.inference.infer_options import InferOptions, parse_ids
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import describe_speculation
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
from dsv3_jax.parallel.compiler_options import rounding_line
from dsv3_jax.verifying import verify

CHAT_LENGTH = 8192  # tokens of a conversation, where the model can take as many


def main(argv: Sequence[str]) -> int:
    """Generates; returns the exit code."""
    options = cli.parse_options(InferOptions, argv, repeated=True, description=__doc__)
    options.check()
    cli.use_virtual_devices(options.devices)
    hosts.start(options.distributed)
    hosts.check_agreement(options)
    if jax.process_count() > 1 and (options.batch is not None or not options.has_prompts):
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
    if line := rounding_line(jax.default_backend(), model.config.model.dtype):
        print(f"products {line}", file=sys.stderr)
    if options.fp8:
        print(describe_weights(model.variables), file=sys.stderr)
    prompts, template = read_prompts(options, tokenizer)
    if options.redundant_experts:
        logged = options.checkpoint / "metrics.jsonl"
        load_from = logged if options.expert_load == "logged" else options.expert_load
        model = with_redundant_experts(model, options.redundant_experts, load_from, prompts)
    config = model.config.model
    expert_load = ExpertLoad(config) if options.save_expert_load else None
    if options.batch is not None:
        assert tokenizer is not None and template is not None
        files, request, stops = (options.batch, options.out), options.request(), options.stop
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
        talk(engine, conversation, tokenizer, options.request(), options.stop)
    if expert_load is not None and options.save_expert_load and jax.process_index() == 0:
        expert_load.write(options.save_expert_load)
    return 0


def read_prompts(
    options: InferOptions, tokenizer: Tokenizer | None
) -> tuple[Sequence[Sequence[int]], ChatTemplate | None]:
    """The prompts' token ids, and the template of a chat or of a file of requests."""
    if tokenizer is None:
        return [parse_ids(text) for text in options.token_ids], None
    if not options.chat and options.batch is None:
        return [[*tokenizer.prompt_prefix, *tokenizer.encode(p)] for p in options.prompt], None
    template = find_template(options.chat_template, options.checkpoint, tokenizer)
    asked = [Conversation(template, tokenizer, options.system).ask(p) for p in options.prompt]
    return asked, template


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


if __name__ == "__main__":
    cli.run_command(main)
