"""How much an engine holds, in what portions it computes, and what it has counted."""

from collections import Counter
from dataclasses import dataclass, field

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.model.micro_batches import check_micro_batches
from dsv3_jax.parallel.sharding import Layout


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine holds, and in what portions it computes.

    Fields:
        slots: sequences that are written at once.
        max_length: tokens of a sequence in the cache, at most.
        pages: of the pool, for each group of devices that shares sequences; None: what all slots
            need at max_length.
        chunks: sizes of a piece of a prompt; each is a program.
        chunk_rows: prompts in one program; each number is a program.
        token_budget: tokens of a step, those of sequences being written first.
        drafts: tokens drafted for a step by the model's MTP modules.
        paged: else each slot has a contiguous room, prompts come whole and only while nothing is
            being written.
        fp8_cache: latents as E4M3 with scales.
        share_prefixes: sequences that begin alike share pages.
        micro_batches: 2 takes both halves of the sequences through a layer together, so that one
            computes while the other's tokens are on their way to experts; on a mesh.
        top: of the likeliest tokens returned with each.
        experts: return each token's experts. Prefixes are then not shared, as what is shared is not
            computed.
        page: tokens of a page.
    """

    slots: int = 8
    max_length: int = 4096
    pages: int | None = None
    chunks: tuple[int, ...] = (32, 128, 512)
    chunk_rows: tuple[int, ...] = (1,)
    token_budget: int = 512
    drafts: int = 0
    paged: bool = True
    fp8_cache: bool = False
    share_prefixes: bool = True
    micro_batches: int = 1
    top: int = 0
    experts: bool = False
    page: int = PAGE

    @property
    def beyond(self) -> int:
        """Rows past a sequence's last token: a step checks drafts there, and drafts further."""
        return 2 * self.drafts

    def most_rows(self, prompt: int, new: int) -> int:
        """Rows that a sequence may come to hold in the cache; its last token is not fed back."""
        return prompt + new - 1 + self.beyond

    def size_of_chunk(self, longest: int, rows: int, writing: int) -> int:
        """The size of the next pieces of so many prompts, the longest of so many tokens.

        What the budget leaves beside sequences that are being written, and no more than it takes.
        """
        budget = self.token_budget - writing * (1 + self.drafts)
        affordable = [n for n in self.chunks if n * rows <= budget] or self.chunks[:1]
        return next((n for n in affordable if n >= longest), affordable[-1])

    def check(self, config: ModelConfig, layout: Layout) -> None:
        """Raises UserError for options that do not fit the model, the mesh or each other."""
        modules = config.num_nextn_predict_layers
        if self.drafts < 0 or (self.drafts and not modules):
            raise UserError(
                f"{self.drafts} drafts a step need an MTP module, and the model has {modules}"
            )
        if self.fp8_cache and not self.paged:
            raise UserError("an FP8 cache lies in pages: leave paged=False out")
        if not 1 <= self.max_length <= config.max_position_embeddings:
            raise UserError(
                f"a cache of {self.max_length} tokens must lie in 1 to "
                f"max_position_embeddings={config.max_position_embeddings}"
            )
        numbers = (self.slots, *self.chunks, *self.chunk_rows, self.token_budget, self.page)
        if not self.chunks or not self.chunk_rows or min(numbers) < 1 or self.top < 0:
            raise UserError(f"{self} has a number that is not positive")
        groups = layout.size("batch")
        if self.slots % groups or any(rows % groups for rows in self.chunk_rows):
            raise UserError(
                f"{self.slots} slots and {self.chunk_rows} prompts in a program must divide over "
                f"{groups} groups of devices"
            )
        check_micro_batches(self.micro_batches, self.slots, layout, self.paged, "slots")


@dataclass
class Statistics:
    """Counts since the engine was made."""

    steps: int = 0  # programs that took sequences further
    chunks: int = 0  # programs that took prompts in
    prompt_tokens: int = 0  # fed
    cached_tokens: int = 0  # of prompts, that were found in the cache
    new_tokens: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # finished, by reason
    preemptions: int = 0
    drafted: list[int] = field(default_factory=list)  # by position of the draft
    accepted: list[int] = field(default_factory=list)
    host_seconds: float = 0.0  # in step(), not waiting for devices
