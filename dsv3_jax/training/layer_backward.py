"""A layer of a pipeline's stage: forward with what it keeps, and backward in two parts.

What `jax.vjp` saves of a layer is kept but for what is made of weights alone: those, in whatever
form the backward pass wants them, are made again from the rank's own, as a micro-batch in flight
would otherwise hold a copy of its stage's weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jcore
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.block import Block
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.micro_batches import in_halves
from dsv3_jax.model.stack import DENSE
from dsv3_jax.parallel.split_backward import SplitBackward, made_of_first, split_backward
from dsv3_jax.training.state import variables_of

Weights = tuple[Any, Any]  # what is trained of a layer, and what is not


class LayerStats(NamedTuple):
    """What a layer says of its tokens; a dense layer's load has no experts."""

    balance: Float[Array, ""]
    load: Int[Array, " E"]
    rounds: Float[Array, ""]


class LayerBackward:
    """A layer of one kind, forward with what is saved of it, and backward in two parts.

    What the pullback holds is the same for all layers of a kind, so that it is taken down when the
    forward is traced, and read when the backward is.
    """

    def __init__(self, kind: str, how: Pass, config: Config):
        self.how, self.config = how, config
        self.block = Block(how, kind == DENSE)
        self.structure: Any = None
        self.of_weights: list[int] = []  # leaves of the pullback, by their place, ...
        self.remake: Callable[..., list[Any]] = lambda *weights: []  # ... and what makes them again
        self.parts: SplitBackward | None = None

    def forward(self, weights: Weights, x, of_tokens: Tokens) -> tuple[Any, list[Any], LayerStats]:
        """(y, what is saved, statistics). What weights alone make is not among what is saved."""
        inputs = weights, x, of_tokens
        closed, shapes = jax.make_jaxpr(self._with_pullback, return_shape=True)(*inputs)
        results, structure = jax.tree.flatten(shapes[0])
        flat = jcore.jaxpr_as_fun(closed)(*jax.tree.leaves(inputs))
        count, of_pullback = len(jax.tree.leaves(weights)), range(len(results), len(flat))
        places, self.remake = made_of_first(closed, count, of_pullback)
        self.of_weights = [place - len(results) for place in places]
        y, stats = jax.tree.unflatten(structure, flat[: len(results)])
        return y, [flat[i] for i in of_pullback if i not in places], stats

    def first(self, weights: Weights, saved, dy, d_balance):
        """(dx, gradients of weights made on the way, by their place, what `second` needs)."""
        inputs = (jax.tree.leaves(weights), saved, dy, d_balance)
        # Where W follows at once, what shard_maps would leave for it only takes room.
        within = self.config.pipeline.takes_experts_apart()
        self.parts = split_backward(
            self._pullback, *inputs, num_weights=1, num_kept=2, within=within
        )
        (dx,), early, pending = self.parts.first(*inputs)
        return dx, early, pending

    def second(self, weights: Weights, saved, pending) -> dict[int, Any]:
        """The other gradients of weights, by their place."""
        assert self.parts is not None
        late = self.parts.second(pending, jax.tree.leaves(weights), saved)
        return {i: gradient for i, gradient in enumerate(late) if gradient is not None}

    def output(self, weights: Weights, x, of_tokens: Tokens) -> tuple[Any, LayerStats]:
        """(y, statistics), for no backward pass."""
        variables = self.how.gathered(joined(*weights, self.config))
        apply: Any = partial(self.block.apply, variables)
        if self.how.micro_batches == 2 and not self.block.dense:
            y, _, stats = in_halves(apply, x, of_tokens, None, self.how.layout)
        else:
            y, _, stats = apply(x, of_tokens, None)
        y = self.how.layout.constrain(y, "batch", "residual")
        if stats is None:
            return y, LayerStats(jnp.zeros(()), jnp.zeros(0, jnp.int32), jnp.zeros(()))
        return y, LayerStats(stats.balance_loss, stats.load_E, stats.rounds.astype(jnp.float32))

    def _with_pullback(self, weights: Weights, x, of_tokens: Tokens):
        """((y, statistics), the leaves of the pullback)."""
        params, fixed = weights

        def apply(params, x):
            y, stats = self.output((params, fixed), x, of_tokens)
            return (y, stats.balance), (stats.load, stats.rounds)

        saving = self.how.saving(apply)
        (y, balance), pull, (load, rounds) = jax.vjp(saving, params, x, has_aux=True)
        leaves, self.structure = jax.tree.flatten(pull)
        return (y, LayerStats(balance, load, rounds)), leaves

    def _pullback(self, weights, saved, dy, d_balance):
        rest, again = iter(saved), dict(zip(self.of_weights, self.remake(*weights)))
        count = len(saved) + len(again)
        leaves = [again[i] if i in again else next(rest) for i in range(count)]
        d_params, dx = jax.tree.unflatten(self.structure, leaves)((dy, d_balance))
        return [dx], jax.tree.leaves(d_params)


def joined(trained: Any, fixed: Any, config: Config) -> Any:
    """The variables of layers or ends, of what is trained and what is not."""
    base = fixed if "params" in fixed else None
    return variables_of(trained, fixed.get("router", {}), base, config)
