"""The whole model as functions of plain dicts: init_variables, and `forward` for whole rows.

variables = {"params": ..., "router": ...}: what the optimizer trains, and the router biases that
it does not. `forward` composes the acts of ends.py, stack.py and mtp.py, which pipelines, drafts
and traces call by themselves; decode.py composes them with a cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import Weight, weights
from dsv3_jax.model.block import Block
from dsv3_jax.model.checks import check_tokens
from dsv3_jax.model.ends import embed_tokens, final_norm, gathered_ends, head
from dsv3_jax.model.forward_pass import Pass, Tokens, as_pass
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.mtp import MTPModule, run_mtp
from dsv3_jax.model.parameters import initializer
from dsv3_jax.model.placement import placed
from dsv3_jax.model.stack import run_layers
from dsv3_jax.parallel.sharding import ONE_DEVICE, Layout

Variables = dict[str, Any]


class States(NamedTuple):
    """What `hidden_states` returns; tokens and MTP as in `Outputs`."""

    hidden: Float[Array, "B T D"]  # after the final norm
    mtp_hidden: tuple[Float[Array, "B T D"], ...]  # one per depth, after their norms
    stats: MoEStats | None
    mtp_stats: tuple[MoEStats, ...]


class Outputs(NamedTuple):
    """What `forward` returns. At MTP depth k, the last k positions mean nothing.

    Source: V3 report, section 2.
    """

    # On a mesh whose context axis is a ring, tokens come in the order of `Layout.order`.
    logits: Float[Array, "B T V"]  # f32
    mtp_logits: tuple[Float[Array, "B T V"], ...]  # f32, one per depth
    stats: MoEStats | None  # of the MoE layers, stacked; None without any
    mtp_stats: tuple[MoEStats, ...]
    hidden: Float[Array, "B T D"]  # after the final norm


def init_variables(key: PRNGKeyArray, config: ModelConfig) -> Variables:
    """Fresh f32 variables: normal with std `initializer_range`, ones for norms, zero router biases.

    Shapes are [out, in] with the layer dim first; see docs/architecture.md for the whole tree.
    Raises nothing of its own. Source: V3 report, section 4.2 (std 0.006);
    DeepSeek-V3:inference/model.py for what there is.

    >>> import jax, dsv3_jax as ds
    >>> tiny = ds.load_config("tiny").model
    >>> shapes = jax.eval_shape(lambda key: ds.init(key, tiny), jax.random.key(0))
    >>> shapes["params"]["embed_tokens"].shape
    (1024, 128)
    """
    # The table of weights is an argument, so that another table is another program.
    rows = tuple(weights(config))
    on_cpu = not isinstance(key, Tracer) and next(iter(key.devices())).platform == "cpu"
    return (_init_on_cpu if on_cpu else _init)(key, config, rows)


@partial(jax.jit, static_argnames=("config", "rows"), inline=True)
def _init(key: PRNGKeyArray, config: ModelConfig, rows: tuple[Weight, ...]) -> Variables:
    """`init_variables` as one program: its 500 operations, called one by one, compile each."""
    keys = jax.random.split(key, 5)
    params, router = _init_ends(keys[:2], config, rows), {}
    x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
    tokens, how = Tokens(jnp.zeros((1, 1), jnp.int32)), Pass(config)

    def add(name, variables):
        params[name] = variables["params"]
        if "router" in variables:
            router[name] = variables["router"]

    for name, dense, layers, layer_key in (
        ("dense_layers", True, config.num_dense_layers, keys[2]),
        ("moe_layers", False, config.num_moe_layers, keys[3]),
    ):
        if layers:
            init = partial(Block(how, dense).init, x=x, tokens=tokens)
            add(name, jax.vmap(lambda k, init=init: init(k))(jax.random.split(layer_key, layers)))
    for depth in range(config.num_nextn_predict_layers):
        mtp_key = jax.random.fold_in(keys[4], depth)
        add(f"mtp_{depth}", MTPModule(how).init(mtp_key, x, x, tokens))
    return {"params": params, "router": router}


# XLA:CPU spends 1 s on optimising each leaf's random numbers, which are drawn once.
_init_on_cpu = jax.jit(
    _init,
    static_argnames=("config", "rows"),
    compiler_options={"xla_backend_optimization_level": 0},
)


def _init_ends(keys: Any, config: ModelConfig, rows: Sequence[Weight]) -> Variables:
    """The parameters that the model has once; embedding and head have a key each."""
    rows = [row for row in rows if row.where == "model"]
    drawn = [row for row in rows if row.init == "normal"]
    made = {}
    for row in rows:
        number = drawn.index(row) if row in drawn else 0
        key = keys[number] if number < 2 else jax.random.fold_in(keys[1], number)
        made[row.name] = initializer(row, config)(key, row.dims_of(config))
    return made


def abstract_variables(config: ModelConfig, layout: Layout = ONE_DEVICE) -> Variables:
    """What `init` returns, as shapes and dtypes with the shardings of a layout; allocates nothing.

    Raises nothing of its own. Source: this project (docs/architecture.md).

    >>> import dsv3_jax as ds
    >>> ds.abstract_variables(ds.ModelConfig())["params"]["lm_head"].shape
    (129280, 7168)
    """
    # The key is made within: outside it would be compiled, for 45 MB of LLVM.
    shapes = jax.eval_shape(lambda: init_variables(jax.random.key(0), config))
    return placed(shapes, layout)


def forward(
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    config: ModelConfig | Pass,
    *,
    segments: Int[Array | np.ndarray, "B T"] | None = None,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
    experts: Int[Array | np.ndarray, "L B T K"] | None = None,
) -> Outputs:
    """Logits of the next token, and of the tokens after it by the MTP modules, for whole rows.

    A Pass in the config's place also says recipe, layout and remat. segments are document numbers
    that attention must not cross; None lets it (V3's way). Tokens that are not counted are in no
    load and no balance loss. experts are what each MoE layer of the main model chooses instead of
    its router (routing replay); MTP modules choose for themselves. Logits are f32, hidden states in
    the model's dtype. Raises ValueError for tokens that are no integers [B, T] or longer than the
    model's positions, and for variables of another model. Source: V3 report, section 2.

    >>> from functools import partial
    >>> import jax, numpy as np, dsv3_jax as ds
    >>> tiny, ids = ds.load_config("tiny").model, np.ones((2, 16), np.int32)
    >>> out = jax.eval_shape(partial(ds.forward, config=tiny), ds.abstract_variables(tiny), ids)
    >>> out.logits.shape, out.mtp_logits[0].shape
    ((2, 16, 1024), (2, 16, 1024))
    """
    how = as_pass(config)
    check_tokens(tokens, how.config)
    if segments is not None and segments.shape != tokens.shape:
        raise ValueError(f"segments {segments.shape} must have the shape of tokens {tokens.shape}")
    with how.layout.compiling():
        params = gathered_ends(variables["params"], how)
        held = {**variables, "params": params}
        rows: Any = {"segments": segments, "counted": counted, "experts": experts}
        states = hidden_states(held, tokens, how, **rows)
        mtp_logits = tuple(head(params, hidden, how) for hidden in states.mtp_hidden)
        logits = head(params, states.hidden, how)
    return Outputs(logits, mtp_logits, states.stats, states.mtp_stats, states.hidden)


def hidden_states(
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    how: Pass,
    *,
    segments: Int[Array | np.ndarray, "B T"] | None = None,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
    experts: Int[Array | np.ndarray, "L B T K"] | None = None,
) -> States:
    """`forward` without the head: what it would make logits of. The ends are gathered already.

    Tokens that are not counted are in no load and no balance loss.
    """
    of_tokens = told = tokens_of(tokens, how, segments, counted)
    if experts is not None:
        told = told._replace(experts=jax.vmap(how.layout.in_order)(jnp.asarray(experts)))
    embedded = embed_tokens(variables["params"], how.layout.in_order(tokens), how)
    x, _, stats = run_layers(variables, embedded, told, how)
    return finish(variables, x, tokens, of_tokens, how, embedded)._replace(stats=stats)


def tokens_of(
    tokens: Int[Array | np.ndarray, "B T"],
    how: Pass,
    segments: Int[Array | np.ndarray, "B T"] | None = None,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Tokens:
    """What the layers know of whole rows, in the layout's order."""
    positions = how.layout.in_order(jnp.arange(tokens.shape[1])[None])

    def placed(of_token: Any) -> Any:
        return None if of_token is None else how.layout.in_order(how.layout.whole_rows(of_token))

    return Tokens(positions, placed(segments), placed(counted))


def finish(
    variables: Variables,
    x: Float[Array, "B T D"],
    tokens: Int[Array | np.ndarray, "B T"],
    of_tokens: Tokens,
    how: Pass,
    embedded: Float[Array, "B T D"] | None = None,
) -> States:
    """What comes after the last layer, whose output x is: the final norm and the MTP modules.

    `tokens` are ids in their natural order; `embedded`, where it is at hand, their embeddings. The
    statistics of the layers are not in it.
    """
    params, length = variables["params"], tokens.shape[1]
    hidden = final_norm(params, x, how)
    mtp_hidden, mtp_stats = [], []
    previous = jax.lax.stop_gradient(hidden) if how.mtp_detached else hidden
    for depth in range(how.config.num_nextn_predict_layers):
        embedding = _embedding_ahead(params, tokens, embedded, depth + 1, how)
        if how.mtp_detached:
            embedding = jax.lax.stop_gradient(embedding)
        counted = jnp.broadcast_to(of_tokens.positions < length - (depth + 1), tokens.shape)
        if of_tokens.counted is not None:
            counted &= of_tokens.counted & _same_document_ahead(of_tokens, depth + 1, how)
        previous, _, depth_stats = run_mtp(
            variables, depth, previous, embedding, of_tokens._replace(counted=counted), how
        )
        mtp_hidden.append(previous)
        mtp_stats.append(depth_stats)
    return States(hidden, tuple(mtp_hidden), None, tuple(mtp_stats))


def _same_document_ahead(of_tokens: Tokens, ahead: int, how: Pass) -> Bool[Array, "B T"] | bool:
    """Whether what an MTP module reads with each token is of the same document."""
    if of_tokens.segments is None:
        return True
    natural = how.layout.in_natural_order(of_tokens.segments)
    return of_tokens.segments == how.layout.in_order(jnp.roll(natural, -ahead, axis=1))


def _embedding_ahead(params, tokens, embedded, ahead: int, how: Pass):
    """Row i has the embedding of token i + ahead, which MTP reads.

    The last rows, which have none, read the row's first tokens: causality keeps them from all
    others, and they are not counted.
    """
    # On one device a second look-up would scatter a second gradient.
    if embedded is not None and how.layout.one_device:
        return jnp.roll(embedded, -ahead, axis=1)
    # Token ids are shifted, which is cheap between devices, and looked up again.
    shifted = how.layout.in_order(how.layout.whole_rows(jnp.roll(tokens, -ahead, axis=1)))
    return embed_tokens(params, shifted, how)
