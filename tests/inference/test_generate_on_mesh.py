"""Generation on a mesh gives the tokens of one device, and leaves each device its part."""

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig, ShardingConfig, UserError
from dsv3_jax.inference import acts
from dsv3_jax.inference.acts import advance
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.slots import Program
from dsv3_jax.model.cache import init_model_cache
from dsv3_jax.model.decode import decode_step, prefill
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.micro_batches import check_micro_batches
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, make_layout, serving_layouts
from tests.cases import in_every_run
from tests.helpers import TOLERANCE, random_tokens, random_variables, relative_error, tiny_model

MODEL = tiny_model(
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    num_attention_heads=4,
    vocab_size=40,
    moe_intermediate_size=16,
)
# Dims fall into whole tiles of 128 on two devices, all but those of kv_b_proj.
WIDE = dataclasses.replace(
    MODEL,
    num_attention_heads=2,
    qk_nope_head_dim=124,
    v_head_dim=128,
    intermediate_size=256,
    moe_intermediate_size=256,
)
VARIABLES = random_variables(MODEL)
PROMPTS = [row[:n].tolist() for row, n in zip(random_tokens(MODEL, 3, 9), (9, 1, 4), strict=True)]


def layout_of(form="allgather", **sizes):
    mesh = make_mesh(ParallelConfig(**sizes))
    return make_layout(mesh, ShardingConfig(context=form), ExpertParallelConfig())


def tokens_of(layout, **options):
    options = {"max_new_tokens": 4, "seed": 3} | options
    return np.stack(list(generate(VARIABLES, PROMPTS, MODEL, layout=layout, **options)), 1)


@pytest.mark.parametrize("temperature", in_every_run([0.0, 1.0], 1.0))
def test_a_mesh_writes_the_tokens_of_one_device(temperature):
    """Three prompts on four devices' batches: copies fill them up, and are not seen."""
    layout = layout_of("ring", node=2, context=2, tensor=2)
    want = tokens_of(ONE_DEVICE, temperature=temperature)
    np.testing.assert_array_equal(tokens_of(layout, temperature=temperature), want)


@pytest.mark.slow
def test_weights_held_as_fp8_write_the_tokens_of_one_device():
    held = to_fp8_weights(VARIABLES, MODEL)
    layout = layout_of(node=2, local=2, tensor=2)
    want, got = (
        np.stack(list(generate(held, PROMPTS, MODEL, max_new_tokens=4, layout=where)), 1)
        for where in (ONE_DEVICE, layout)
    )
    np.testing.assert_array_equal(got, want)


def test_weights_held_as_fp8_are_cut_between_tiles():
    held = jax.eval_shape(partial(to_fp8_weights, config=WIDE), abstract_variables(WIDE))
    layout = layout_of(node=2, local=2, tensor=2)
    layer = held["params"]["moe_layers"]

    def parts(*names):
        leaf, place = layer, shardings(held, layout)["params"]["moe_layers"]
        for name in names:
            leaf, place = leaf[name], place[name]
        return [
            where.shard_shape(array.shape)
            for where, array in zip(jax.tree.leaves(place), jax.tree.leaves(leaf))
        ]

    assert parts("self_attn", "q_b_proj") == [(1, 128, 20), (1, 1, 1)]
    assert parts("self_attn", "o_proj") == [(1, 24, 128), (1, 1, 1)]
    # 252 rows of a device: the second tile would lie on two.
    assert parts("self_attn", "kv_b_proj") == [(1, 504, 12), (1, 4, 1)]
    assert parts("mlp", "shared_experts", "gate_up_proj") == [(1, 2, 128, 24), (1, 2, 1, 1)]
    assert parts("mlp", "experts", "down_proj") == [(1, 2, 24, 256), (1, 2, 1, 2)]


@pytest.mark.slow
def test_prefill_and_decoding_equal_one_device():
    tokens = random_tokens(MODEL, 2, 8)
    new = random_tokens(MODEL, 2, 1, seed=5)
    start = np.full(2, 8)
    layouts = serving_layouts(layout_of("ring", data=2, context=2, tensor=2))

    def run(layouts):
        cache = init_model_cache(MODEL, 2, 16)
        prompt, decoding = (Pass(MODEL, layout=layout) for layout in layouts)
        filled = jax.jit(prefill, static_argnums=3)(VARIABLES, tokens, cache, prompt)
        decode = jax.jit(decode_step, static_argnums=4)
        return filled.hidden, *decode(VARIABLES, new, start, filled.cache, decoding)[:2]

    got, want = run(layouts), run((ONE_DEVICE, ONE_DEVICE))
    assert relative_error(got, want) < TOLERANCE["f32_model"]
    cache = got[2].moe.latent
    assert cache.sharding.shard_shape(cache.shape) == (1, 1, 8, 12), "its rows of its sequences"


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_pages_on_a_mesh_hold_each_device_s_own_sequences(fp8):
    """Of one and of two pages, three on each of two groups; pages are whole over context."""
    layout, long = layout_of(local=2, context=2, tensor=2), random_tokens(MODEL, 1, 70)[0].tolist()
    prompts = [*PROMPTS, long, *PROMPTS[1:]]
    model = dataclasses.replace(MODEL, max_position_embeddings=128)
    options = {"max_new_tokens": 4, "temperature": 0.0, "fp8_cache": fp8}
    want, got = (
        np.stack(list(generate(VARIABLES, prompts, model, layout=where, paged=paged, **options)), 1)
        for where, paged in ((ONE_DEVICE, None), (layout, True))
    )
    np.testing.assert_array_equal(got, want)


def test_decoding_moves_no_cache_between_devices():
    """Rows over context: what crosses is a largest logit, a sum and a value a head."""
    layout = serving_layouts(layout_of(data=2, context=2, tensor=2))[1]
    length, batch = 512, 2
    cache = jax.eval_shape(partial(init_model_cache, MODEL, batch, length))
    rows = layout.sharding(None, "batch", "cache")
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), cache)
    tokens, start = np.zeros((batch, 1), np.int32), np.full(batch, 300, np.int32)
    step, how = jax.jit(decode_step, static_argnums=4, donate_argnums=3), Pass(MODEL, layout=layout)
    lowered = step.lower(abstract_variables(MODEL, layout), tokens, start, cache, how)
    program = lowered.compile().as_text()
    moved = re.findall(
        r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", program
    )
    assert moved
    largest = max(np.prod([int(n) for n in shape.split(",") if n]) for shape in moved)
    widest = MODEL.vocab_size * MODEL.hidden_size  # nothing of a sequence's length
    assert largest < min(widest, length * MODEL.qk_rope_head_dim // 2), moved


def test_weights_are_read_where_they_are_used():
    layout = layout_of(local=4, tensor=2)
    placed = abstract_variables(MODEL, serving_layouts(layout)[0])["params"]
    experts = placed["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert experts.sharding.shard_shape(experts.shape) == (1, 2, 24, 16)
    assert placed["lm_head"].sharding.shard_shape((40, 24)) == (20, 24)


@pytest.mark.slow
def test_two_micro_batches_write_the_tokens_of_one():
    """Each half of a device's sequences has its own exchange, and every text stays what it was."""
    layout = layout_of(node=2, local=2)
    prompts = [row[: 1 + n].tolist() for n, row in enumerate(random_tokens(MODEL, 8, 9))]
    requests = [Request(tuple(prompt), 5, seed=n) for n, prompt in enumerate(prompts)]
    texts, exchanges = [], []
    for halves in (1, 2):
        options = EngineOptions(
            slots=8, max_length=16, chunks=(12,), chunk_rows=(4,), page=4, micro_batches=halves
        )
        engine = Engine(VARIABLES, MODEL, options, layout)
        table = np.full((8, engine._width), -1, np.int32)
        program = engine._programs[False]
        lowered = advance.lower(engine.variables, engine._slots, table, program).as_text()
        exchanges.append(lowered.count("all_to_all"))
        texts.append([done.ids for done in engine.run(requests)])
    assert texts[0] == texts[1]
    assert exchanges[1] == 2 * exchanges[0] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": 4}, "4 slots a multiple of 2 x 4 groups"),
        ({"paged": False}, "need a cache in pages"),
        ({"micro_batches": 3}, "micro_batches=3 must be 1, or 2"),
    ],
)
def test_micro_batches_that_cannot_overlap_are_refused(change, message):
    options = {"slots": 8, "max_length": 16, "chunk_rows": (4,), "micro_batches": 2} | change
    with pytest.raises(UserError, match=message):
        Engine(VARIABLES, MODEL, EngineOptions(**options), layout_of(node=2, local=2))
    with pytest.raises(UserError, match="experts on several devices"):
        Engine(VARIABLES, MODEL, EngineOptions(slots=2, max_length=16, micro_batches=2))
    expert = ExpertParallelConfig(transport="pallas")
    by_kernels = make_layout(make_mesh(ParallelConfig(local=2)), ShardingConfig(), expert)
    with pytest.raises(UserError, match=r"'pallas' moves rows by kernels .*transport padded"):
        check_micro_batches(2, 8, by_kernels)


def test_xla_is_told_of_two_micro_batches_and_else_nothing(monkeypatch):
    told = {"xla_gpu_enable_latency_hiding_scheduler": True}
    monkeypatch.setattr(acts, "overlap_options", lambda platform: told)
    monkeypatch.setattr(acts, "_advance_told", dict)
    one, two = (Program(Pass(MODEL), Pass(MODEL, micro_batches=n), sampled=False) for n in (1, 2))
    assert acts.advance_of(two) == told
    assert acts.advance_of(one) is advance


def test_a_step_of_a_small_model_on_a_cpu_keeps_to_one_core(monkeypatch):
    """Else XLA shares products of a microsecond out over all cores, and waits for these."""
    options = EngineOptions(slots=4, max_length=16, chunks=(8,), chunk_rows=(4,))
    program = Engine(VARIABLES, MODEL, options)._programs[False]
    alone = Engine(VARIABLES, MODEL, options, layout_of(node=2, local=2))._programs[False]
    assert acts.advance_of(alone) is advance
    monkeypatch.setattr(acts, "_advance_told", dict)
    assert acts.advance_of(program) == {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
