"""Texts that a run's model writes, on the way and at the end."""

import json
import logging
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.inference.generate import generate
from dsv3_jax.interop.load import return_free_memory
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.state import TrainState, variables_of

log = logging.getLogger(__name__)
PROMPT_TOKENS = 64


def write_sample(
    config: Config,
    layout: Layout,
    corpus: Corpus,
    state: TrainState,
    step: int,
    base: Any = None,
) -> None:
    """Lets the model continue the validation text's first lines, as it is after `step` steps.

    `base` are the frozen variables of a LoRA run.

    The text is shown, added to RUN/samples.jsonl (step, prompt, text), and is RUN/sample.txt.
    """
    if not config.train.sample_tokens:
        return
    length = min(PROMPT_TOKENS, len(corpus.val), config.train.seq_len)
    prompt = corpus.val.slice(0, length).tolist()
    if layout.platform == "cpu":
        return_free_memory()  # what validation was compiled in: a text's programs are compiled now
    tokens = generate(
        variables_of(state.params, state.router, base, config),
        [prompt],
        config.model,
        max_new_tokens=config.train.sample_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=config.seed,
        layout=layout,
    )
    decode, run_dir = corpus.tokenizer.decode, Path(config.run_dir)
    given, written = decode(prompt), decode([int(ids[0]) for ids in tokens])
    text = f"{given}\N{BROKEN BAR}{written}"
    if jax.process_index() == 0:
        (run_dir / "sample.txt").write_text(text)
        with (run_dir / "samples.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "prompt": given, "text": written}) + "\n")
    log.info("a sample (the model writes after the \N{BROKEN BAR}):\n%s", text)
