"""Drafts by the MTP modules, and how many of them are what the model says itself.

V3 report, section 5.4.3: the MTP module, trained to predict one token further, drafts; the model
checks the drafts of a step in one pass over them (Leviathan et al. 2023). A draft is kept only when
it is the token that the model itself picks there. Greedily that is the likeliest token. When
sampling, both draws use the same noise (`sampling.py`): the model's draw is an exact draw from its
own distribution whatever was drafted, and a draft from a close distribution is mostly the same
token (Gumbel coupling: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
speculative decoding", 2024). So speculation changes no token of a text, greedy or drawn; rejection
sampling would keep a few more drafts, and keep the distribution only.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.inference.sampling import Settings, draw
from dsv3_jax.model.cache import LatentCache, PagedCache
from dsv3_jax.model.decode import decode_mtp
from dsv3_jax.model.ends import logits_of
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import Variables


class Drafting(NamedTuple):
    """What the MTP modules carry from step to step."""

    caches: tuple[LatentCache | PagedCache, ...]  # of each module, one layer each
    # For each module but the first, the hidden state that its next row begins with: h^k of the last
    # row whose token k + 1 further is known.
    carried: tuple[Float[Array, "B D"], ...]


class Rows(NamedTuple):
    """The rows of a step that hold tokens now, as drafting reads them."""

    hidden: Float[Array, "B T D"]  # the model's, after the final norm
    following: Int[Array, "B T"]  # the token after each row, up to the newest one
    start: Int[Array, " B"]  # the first row's position
    last: Int[Array, " B"]  # the last row that holds, counted from start


def agreeing(drafts: Int[Array, "B D"], drawn: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many drafts, from the first on, are the model's own choice; T = D + 1."""
    same = drafts == drawn[:, :-1]
    return jnp.cumprod(same.astype(jnp.int32), axis=1).sum(1)


def propose(
    variables: Variables,
    drafting: Drafting,
    rows: Rows,
    settings: Settings,
    number: Int[Array, " B"],
    how: Pass,
    steps: Pass,
    drafts: int,
    sampled: bool,
) -> tuple[Int[Array, "B D"], Drafting]:
    """So many drafts of what follows, the first for token number[b], and the caches with the rows.

    Draft k is module k's, or the last module's once these are used up: it then reads its own hidden
    state as the next row, one at a time, as `steps` says. A Pass `how` with `prefill` fills empty
    caches; rows.start is 0 then.
    """
    params, layout = variables["params"], how.layout
    caches, carried, proposed = list(drafting.caches), [], []
    batch = jnp.arange(len(rows.start))
    window, tokens, at, start = rows.hidden, rows.following, rows.last, rows.start
    newest = rows.hidden[:, :1]  # the hidden state that the last draft was read from
    for k in range(drafts):
        of_step = how
        if k >= len(caches):
            start, of_step = rows.start + rows.last + 1 + k - len(caches), steps
            window, tokens, at = newest, proposed[-1][:, None], jnp.zeros_like(rows.last)
        elif k:
            if how.prefill:  # row i reads token i + k + 1
                carried.append(window[batch, jnp.maximum(rows.last + 1 - k, 0)])
                tokens = jnp.roll(tokens, -1, axis=1)
            else:  # the row before is known only now: it read a draft
                carried.append(window[batch, rows.last])
                window = jnp.concatenate([drafting.carried[k - 1][:, None], window], axis=1)
                tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
                at, start = at + 1, start - 1
            tokens = tokens.at[batch, at].set(proposed[-1])
        module = min(k, len(caches) - 1)
        # A module reads all of the rows of the one before; of the last one's a draft reads one.
        wanted = at if k + 1 >= len(caches) and not of_step.prefill else None
        window, caches[module] = decode_mtp(
            variables, module, window, tokens, start, caches[module], of_step, wanted
        )
        newest = window if wanted is not None else window[batch, at][:, None]
        newest = layout.constrain(newest)
        drawn = draw(logits_of(params, newest), settings, number + k, sampled)
        proposed.append(layout.constrain(drawn[:, 0]))
    return jnp.stack(proposed, axis=1), Drafting(tuple(caches), tuple(carried))
