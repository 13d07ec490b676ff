"""The training loss: next-token cross-entropy, MTP, and the sequence-wise balance loss."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.ends import gathered_ends
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.transformer import Outputs, States, Variables, forward, hidden_states
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.recipe import recipe_named
from dsv3_jax.training.cross_entropy import head_nats
from dsv3_jax.training.extensions import NONE, Extensions


class LossTerms(NamedTuple):
    """The parts of the loss, f32, and every router's load, named as in `variables["router"]`.

    Source: V3 report, sections 2.1.2 and 2.2.
    """

    ce: Float[Array, ""]  # main model, nats a token
    mtp: Float[Array, ""]  # mean over depths, before lambda
    balance: Float[Array, ""]  # sum over MoE layers, before alpha
    load: dict[str, Int[Array, "*L E"]]
    rounds: Float[Array, ""]  # of exchanges with the experts, in the layer that took most; see moe


class Supervised(NamedTuple):
    """Rows of T + 1 tokens that say what counts, in the place of an array of tokens.

    Fields:
        tokens: as ever.
        targets: whether a token counts where it is predicted.
        segments: documents of a row are 1, 2, ...; 0 is padding.
        per_target: of the main head and each MTP depth, what one counted target is of its mean. It
            is over all targets of a step, whatever the micro-batch and the device they lie in;
            None: over those of these rows.
    """

    tokens: Int[Array, "*A B T1"]
    targets: Bool[Array, "*A B T1"]
    segments: Int[Array, "*A B T1"]
    per_target: Float[Array, "*A H"] | None = None


Rows = Int[Array | np.ndarray, "*A B T1"] | Supervised


def tokens_of_rows(rows: Rows) -> Int[Array | np.ndarray, "*A B T1"]:
    """The tokens, whatever else is known of them."""
    return rows.tokens if isinstance(rows, Supervised) else rows


def with_shares(rows: Rows, micro_batches: Any, depths: int) -> Rows:
    """Micro-batches that know what a target is of the step's mean, times how many there are:
    losses of micro-batches are averaged afterwards."""
    if not isinstance(rows, Supervised):
        return rows
    counts = jnp.stack([_counts_at(rows, depth).sum() for depth in range(depths + 1)])
    share = micro_batches / jnp.maximum(counts, 1).astype(jnp.float32)
    return rows._replace(per_target=jnp.broadcast_to(share, (len(rows.tokens), depths + 1)))


def real_tokens(rows: Rows) -> Bool[Array, "B T"] | None:
    """Which of the tokens that are read are no padding; None: all."""
    return jnp.asarray(rows.segments)[:, :-1] != 0 if isinstance(rows, Supervised) else None


def _counts_at(rows: Supervised, depth: int) -> Bool[Array, "*A B T"]:
    """Whether what row i predicts at an MTP depth, token i + depth + 1, counts: it is a target,
    and of the same document."""
    length = rows.tokens.shape[-1] - 1
    ahead = jnp.arange(length) < length - depth
    of_document = rows.segments[..., :-1] == jnp.roll(rows.segments, -depth - 1, -1)[..., :-1]
    return ahead & of_document & jnp.roll(rows.targets, -depth - 1, -1)[..., :-1]


def training_pass(
    config: Config, layout: Layout = ONE_DEVICE, extensions: Extensions = NONE
) -> Pass:
    """What a run's config, and its extensions, say of its passes."""
    train, recipe = config.train, recipe_named(config.quant.preset)
    own = {"mtp_detached": train.mtp_detach, **extensions.of_pass}
    own["micro_batches"] = 2 if config.expert_parallel.overlap else 1
    return Pass(config.model, recipe, layout, train.remat, **own)


def training_loss(
    variables: Variables,
    rows: Rows,
    mtp_loss_weight: Float[Array, ""] | float,
    config: Config,
    layout: Layout = ONE_DEVICE,
    extensions: Extensions = NONE,
) -> tuple[Float[Array, ""], LossTerms]:
    """ce + lambda * mtp + alpha * balance, and its terms, of rows of T + 1 tokens.

    V3 report, eqs. 17 and 23-25. The balance loss is summed over layers, MTP's included (its
    reduction is not published). Supervised rows are counted over their targets, and loads and the
    balance loss over tokens that are no padding. Means over tokens, in nats, f32. Raises ValueError
    for a loss of one's own that is no scalar.

    >>> import jax, numpy as np, dsv3_jax as ds
    >>> config, rows = ds.load_config("tiny"), np.ones((2, 17), np.int32)
    >>> loss = lambda variables: ds.training_loss(variables, rows, 0.3, config)[0]
    >>> jax.eval_shape(loss, ds.abstract_variables(config.model))
    ShapeDtypeStruct(shape=(), dtype=float32)
    """
    segments = documents(rows, config)
    how = training_pass(config, layout, extensions)
    if extensions.loss is not None:
        outputs = forward(
            *(variables, tokens_of_rows(rows)[:, :-1], how),
            segments=segments,
            counted=real_tokens(rows),
        )
        loss = extensions.loss(outputs, jax.tree.map(jnp.asarray, rows))
        if jnp.shape(loss) != ():
            raise ValueError(f"a loss must be one number, not of shape {jnp.shape(loss)}")
        load, balance, rounds = _router_stats(outputs)
        return loss, LossTerms(loss, jnp.zeros(()), balance, load, rounds)
    params = gathered_ends(variables["params"], how)
    states = hidden_states(
        {**variables, "params": params},
        tokens_of_rows(rows)[:, :-1],
        how,
        segments=segments,
        counted=real_tokens(rows),
    )
    nats, ce, mtp = prediction_nats(params, states, rows, mtp_loss_weight, segments, how)
    load, balance, rounds = _router_stats(states)
    loss = nats + config.schedule.balance_loss_weight * balance
    return loss, LossTerms(ce, mtp, balance, load, rounds)


def documents(rows: Rows, config: Config) -> Int[Array, "B T"] | None:
    """The document of each token that is read, where attention must not cross; else None."""
    if isinstance(rows, Supervised):
        return jnp.asarray(rows.segments)[:, :-1] if config.data.mask_conversations else None
    return document_numbers(rows[:, :-1], config) if config.data.mask_documents else None


def prediction_nats(
    params: dict[str, Any],
    states: States,
    rows: Rows,
    mtp_loss_weight: Float[Array, ""] | float,
    segments: Int[Array, "B T"] | None,
    how: Pass,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(ce + lambda * mtp, ce, mtp), nats a token, of the main head and the mean of MTP's."""
    depths, weight = len(states.mtp_hidden), params["lm_head"]
    hidden = jnp.stack([states.hidden, *states.mtp_hidden], axis=1)
    targets, shares = _targets_of_heads(rows, segments, depths, how.layout)
    factors = jnp.stack([jnp.ones(()), *[mtp_loss_weight / max(depths, 1)] * depths])

    def of_heads(chosen: slice, weight: Any):
        operands = hidden[:, chosen], weight, targets[:, chosen], shares[:, chosen]
        return head_nats(*operands, factors[chosen], how.layout, how.recipe.lm_head)

    if how.mtp_detached and depths:
        nats, (ce,) = of_heads(slice(0, 1), weight)
        of_mtp, mtp = of_heads(slice(1, None), jax.lax.stop_gradient(weight))
        nats += of_mtp
    else:
        nats, (ce, *mtp) = of_heads(slice(None), weight)
    return nats, ce, sum(mtp, jnp.zeros(())) / max(depths, 1)


def mean_nats(variables: Variables, rows: Rows, how: Pass, segments: Any) -> Float[Array, ""]:
    """The main model's cross-entropy, nats a token, of rows of T + 1 tokens; MTP is not run."""
    config = dataclasses.replace(how.config, num_nextn_predict_layers=0)
    how = dataclasses.replace(how, config=config)
    params, ids = gathered_ends(variables["params"], how), tokens_of_rows(rows)[:, :-1]
    states = hidden_states({**variables, "params": params}, ids, how, segments=segments)
    return nats_of_hidden(params, states.hidden, rows, how)


def nats_of_hidden(params: Any, hidden: Any, rows: Rows, how: Pass) -> Float[Array, ""]:
    """The same of the main model's normed hidden states [B, T, D], with its ends gathered."""
    of_head = _targets_of_heads(rows, None, 0, how.layout)
    operands = hidden[:, None], params["lm_head"], *of_head, jnp.ones(1)
    return head_nats(*operands, how.layout, how.recipe.lm_head)[0]


def _targets_of_heads(rows: Rows, segments, depths: int, layout: Layout):
    """Targets and shares of the mean, [B, H, T] in the layout's order, of main head and MTP's."""
    of_heads, shares = [], []
    targets = tokens_of_rows(rows)[:, 1:]
    if isinstance(rows, Supervised) and rows.per_target is None:
        one_batch = jax.tree.map(lambda x: x[None], rows)
        rows = jax.tree.map(lambda x: x[0], with_shares(one_batch, 1, depths))
    for depth in range(depths + 1):
        if isinstance(rows, Supervised):
            assert rows.per_target is not None
            share = jnp.where(_counts_at(rows, depth), rows.per_target[depth], 0.0)
        else:
            # Row i predicts token i + depth + 1: T - depth terms, still divided by T (eq. 24).
            valid = jnp.arange(targets.shape[1]) < targets.shape[1] - depth
            valid = jnp.broadcast_to(valid, targets.shape)
            if segments is not None:
                valid &= segments == jnp.roll(segments, -depth, axis=1)
            share = valid.astype(jnp.float32) / targets.size
        of_heads.append(layout.in_order(layout.whole_rows(jnp.roll(targets, -depth, axis=1))))
        shares.append(layout.in_order(layout.whole_rows(share)))
    return jnp.stack(of_heads, axis=1), jnp.stack(shares, axis=1)


def document_numbers(tokens: Int[Array | np.ndarray, "B T"], config: Config) -> Int[Array, "B T"]:
    """The number of each token's document within its row: one more from every bos token on."""
    return jnp.cumsum(tokens == config.model.bos_token_id, axis=1)


def _router_stats(
    out: States | Outputs,
) -> tuple[dict[str, Any], Float[Array, ""], Float[Array, ""]]:
    by_name: dict[str, MoEStats] = {f"mtp_{k}": stats for k, stats in enumerate(out.mtp_stats)}
    if out.stats is not None:
        by_name["moe_layers"] = out.stats
    balance = sum((stats.balance_loss.sum() for stats in by_name.values()), jnp.zeros(()))
    rounds = [jnp.max(stats.rounds) for stats in by_name.values()]
    most = jnp.stack(rounds).max().astype(jnp.float32) if rounds else jnp.zeros(())
    return {name: stats.load_E for name, stats in by_name.items()}, balance, most
