"""The options of infer.py, which of them fit together, and the request that they describe."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.config import (
    DistributedConfig,
    ExpertParallelConfig,
    ParallelConfig,
    ShardingConfig,
    UserError,
)
from dsv3_jax.config.files import check_folder_of
from dsv3_jax.inference.requests import Request


@dataclass(frozen=True)
class InferOptions:
    """Continue prompts with a trained model."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    prompt: list[str] = field(default_factory=list)
    """A text to continue; repeat the option for several."""
    token_ids: list[str] = field(default_factory=list)
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
    stop: list[str] = field(default_factory=list)
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

    @property
    def has_prompts(self) -> bool:
        """Whether what is to be continued is given on the command line."""
        return bool(self.prompt or self.token_ids)

    def request(self) -> Request:
        """How requests are completed that do not say so themselves; the prompt is theirs."""
        return Request(
            prompt=(),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raises UserError for options that do not fit together."""
        given = bool(self.prompt) + bool(self.token_ids) + (self.batch is not None)
        if given > 1 or (not given and not self.chat):
            raise UserError(
                "give --prompt TEXT or --token-ids 1,2,3 (each may be repeated), --batch "
                "FILE.jsonl, or --chat alone for a conversation"
            )
        if self.token_ids and (self.chat or self.stop):
            raise UserError("--chat and --stop are for text: give --prompt instead of --token-ids")
        batch = self.batch is not None
        if batch and self.chat:
            raise UserError(
                "--chat is for --prompt: a line of --batch with messages is a conversation"
            )
        for name, fits, place in (
            ("system", self.chat, "a conversation: add --chat"),
            ("chat_template", self.chat or batch, "conversations: add --chat, or give --batch"),
            ("out", batch, "--batch"),
            ("slots", batch, "--batch"),
            ("expert_load", self.redundant_experts, "--redundant-experts"),
        ):
            if not fits and getattr(self, name) != getattr(InferOptions, name):
                raise UserError(f"--{name.replace('_', '-')} is for {place}")
        if self.expert_load == "prompts" and not self.has_prompts:
            raise UserError("--expert-load prompts counts on --prompt or --token-ids: give one")
        for name in ("out", "save_expert_load"):
            if (path := getattr(self, name)) is not None:
                check_folder_of(path, f"--{name.replace('_', '-')}")
        for name in ("max_new_tokens", "slots", "cache_length", "devices"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("redundant_experts", "speculative"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative"
                )
        if "" in self.stop:
            raise UserError("--stop is empty: every text would end before its first letter")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(
                f"--temperature {self.temperature} must be finite and not negative, and --top-p "
                f"{self.top_p} must lie in (0, 1]"
            )


def parse_ids(text: str) -> list[int]:
    """Token ids from "1,2,3"; UserError when one is no number."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--token-ids {text!r} must be numbers with commas between") from None
