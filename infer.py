"""Continues prompts with a trained model: prefill, then decode from the latent cache.

    python infer.py --checkpoint runs/tiny --prompt "import os" --max-new-tokens 200
    python infer.py --checkpoint runs/tiny --token-ids 256,105,109 --temperature 0
    python infer.py --checkpoint DeepSeek-V3 --fp8 --prompt "import os"

Text is streamed as it comes; several prompts are decoded together and printed one after the other.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dsv3_jax import cli
from dsv3_jax.config import (
    Config,
    DistributedConfig,
    ExpertParallelConfig,
    ParallelConfig,
    ShardingConfig,
    UserError,
    config_from_dict,
)
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.inference.expert_load import ExpertLoad
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.redundant_experts import measure_load, plan_places, replicate_experts
from dsv3_jax.inference.streaming import print_ids, print_text
from dsv3_jax.interop.checkpoint import is_weights_folder, open_checkpoint
from dsv3_jax.interop.load import load_hf, stores_fp8
from dsv3_jax.model.held import describe_weights, hold_in_fp8
from dsv3_jax.model.transformer import Variables, abstract_variables
from dsv3_jax.parallel import hosts
from dsv3_jax.parallel.load_balancer import logged_load
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout, make_layout
from dsv3_jax.training.restore import read_meta, restore


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
    tokenizer = find_tokenizer(options)
    config, layout, variables = load_run(options)
    if options.fp8:
        variables = hold_in_fp8(variables, config.model)
        print(describe_weights(variables), file=sys.stderr)
    if tokenizer is None:
        prompts = [parse_ids(text) for text in options.token_ids]
    else:
        prompts = [[*tokenizer.prompt_prefix, *tokenizer.encode(p)] for p in options.prompt]
    if options.redundant_experts:
        variables = with_redundant_experts(options, config, layout, variables, prompts)
    load = ExpertLoad(config.model) if options.save_expert_load else None
    tokens = generate(
        variables,
        prompts,
        config.model,
        max_new_tokens=options.max_new_tokens,
        cache_length=options.cache_length,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        layout=layout,
        fp8_cache=options.fp8_cache,
        expert_load=load,
    )
    one = len(prompts) == 1  # shown as it comes
    texts = [(int(ids[0]) for ids in tokens)] if one else zip(*(ids.tolist() for ids in tokens))
    for number, text in enumerate(texts):
        if tokenizer is None:
            print_ids(text, config.model.eos_token_ids)
            continue
        if not one:
            print(f"--- {number}")
        print_text(options.prompt[number], text, tokenizer, config.model.eos_token_ids)
    if load is not None and options.save_expert_load and jax.process_index() == 0:
        load.write(options.save_expert_load)
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


def find_tokenizer(options: InferOptions) -> Tokenizer | None:
    """The tokenizer asked for or the checkpoint's own; None where ids are given.

    Raises UserError, with the ways out, for a folder of weights without one that can be read: to
    take another in its place would feed the model other ids. A run without a file of its own was
    trained on bytes, as its config.json says.
    """
    if options.token_ids:
        return None
    if options.tokenizer:
        return load_tokenizer(options.tokenizer)
    folder = options.checkpoint
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    if not is_weights_folder(folder) and trained_on_bytes(folder):
        return load_tokenizer("byte")
    try:
        return load_tokenizer(folder)
    except UserError as error:
        if is_weights_folder(folder):
            open_checkpoint(folder)  # what is wrong with the weights comes first
        raise UserError(
            f"{folder} has no tokenizer.json: {error}\nConvert its tokenizer to that form, or give "
            "--tokenizer (the path of one, or 'byte'), or --token-ids 1,2,3"
        ) from error


def trained_on_bytes(run_dir: Path) -> bool:
    """Whether a run's config.json names the byte tokenizer, or is not there to say."""
    try:
        values = json.loads((run_dir / "config.json").read_text())
        return values["data"]["tokenizer"] == "byte"
    except (OSError, ValueError, KeyError, TypeError):
        return True


def load_run(options: InferOptions) -> tuple[Config, Layout, Variables]:
    """Config and parameters of a run, without the optimizer's state, or of a weights folder.

    And the layout of the mesh asked for, on which a run's parameters are read where they belong.
    """
    if not options.checkpoint.is_dir():
        raise UserError(f"--checkpoint {options.checkpoint}: no such folder")
    if is_weights_folder(options.checkpoint):
        dtype = "stored" if options.fp8 and stores_fp8(options.checkpoint) else "bf16"
        model, variables = load_hf(options.checkpoint, dtype=dtype)
        config = Config(model=model)
        return config, layout_for(options, config), variables
    if options.step != "auto" and not options.step.isdigit():
        raise UserError(f"--step {options.step} must be auto or a step number")
    folder = options.checkpoint / "checkpoints"
    step, meta = read_meta(folder, options.step)
    config = config_from_dict(meta["config"])
    layout = layout_for(options, config)
    variables, _ = restore(folder, step, abstract_variables(config.model, layout), partial=True)
    return config, layout, variables


def layout_for(options: InferOptions, config: Config) -> Layout:
    """The layout of the mesh asked for; UserError when it does not fit the model."""
    options.mesh.check_model(config.model)
    # Where one device is asked for there is no word of the others.
    alone = options.mesh.num_devices == jax.process_count() == 1
    mesh = make_mesh(options.mesh, jax.devices()[:1] if alone else None)
    return make_layout(mesh, options.sharding, options.expert_parallel)


def with_redundant_experts(
    options: InferOptions, config: Config, layout: Layout, variables: Variables, prompts
) -> Variables:
    """The variables with more than one place for busy experts."""
    model = config.model
    if options.expert_load == "prompts":
        load = measure_load(variables, prompts, model, layout)
    else:
        logged = options.checkpoint / "metrics.jsonl"
        load = logged_load(logged if options.expert_load == "logged" else options.expert_load)
    plan = plan_places(load, options.redundant_experts, model, layout)
    return replicate_experts(variables, plan, model, layout)


def parse_ids(text: str) -> list[int]:
    """Token ids from "1,2,3"; UserError when one is no number."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--token-ids {text!r} must be numbers with commas between") from None


if __name__ == "__main__":
    cli.run_command(main)
