"""The training loss: next-token cross-entropy, MTP, and the sequence-wise balance loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.transformer import Outputs, Variables, forward
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout
from dsv3_jax.quantization.recipe import RECIPES


class LossTerms(NamedTuple):
    """The parts of the loss, f32, and every router's load, named as in `variables["router"]`."""

    ce: Float[Array, ""]  # main model, nats a token
    mtp: Float[Array, ""]  # mean over depths, before lambda
    balance: Float[Array, ""]  # sum over MoE layers, before alpha
    load: dict[str, Int[Array, "*L E"]]
    rounds: Float[Array, ""]  # of exchanges with the experts, in the layer that took most; see moe


def training_pass(config: Config, layout: Layout = ONE_DEVICE) -> Pass:
    """What a run's config says of its passes."""
    return Pass(config.model, RECIPES[config.quant.preset], layout, config.train.remat)


def training_loss(
    variables: Variables,
    rows: Int[Array | np.ndarray, "B T1"],
    mtp_loss_weight: Float[Array, ""],
    config: Config,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, ""], LossTerms]:
    """ce + lambda * mtp + alpha * balance, and its terms, of rows of T + 1 tokens.

    V3 report, eqs. 17 and 23-25. The balance loss is summed over layers, MTP's included (its
    reduction is not published).
    """
    tokens, targets = rows[:, :-1], rows[:, 1:]
    segments = document_numbers(tokens, config) if config.data.mask_documents else None
    out = forward(variables, tokens, training_pass(config, layout), segments=segments)
    ce = cross_entropy(out.logits, targets, layout=layout)
    mtp = jnp.zeros(())
    for depth, logits in enumerate(out.mtp_logits, start=1):
        # Row i predicts token i + depth + 1: T - depth terms, still divided by T (eq. 24).
        valid = jnp.broadcast_to(
            jnp.arange(targets.shape[1]) < targets.shape[1] - depth, targets.shape
        )
        if segments is not None:
            valid &= segments == jnp.roll(segments, -depth, axis=1)
        shifted = jnp.roll(targets, -depth, axis=1)
        mtp += cross_entropy(logits, shifted, valid, layout) / len(out.mtp_logits)
    load, balance, rounds = _router_stats(out)
    loss = ce + mtp_loss_weight * mtp + config.schedule.balance_loss_weight * balance
    return loss, LossTerms(ce, mtp, balance, load, rounds)


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array | np.ndarray, "B T"],
    valid: Bool[Array, "B T"] | None = None,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, ""]:
    """Nats a token, in f32: the sum over valid positions, divided by all B * T of them.

    Logits are as `forward` returns them under the layout, targets and valid in order.
    """
    targets = layout.in_order(targets)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    if layout.one_device:
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    else:  # a sum over the vocabulary, as it may be cut
        is_target = targets[..., None] == jnp.arange(logits.shape[-1])
        target_logits = jnp.where(is_target, logits, 0.0).sum(-1)
    nats = log_normalizer - target_logits
    if valid is not None:
        nats = jnp.where(layout.in_order(valid), nats, 0.0)
    return nats.mean()


def document_numbers(tokens: Int[Array | np.ndarray, "B T"], config: Config) -> Int[Array, "B T"]:
    """The number of each token's document within its row: one more from every bos token on."""
    return jnp.cumsum(tokens == config.model.bos_token_id, axis=1)


def _router_stats(out: Outputs) -> tuple[dict[str, Any], Float[Array, ""], Float[Array, ""]]:
    by_name: dict[str, MoEStats] = {f"mtp_{k}": stats for k, stats in enumerate(out.mtp_stats)}
    if out.stats is not None:
        by_name["moe_layers"] = out.stats
    balance = sum((stats.balance_loss.sum() for stats in by_name.values()), jnp.zeros(()))
    rounds = [jnp.max(stats.rounds) for stats in by_name.values()]
    most = jnp.stack(rounds).max().astype(jnp.float32) if rounds else jnp.zeros(())
    return {name: stats.load_E for name, stats in by_name.items()}, balance, most
