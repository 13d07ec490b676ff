"""What a run learns from, how, for how long, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.rules import DType, require_not_negative, require_positive, round_up


@dataclass(frozen=True)
class QuantConfig:
    """What is computed in fewer bits; `dsv3_jax/quantization/recipe.py` spells the presets out."""

    preset: Literal["bf16", "fp8_paper", "fp8_blockwise_dgrad", "fp8_head"] = "bf16"


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how documents become rows."""

    # "stdlib", a text file, a folder of text files, a `prepare`d folder; or several of these by
    # weight, as in A:0.7,B:0.3.
    path: str = "stdlib"
    tokenizer: str = "byte"  # "byte", "bpe:N" (trained on the corpus), or a tokenizer.json's path
    val_fraction: float = 0.02  # of the documents, chosen by a hash of each
    fim_rate: float = 0.1  # fraction of training documents in fill-in-the-middle (PSM) order
    mask_documents: bool = False  # True: no attention across documents of a row (V3: False)
    mask_conversations: bool = True  # the same for conversations, which are packed into rows whole
    long_documents: Literal["cut", "drop"] = "drop"  # conversations longer than a row
    verify: Literal["auto", "all", "sizes"] = "auto"
    """When opened, token files are hashed: up to 1 GiB a side, "all" of them, or none."""

    def problems(self) -> list[str]:
        """Fractions outside their range, and names that are empty."""
        found = [
            f"{name} is empty: name one, or leave the option out"
            for name in ("path", "tokenizer")
            if not getattr(self, name).strip()
        ]
        if not 0 < self.val_fraction < 1:
            found.append(f"val_fraction={self.val_fraction} must lie between 0 and 1, exclusive")
        if not 0 <= self.fim_rate <= 1:
            found.append(f"fim_rate={self.fim_rate} must lie in [0, 1]")
        return found


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of a run, and what is looked at on the way."""

    steps: int = 1000  # 0: the state before the first step is saved, and no more
    batch_size: int = 16  # sequences a step, once the batch-size ramp is over
    # Sequences a forward pass. None: the whole batch, or as many as the batch-size ramp needs to
    # take its steps (Config.micro_batch_size).
    micro_batch_size: int | None = None
    seq_len: int = 256
    remat: Literal["none", "dots", "v3", "full"] = "none"
    # MTP's loss trains the MTP modules alone: the main model, embedding and head see none of it.
    mtp_detach: bool = False
    log_every: int = 10
    eval_every: int = 200  # validation also runs after the last step
    eval_batches: int = 8
    max_nonfinite_steps: int = 10  # skipped steps in a row before the run stops
    sample_tokens: int = 160  # length of the text written when the run ends; 0: none
    sample_every: int = 0  # steps between texts on the way, kept in samples.jsonl; 0: none
    profile_steps: int = 0  # this many steps, from the tenth on or earlier, traced into profile/

    def problems(self) -> list[str]:
        """What is wrong with the sizes of a step."""
        found: list[str] = []
        names = "batch_size seq_len log_every eval_every eval_batches max_nonfinite_steps"
        require_positive(found, self, names.split())
        for name in ("steps", "sample_tokens", "sample_every"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative")
        micro = self.micro_batch_size
        if micro is not None and (micro <= 0 or self.batch_size % micro):
            found.append(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={micro}: "
                f"use batch_size={round_up(self.batch_size, max(micro, 1))}"
            )
        return found


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the V3 report, section 4.2. Its epsilon and decay mask are not published:
    1e-8, and decay of matrices only."""

    learning_rate: float = 2.2e-4  # the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: DType = "float32"  # of both moments; the paper holds them in bfloat16
    # Of a moving average of the weights, f32 and held like the moments (V3 report, section 3.2.3;
    # the value is not published); 0: none. `export-hf --ema` writes it.
    average_decay: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with AdamW's values."""
        found: list[str] = []
        require_positive(found, self, ["learning_rate", "eps", "clip_norm"])
        require_not_negative(found, self, ["weight_decay"])
        for name in ("b1", "b2", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must lie in [0, 1)")
        return found


@dataclass(frozen=True)
class ScheduleConfig:
    """The paper's schedules (V3 report, section 4.2) in fractions of the run's tokens.

    They are of 14.8T there; a run of any length goes through the same phases.
    """

    steps: int | None = None  # the plan's length, where it is not train.steps
    warmup_steps: int = 2000
    decay_start: float = 10.0 / 14.8  # the peak rate until here,
    decay_end: float = 14.3 / 14.8  # then a cosine down to `decay_ratio` of it until here,
    decay_ratio: float = 0.1
    final_start: float = 14.633 / 14.8  # and from here on `final_ratio` of the peak
    final_ratio: float = 7.3e-6 / 2.2e-4
    batch_start_ratio: float = 0.2  # first batch size over the full one (3072 / 15360);
    batch_ramp_end: float = 0.469 / 14.8  # it grows linearly in tokens until here
    bias_update_speed: float = 1e-3  # gamma of the router bias,
    bias_update_end: float = 14.3 / 14.8  # zero from here on
    balance_loss_weight: float = 1e-4  # alpha, of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # lambda,
    mtp_switch: float = 10.0 / 14.8  # which from here on is
    mtp_loss_weight_final: float = 0.1
    # A resumed run's learning rate may be far from the last step's.
    accept_rate_jump: bool = False

    def problems(self) -> list[str]:
        """Which phases are out of order."""
        found: list[str] = []
        if self.steps is not None and self.steps <= 0:
            found.append(f"steps={self.steps} must be positive, or None for train.steps")
        names = ["warmup_steps", "decay_ratio", "final_ratio", "batch_ramp_end", "mtp_switch"]
        names += ["bias_update_speed", "bias_update_end", "balance_loss_weight"]
        names += ["mtp_loss_weight", "mtp_loss_weight_final"]
        require_not_negative(found, self, names)
        if not 0 <= self.decay_start <= self.decay_end <= self.final_start <= 1:
            found.append(
                f"phases must come in order: 0 <= decay_start={self.decay_start} <= "
                f"decay_end={self.decay_end} <= final_start={self.final_start} <= 1"
            )
        if not 0 < self.batch_start_ratio <= 1:
            found.append(f"batch_start_ratio={self.batch_start_ratio} must lie in (0, 1]")
        return found


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen base, which init_from names; rank 0: all weights train."""

    rank: int = 0
    alpha: float = 16.0  # an update counts alpha / rank
    # Names of projections, ours or published, alone or with their module (mlp/experts/down_proj);
    # none: all of attention.
    targets: tuple[str, ...] = ()
    # How the base is held: as the FP8 blocks that were published, or in the model's dtype; "auto":
    # FP8 where the weights are stored so.
    base: Literal["auto", "fp8", "bf16", "f32"] = "auto"

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        found = []
        if self.rank < 0:
            found.append(f"rank={self.rank} must not be negative")
        if self.alpha <= 0:
            found.append(f"alpha={self.alpha} must be positive")
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how much is kept."""

    every_steps: int = 500  # also after the last step and on SIGTERM
    keep: int = 3  # and the newest that an ordinary step has followed (training/divergence.py)

    def problems(self) -> list[str]:
        """What is wrong with the counts."""
        found: list[str] = []
        require_positive(found, self, ["every_steps", "keep"])
        return found


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as stuck: its stacks are then written to stacks.txt."""

    min_seconds: float = 600.0  # no step for this long,
    median_steps: float = 20.0  # and for this many times the median step; 0 seconds: never
    exit: bool = False  # then also end the process, with exit code 124

    def problems(self) -> list[str]:
        """What is wrong with the limits."""
        found: list[str] = []
        require_not_negative(found, self, ["min_seconds", "median_steps"])
        return found
