"""What an experiment changes of a run besides its config: functions in the place of the run's own.

A Config is data, saved with every checkpoint; these are code, given to `init_state`, `train_step`,
`batches` or train.py's `main`. Without any the compiled program is the same as before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import optax
from jaxtyping import Array, Int

from dsv3_jax.model.transformer import Outputs

# The loss of Outputs on rows of T + 1 tokens, [B, T + 1]; an f32 scalar, instead of all terms.
Loss = Callable[[Outputs, Int[Array, "B T1"]], Array]


class DataSource(Protocol):
    """Rows of tokens, wherever they come from."""

    def __call__(self, row: int, /) -> Sequence[int]:
        """The T + 1 token ids of a row; the same ones whenever it is asked for."""
        ...


@dataclass(frozen=True)
class Extensions:
    """Functions in the place of a run's own; None: the run's own. Compared by identity.

    Fields:
        score, select: of every router, see `route`.
        attention_bias: of every layer, see `Pass`.
        loss: of `forward`'s Outputs. It takes the place of cross-entropy, MTP and balance terms,
            and is reported as `ce`. On one device and on meshes, but not in a pipeline.
        optimizer: any optax transformation. Its updates are added as they are: rate, decay and
            clipping are its own, the schedule's learning rate is handed to it as the extra
            argument `learning_rate`.
        on_metrics: called with (step, values) for each line of metrics.jsonl, on every process.
        data: rows to train on instead of the corpus', which is still what validation reads.

    Source: this project (docs/extending.md).
    """

    score: Callable[..., Any] | None = None
    select: Callable[..., Any] | None = None
    attention_bias: Callable[..., Any] | None = None
    loss: Loss | None = None
    optimizer: optax.GradientTransformation | None = None
    on_metrics: Callable[[int, dict[str, Any]], Any] = lambda step, values: None
    data: DataSource | None = None

    def __repr__(self) -> str:
        given = (f"{name}={getattr(self, name)!r}" for name in self._given)
        return f"Extensions({', '.join(given)})"

    @property
    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not f.default]

    @property
    def of_pass(self) -> dict[str, Any]:
        """The fields of a `Pass`."""
        names = ("score", "select", "attention_bias")
        return {name: getattr(self, name) for name in names}

    @property
    def generates(self) -> bool:
        """Whether `generate`, which takes none of these, writes with the model that was trained."""
        return not any(self.of_pass.values())

    def told(self) -> list[str]:
        """The lines in which a run says what of it is not in its config."""
        if not self._given:
            return []
        lines = [f"extensions: {', '.join(self._given)}; checkpoints do not hold them"]
        if not self.generates:
            lines.append("no sample will be written: generation does not take these extensions")
        return lines


NONE = Extensions()
