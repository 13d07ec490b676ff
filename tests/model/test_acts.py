"""The acts of a pass as pipeline stages and drafts call them, against `forward`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.config import ExpertParallelConfig, ShardingConfig
from dsv3_jax.model.cache import init_cache, init_paged_cache, of_layer
from dsv3_jax.model.decode import decode_mtp, decode_schedule
from dsv3_jax.model.ends import embed_tokens, final_norm, head
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.mtp import run_mtp
from dsv3_jax.model.stack import run_layers
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import Layout, make_layout
from tests.cases import in_every_run
from tests.helpers import TOLERANCE, random_tokens, random_variables, relative_error, tiny_model

MODEL = tiny_model(num_hidden_layers=4)
VARIABLES, IDS = random_variables(MODEL), random_tokens(MODEL, 4, 8)
TOKENS = Tokens(jnp.arange(8)[None])


def share(first: int, last: int):
    """The variables of layers first to last - 1 alone, as a stage holds them."""
    dense = MODEL.num_dense_layers
    cuts = {
        "dense_layers": (min(first, dense), min(last, dense)),
        "moe_layers": (max(first - dense, 0), max(last - dense, 0)),
    }
    return {
        kind: {
            name: jax.tree.map(lambda leaf, cut=cut: leaf[slice(*cut)], tree[name])
            for name, cut in cuts.items()
            if name in tree and cut[0] < cut[1]
        }
        for kind, tree in VARIABLES.items()
    }


@pytest.fixture(scope="module")
def whole():
    return jax.jit(lambda variables, ids: forward(variables, ids, MODEL))(VARIABLES, IDS)


def test_stages_one_after_the_other_are_the_model(whole):
    """Two layers in each, of both kinds in the first; no stage holds the ends."""
    how = Pass(MODEL)

    @jax.jit
    def staged(params, ids, first, second):
        x = embed_tokens(params, ids, how)
        for stage in (first, second):
            x, _, stats = run_layers(stage, x, TOKENS, how)
        return head(params, final_norm(params, x, how), how), stats

    logits, stats = staged(VARIABLES["params"], IDS, share(0, 2), share(2, 4))
    assert relative_error(logits, whole.logits) < TOLERANCE["f32_model"]
    np.testing.assert_array_equal(stats.load_E, whole.stats.load_E[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{}, {"local": 2, "tensor": 2}],
    ids=["alone", "on a mesh"],
)
def test_a_stage_runs_inside_a_shard_map_over_pipe(sizes, whole):
    """Each rank of `pipe` runs its layer, with its experts exchanged inside, and passes on.

    Values, and the gradient of both stages' weights, are those of the whole stack.
    """
    sizes = {"pipe": 2} | sizes
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    exchange = ExpertParallelConfig(transport="padded", capacity_factor=1.0)
    model = tiny_model(num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=4)
    variables = random_variables(model)
    stages = {
        kind: {"moe_layers": jax.tree.map(lambda x: x[:, None], t["moe_layers"])}
        for kind, t in variables.items()
    }
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, model.hidden_size)), jnp.float32)

    def piped(layout: Layout):
        how = Pass(model, layout=layout)

        def of_rank(stage, x):
            stage = jax.tree.map(lambda leaf: leaf[0], stage)
            rank = jax.lax.axis_index("pipe")
            for turn in range(2):
                y, _, _ = run_layers(stage, x, TOKENS, how)
                x = jax.lax.ppermute(jnp.where(rank == turn, y, x), "pipe", [(0, 1), (1, 0)])
            return x[None]  # rank 0 has both stages' result

        ranks = PartitionSpec("pipe")
        run = jax.shard_map(
            of_rank,
            mesh=mesh,
            in_specs=(ranks, PartitionSpec()),
            out_specs=ranks,
            axis_names={"pipe"},
            check_vma=False,
        )
        return lambda stages, x: jnp.sin(run(stages, x)[0]).sum()

    def plain(stages, x):
        for number in range(2):
            stage = jax.tree.map(lambda leaf, n=number: leaf[n], stages)
            x, _, _ = run_layers(stage, x, TOKENS, Pass(model))
        return jnp.sin(x).sum()

    layout = make_layout(mesh, ShardingConfig(state="replicated"), exchange)
    want, got = (
        jax.jit(jax.value_and_grad(lambda params, x, f=f: f({**stages, "params": params}, x)))(
            stages["params"], x
        )
        for f in (plain, piped(layout))
    )
    assert relative_error(got, want) < TOLERANCE["f32_gradient"]


@pytest.mark.parametrize("paged", in_every_run([False, True], True))
def test_an_mtp_module_drafts_from_a_cache_of_its_own(paged, whole):
    """A prompt of five tokens fills it, then one token at a time: `forward`'s logits."""
    how, params = Pass(MODEL), VARIABLES["params"]
    embedded = embed_tokens(params, IDS, how)
    ahead = jnp.roll(embedded, -1, axis=1)
    if paged:
        table = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
        cache = of_layer(init_paged_cache(MODEL, table, 8, page=4, layers=1), jnp.int32(0))
    else:
        cache = jax.tree.map(lambda rows: rows[0], init_cache(MODEL, 4, 8, layers=1))

    @jax.jit
    def fill(hidden, ahead, cache):
        tokens = Tokens(jnp.broadcast_to(jnp.arange(5), (4, 5)))
        return run_mtp(VARIABLES, 0, hidden, ahead, tokens, Pass(MODEL, prefill=True), cache)[:2]

    @jax.jit
    def step(hidden, ahead, start, cache):
        positions = jnp.broadcast_to(start, (4, 1))
        tokens = Tokens(positions, decode_schedule=decode_schedule(positions, how))
        return run_mtp(VARIABLES, 0, hidden, ahead, tokens, how, cache)[:2]

    drafted, cache = fill(whole.hidden[:, :5], ahead[:, :5], cache)
    found = [drafted]
    for row in (5, 6):
        at = slice(row, row + 1)
        drafted, cache = step(whole.hidden[:, at], ahead[:, at], jnp.int32(row), cache)
        found.append(drafted)
    logits = head(params, jnp.concatenate(found, axis=1), how)
    assert relative_error(logits, whole.mtp_logits[0][:, :7]) < TOLERANCE["f32_model"]


@pytest.mark.parametrize("paged", in_every_run([False, True], False))
def test_a_wanted_row_of_an_mtp_module_is_that_of_all_rows(paged, whole):
    """Its cache has all rows either way, and what no draft reads is not computed."""
    if paged:
        table = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
        cache = of_layer(init_paged_cache(MODEL, table, 8, page=4, layers=1), jnp.int32(0))
    else:
        cache = jax.tree.map(lambda rows: rows[0], init_cache(MODEL, 4, 8, layers=1))
    start, wanted = jnp.array([0, 1, 3, 4]), jnp.array([3, 0, 2, 1])

    def drafted(wanted):
        run = jax.jit(lambda *inputs: decode_mtp(VARIABLES, 0, *inputs, Pass(MODEL), wanted))
        step = run.lower(whole.hidden[:, :4], IDS[:, 1:5], start, cache).compile()
        return *step(whole.hidden[:, :4], IDS[:, 1:5], start, cache), step.cost_analysis()["flops"]

    (rows, cache_of_rows, most), (row, cache_of_row, flops) = drafted(None), drafted(wanted)
    assert relative_error(row[:, 0], rows[jnp.arange(4), wanted]) < TOLERANCE["f32_op"]
    jax.tree.map(np.testing.assert_array_equal, cache_of_row, cache_of_rows)
    assert flops < 2 * most / 3
