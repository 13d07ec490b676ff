"""Parts of bench_multi_gpu: a MoE layer with its experts spread over all GPUs, and training."""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_classes
from benchmarks.multi_gpu_timing import (
    Options,
    compile_all,
    failure,
    kernel_by_kernel,
    seconds_of,
)
from dsv3_jax import cli
from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    ShardingConfig,
    TrainConfig,
)
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.router import route
from dsv3_jax.model.step_weights import made_for_step, with_made
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.quantization.recipe import RECIPES
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import abstract_state, init_state
from dsv3_jax.training.step import jit_train_step

GIB = 2.0**30
SLICE = Path(__file__).parent.parent / "configs" / "h200_slice.py"


def moe_layer(options: Options) -> None:
    """Router, dispatch, experts in FP8, combine and the shared expert, forward and with backward.

    FP8 numbers of weights, in both orientations, are made beforehand, as a step of several
    micro-batches makes them once for all its products. Tokens and router are drawn so that experts
    are chosen evenly, as V3's bias makes them; how many rows each GPU has is told.
    """
    quick, devices = bool(options.virtual), len(jax.devices())
    model = ModelConfig(dtype="bfloat16")
    if quick:
        model = ModelConfig(hidden_size=256, moe_intermediate_size=128, n_routed_experts=32)
    sizes = options.tokens or ([16] if quick else [64, 512, 4096, 8192])
    ways = options.ways or ["pallas", "padded"]
    cases = [(way, tokens) for way in ways for tokens in sizes]
    build = partial(_layer_programs, model=model, devices=devices, beside=options.beside)
    built = compile_all({c: partial(build, *c) for c in cases})
    width, choices = model.moe_intermediate_size, model.num_experts_per_tok + model.n_shared_experts
    print(
        f"{'MoE layer, FP8, experts over all':38} tokens a GPU  forward (TFLOP/s)  fwd+bwd, "
        "and each over its FP8 products"
    )
    for (way, tokens), programs in built.items():
        name = f"{way:38} {tokens:12}"
        if isinstance(programs, Exception):
            print(f"{name} {failure(programs)}", flush=True)
            continue
        flops = 6 * tokens * choices * model.hidden_size * width  # a GPU
        said, spent, operands = "", [], programs[1]()
        rows = rows_of_each(operands, model, devices)
        for (program, apart), times in zip(programs[0], (1, 3)):
            checked = _checked(program, operands)
            seconds = seconds_of(program, *operands, quick=quick)
            said += f"  {1e3 * seconds:8.3f} ms ({times * flops / seconds / 1e12:6.1f}"
            found = kernel_classes.kernels(partial(apart, *operands), apart.as_text(), calls=4)
            classes = kernel_classes.classed(found)
            products = sum(r.ms for k, r in classes.items() if "by our kernels" in k) / devices
            said += f", {1e3 * seconds / products:.2f}x)" if products else ")"
            said += checked
            spent.append(", ".join(f"{k} {r.ms / devices:.2f}" for k, r in classes.items()))
        print(
            f"{name}{said}  {rows} rows a GPU",
            *("   ms of a GPU: " + each for each in spent),
            sep="\n",
            flush=True,
        )


def _checked(program: Any, operands: Any) -> str:
    """The norm of the layer's output, to compare ways by; and whether a second run has its bits."""
    y, again = (jax.tree.leaves(program(*operands))[0] for _ in range(2))
    norm = float(jnp.linalg.norm(y.astype(jnp.float32)))
    return f" |y| {norm:.8g}" + ("" if bool((y == again).all()) else " NOT THE SAME BITS TWICE")


def _layer_programs(
    transport: str, tokens: int, *, model: ModelConfig, devices: int, beside: bool = False
):
    """Forward, and forward + backward, compiled to time and to profile, and what makes operands."""
    expert: Any = ExpertParallelConfig(
        transport=transport,  # pyright: ignore[reportArgumentType]
        dispatch_format="fp8",
        combine_format="bf16",
        shared_beside=beside,
    )
    layout = make_layout(make_mesh(ParallelConfig(local=devices)), ShardingConfig(), expert)
    module = MoE(Pass(model, RECIPES["fp8_paper"], layout))
    x = jax.ShapeDtypeStruct((devices, tokens, model.hidden_size), jnp.bfloat16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)

    def placed(path, leaf):
        of_experts = any(getattr(key, "key", None) == "experts" for key in path)
        sharding = layout.sharding("expert") if of_experts else layout.sharding()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree_util.tree_map_with_path(placed, shapes)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding("batch"))

    # Each device makes the numbers of its experts, and all of them those of the shared one.
    specs = {"experts": layout.spec("expert"), "shared_experts": layout.spec()}
    weights = {name: shapes["params"][name] for name in specs}
    make = jax.jit(layout.shard_map(_made, (specs,), specs))
    made = jax.tree_util.tree_map_with_path(placed, make.eval_shape(weights))

    def forward(variables, made, x):
        params = variables["params"]
        params = params | {name: with_made(params[name], made[name]) for name in made}
        return module.apply({**variables, "params": params}, x)[0]

    def and_back(variables, made, x):
        y, pull_back = jax.vjp(
            lambda params, x: forward({**variables, "params": params}, made, x),
            *(variables["params"], x),
        )
        return y, *pull_back(y)

    def operands():
        def draw(key):
            leaves, tree = jax.tree.flatten((shapes, x))
            keys = jax.random.split(key, len(leaves))
            drawn = [0.02 * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves)]
            variables, rows = tree.unflatten(drawn)
            # As large as a norm leaves them; and no bias, which would choose experts by itself.
            no_bias = jax.tree.map(jnp.zeros_like, variables["router"])
            return variables | {"router": no_bias}, 50 * rows

        places = jax.tree.map(lambda a: a.sharding, (shapes, x))
        variables, tokens = jax.jit(draw, out_shardings=places)(jax.random.key(1))
        return variables, make({name: variables["params"][name] for name in specs}), tokens

    lowered = [jax.jit(f).lower(shapes, made, x) for f in (forward, and_back)]
    return [(one.compile(), one.compile(kernel_by_kernel())) for one in lowered], operands


def _made(weights: Any) -> Any:
    """What a step makes of a MoE layer's weights for its products."""
    layer = {"mtp_0": {"block": {"mlp": weights}}}  # without a dim of layers
    made = made_for_step(layer, RECIPES["fp8_paper"], jnp.bfloat16)
    return made["mtp_0"]["block"]["mlp"]


def rows_of_each(operands: Any, model: ModelConfig, devices: int) -> str:
    """The rows that each GPU's experts have, "least-most", without those that fill tiles."""
    variables, _, x = operands
    gate, (bias,) = variables["params"]["gate"], jax.tree.leaves(variables["router"])

    @jax.jit
    def count():
        chosen = route(x.reshape(-1, x.shape[-1]), gate, bias, model).experts_TK
        place = chosen // (model.n_routed_experts // devices)
        return jnp.bincount(place.reshape(-1), length=devices)

    rows = np.asarray(count())
    return f"{rows.min()}-{rows.max()}"


class Run(NamedTuple):
    """A way of training the slice on n GPUs."""

    name: str
    mesh: dict[str, int]
    words: tuple[str, ...] = ()
    rows: int = 1  # a GPU


def _runs(devices: int) -> list[Run]:
    if devices == 1:
        return [Run("one GPU", {})]
    spread = ("--expert-parallel.combine-format", "bf16", "--expert-parallel.transport")
    fp8 = ("--expert-parallel.dispatch-format", "fp8")
    return [
        Run("data, ZeRO-1", {"data": devices}),
        Run("data, FSDP", {"data": devices}, ("--sharding.state", "fsdp")),
        Run("local, pallas", {"local": devices}, (*spread, "pallas")),
        Run("local, pallas, FP8 out", {"local": devices}, (*spread, "pallas", *fp8)),
        Run("local, padded", {"local": devices}, (*spread, "padded")),
        Run("pallas, 2 rows", {"local": devices}, (*spread, "pallas"), 2),
        Run("padded, 2 rows", {"local": devices}, (*spread, "padded"), 2),
        Run(
            "padded, 2 rows, overlap",
            {"local": devices},
            (*spread, "padded", "--expert-parallel.overlap"),
            2,
        ),
    ]


def training(options: Options) -> None:
    """Tokens/s of configs/h200_slice.py, and what is left of one GPU's each."""
    counts = options.devices or [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    cases = {(n, run.name): run for n in counts for run in _runs(n)}
    if options.ways:
        cases = {c: run for c, run in cases.items() if c[0] == 1 or c[1] in options.ways}
    quick = bool(options.virtual)
    built = compile_all({c: partial(_step, c[0], run, quick) for c, run in cases.items()})
    alone = None
    print(f"{'training':30} GPUs    ms/step  tokens/s  a GPU  of one GPU's  peak GiB  loss")
    for (count, name), programs in built.items():
        told = f"{name:30} {count:4}"
        if isinstance(programs, Exception):
            print(f"{told} {failure(programs)}", flush=True)
            continue
        try:
            seconds, tokens, loss = _train(programs)
        except Exception as error:
            print(f"{told} {failure(error)}", flush=True)
            continue
        each = tokens / seconds / count
        alone = each if count == 1 else alone
        share = f"{100 * each / alone:10.1f} %" if alone else "?"
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", math.nan) / GIB
        print(
            f"{told} {1e3 * seconds:10.1f} {tokens / seconds:9,.0f} {each:6,.0f} {share} "
            f"{peak:8.1f}  {loss:.4f}",
            flush=True,
        )


def _step(count: int, run: Run, quick: bool):
    words = ["--train.batch-size", str(run.rows * count)]
    for axis in ("data", "local"):
        words += [f"--mesh.{axis}", str(run.mesh.get(axis, 1))]
    config = cli.parse_config([*words, *run.words], default_config=SLICE, description="")
    if quick:
        config = _small(config)
    mesh = make_mesh(config.mesh)
    layout = make_layout(mesh, config.sharding, config.expert_parallel)
    state, schedule = abstract_state(config, layout), Schedule(config)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, config.train.seq_len + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, batch_dim=1))
    settings = schedule.settings(0)
    step = jit_train_step(config, layout, state).lower(state, rows, settings).compile()
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    init = jax.jit(partial(init_state, config=config), out_shardings=places)
    init = init.lower(jax.random.key(0)).compile()
    return config, step, init, rows, schedule


def _small(config: Config) -> Config:
    model = dataclasses.replace(
        config.model, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_attention_heads=2, vocab_size=300, q_lora_rank=32, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    train: TrainConfig = dataclasses.replace(config.train, seq_len=32)
    return dataclasses.replace(config, model=model, train=train)


def _train(programs) -> tuple[float, int, float]:
    """Seconds of a step, tokens of it, and the loss after six steps on four batches."""
    config, step, init, rows, schedule = programs
    rng = np.random.default_rng(0)
    batches = [
        jax.device_put(
            rng.integers(0, config.model.vocab_size, rows.shape, np.int32), rows.sharding
        )
        for _ in range(4)
    ]
    state, metrics, times = init(jax.random.key(0)), None, []
    for group in range(3):  # the first warms up
        start = time.perf_counter()
        for i in range(2):
            at = 2 * group + i
            state, metrics = step(state, batches[at % 4], schedule.settings(at))
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - start) / 2)
    assert metrics is not None
    return min(times[1:]), config.train.batch_size * config.train.seq_len, float(metrics.loss)
