"""The options of `python -m dsv3_jax serve`."""

from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.config import (
    ExpertParallelConfig,
    ParallelConfig,
    ShardingConfig,
    UserError,
)

POSITIVE = (
    "slots", "max_waiting", "max_connections", "max_body_bytes", "request_timeout",
    "prefill_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class ServeOptions:
    """Serve a checkpoint with OpenAI's API: completions, chat, models; /health and /metrics."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    host: str = "127.0.0.1"  # other than this machine's own: give an --api-key
    port: int = 8000  # 0: any that is free
    api_key: str | None = None  # what clients must send as a bearer token
    model_name: str | None = None  # None: the folder's name
    chat_template: Path | None = None  # None: the tokenizer's own, or DeepSeek-V3's form
    tokenizer: str | None = None  # None: the one the model was trained with
    step: str = "auto"  # "auto": the newest valid checkpoint; or its number
    speculative: int = 0  # tokens drafted a step by the MTP modules; the text stays the same
    slots: int = 16  # requests written at once
    max_length: int | None = None  # tokens of a sequence; None: the model's, 8192 at most
    pages: int | None = None  # of 64 tokens, for all sequences; None: what all slots need
    prefill_tokens: int = 512  # of a prompt that are computed between two steps
    top_logprobs: int = 0  # the most that a request may ask for with each token
    max_waiting: int = 256  # requests in the queue; more are answered with 429
    max_body_bytes: int = 2**20
    max_connections: int = 1024  # open at once; more are answered with 503
    request_timeout: float = 600.0  # seconds to the end of an answer, its reader's included
    drain_timeout: float = 60.0  # seconds that answers under way have after SIGTERM
    fp8: bool = False  # hold the projections as FP8 and multiply in FP8
    fp8_cache: bool = False  # keep the latent cache as FP8 with scales
    micro_batches: int = 1  # on a mesh, 2: half of a step's sequences beside the others' exchange
    mesh: ParallelConfig = field(default_factory=ParallelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    devices: int | None = None  # run on this many virtual CPU devices

    def check(self) -> None:
        """Raises UserError for values that cannot be served with."""
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be positive"
                )
        for name in ("drain_timeout", "speculative", "top_logprobs"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative"
                )
        if self.devices is not None and self.devices <= 0:
            raise UserError(f"--devices {self.devices} must be positive")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port {self.port} must lie in 0 to 65535")
        if self.api_key == "":
            raise UserError("--api-key is empty: leave it out to serve without one")
