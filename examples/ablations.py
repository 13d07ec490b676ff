"""The paper's choices, each taken back by itself, at a size that a CPU trains: one table, one plot.

    python examples/ablations.py --out runs/ablations

Trains a small V3 with MTP, the router's bias, MLA and BF16 products, and four variants of it:
without MTP; balanced by an auxiliary loss in place of the bias; in FP8; with grouped-query
attention of the same cache bytes. Three seeds each, the same rows for all variants of a seed.
Validation bits per byte are of the main head. The papers' own ablations are of 1B to 230B
parameters and up to 1.3T tokens: what differs by less than the seeds do here says nothing of those.

Grouped-query attention is MLA whose up-projection is held at a selection: the latent is then the
groups' keys and values side by side, which each head picks its own from. The rotated key is shared
in both. Lines of finished runs are kept in ablations.jsonl, and not made again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax.analysis.output import new_figure, save_figure, table
from dsv3_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    QuantConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.data.batches import val_batches
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.feed import batches
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import eval_step, jit_train_step

GROUPS = 2  # of heads that share keys and values, where attention is grouped-query

BASELINE = Config(
    model=ModelConfig(
        vocab_size=261,
        bos_token_id=256,
        eos_token_id=257,
        hidden_size=64,
        num_hidden_layers=2,
        max_position_embeddings=512,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=2 * GROUPS * 16,  # a key and a value of 16 for each group
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        rope_scaling=None,
        intermediate_size=128,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
        initializer_range=0.06,
        dtype="bfloat16",
    ),
    data=DataConfig(tokenizer="byte"),
    train=TrainConfig(steps=200, batch_size=16, seq_len=96),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    schedule=ScheduleConfig(warmup_steps=20, batch_start_ratio=1.0, bias_update_speed=0.01),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config, and whether its attention is grouped-query: MLA held at `selection`."""

    config: Config
    grouped: bool = False


def variants(baseline: Config) -> dict[str, Variant]:
    """The baseline, and what differs from it in one choice."""
    no_mtp = dataclasses.replace(baseline.model, num_nextn_predict_layers=0)
    by_loss = dataclasses.replace(
        baseline.schedule, bias_update_speed=0.0, balance_loss_weight=0.01
    )
    return {
        "V3": Variant(baseline),
        "without MTP": Variant(dataclasses.replace(baseline, model=no_mtp)),
        "auxiliary loss 0.01": Variant(dataclasses.replace(baseline, schedule=by_loss)),
        "FP8": Variant(dataclasses.replace(baseline, quant=QuantConfig("fp8_paper"))),
        "GQA, same cache": Variant(baseline, grouped=True),
    }


def selection(config: ModelConfig) -> np.ndarray:
    """The kv_b_proj [N, H + U, C] that makes MLA grouped-query attention.

    The latent holds the keys of all groups, then their values; head n is of group n // (N / G).
    """
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    assert config.kv_lora_rank == GROUPS * (nope + value)
    chosen = np.zeros((heads, nope + value, config.kv_lora_rank), np.float32)
    for head in range(heads):
        group = head * GROUPS // heads
        chosen[head, :nope, group * nope : (group + 1) * nope] = np.eye(nope)
        start = GROUPS * nope + group * value
        chosen[head, nope:, start : start + value] = np.eye(value)
    return chosen


def on_up_projections(params: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """The tree with every layer's kv_b_proj changed."""

    def changed(path, leaf):
        return change(leaf) if path[-1].key == "kv_b_proj" else leaf

    return jax.tree_util.tree_map_with_path(changed, params)


def with_selection(params: Any, config: ModelConfig) -> Any:
    """The parameters with every layer's kv_b_proj at the selection."""
    chosen = jnp.asarray(selection(config))
    return on_up_projections(
        params, lambda leaf: jnp.broadcast_to(chosen, leaf.shape).astype(leaf.dtype)
    )


def holding_up_projections(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The run's own optimizer, for which kv_b_proj has no gradient and which leaves it as it is."""
    inner = make_optimizer(config)

    def update(grads, state, params=None, *, learning_rate, **extra):
        del extra
        grads = on_up_projections(grads, jnp.zeros_like)
        direction, state = inner.update(grads, state, params)
        updates = jax.tree.map(lambda d: -learning_rate * d, direction)
        return on_up_projections(updates, jnp.zeros_like), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


class Trainer:
    """One variant's compiled step and evaluation, which serve every seed."""

    def __init__(self, variant: Variant):
        self.config = config = variant.config.validate()
        extensions = NONE
        if variant.grouped:
            extensions = Extensions(optimizer=holding_up_projections(config.optimizer))
        self._mesh = make_mesh(config.mesh)
        layout = make_layout(self._mesh, config.sharding, config.expert_parallel)

        def start(key):
            state = init_state(key, config, extensions)
            params = with_selection(state.params, config.model) if variant.grouped else state.params
            return state._replace(params=params)

        self._start = jax.jit(start)
        state = self._start(jax.random.key(0))
        self._step = jit_train_step(config, layout, state, extensions=extensions)
        self._nats = jax.jit(
            lambda state, rows: eval_step(state.params, state.router, rows, config)
        )

    def run(self, seed: int) -> dict[str, Any]:
        """Bits per byte of held-out text, and the busiest expert's load at the end, of one seed."""
        train, schedule, began = self.config.train, Schedule(self.config), time.perf_counter()
        corpus = open_corpus(self.config.data, seed)
        config = dataclasses.replace(self.config, seed=seed)
        state, late = self._start(jax.random.key(seed)), []
        for step, rows in enumerate(batches(config, corpus, schedule, self._mesh, start=0)):
            state, metrics = self._step(state, rows, schedule.settings(step))
            if step >= train.steps - 20:
                load = np.concatenate([np.atleast_2d(x) for x in metrics.terms.load.values()])
                late.append(float((load.max(1) / load.mean(1)).max()))
        held_out = val_batches(corpus.val, train.seq_len + 1, 32, 8, corpus.tokenizer)
        assert int(state.skipped) == 0, "a loss was not finite"
        nats = np.mean([float(self._nats(state, batch.rows)) for batch in held_out])
        return {
            "seed": seed,
            "bits_per_byte": float(nats / np.log(2)),  # a token is a byte
            "busiest": float(np.mean(late)),
            "seconds": round(time.perf_counter() - began, 1),
        }


def summary(lines: list[dict[str, Any]]) -> list[list[Any]]:
    """A row a variant: bits per byte and its spread, what it differs from V3 by, seed by seed."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_variant.setdefault(line["variant"], {})[line["seed"]] = line
    rows = []
    for name, runs in by_variant.items():
        bits = np.array([run["bits_per_byte"] for run in runs.values()])
        shared = sorted(runs.keys() & by_variant.get("V3", {}).keys())
        gaps = [runs[s]["bits_per_byte"] - by_variant["V3"][s]["bits_per_byte"] for s in shared]
        spread = f"{bits.std(ddof=1):.4f}" if len(bits) > 1 else "-"
        gap = "" if name == "V3" else f"{np.mean(gaps):+.4f}"
        each = "" if name == "V3" else ", ".join(f"{gap:+.4f}" for gap in gaps)
        busiest = f"{np.mean([run['busiest'] for run in runs.values()]):.2f}"
        rows.append([name, f"{bits.mean():.4f}", spread, gap, each, busiest])
    return rows


HEADERS = ["variant", "bits per byte", "deviation", "less V3's", "seed by seed", "busiest expert"]


def draw(lines: list[dict[str, Any]], path: Path) -> Path:
    """Every run as a dot, and each variant's mean with the standard deviation of its seeds."""
    names = list(dict.fromkeys(line["variant"] for line in lines))
    figure, axes = new_figure(columns=2, width=9.5, height=3.2)
    for ax, key, label in zip(
        axes, ("bits_per_byte", "busiest"), ("validation bits per byte", "busiest expert / mean")
    ):
        for y, name in enumerate(names):
            values = np.array([line[key] for line in lines if line["variant"] == name])
            ax.plot(values, np.full(len(values), y), "o", color="0.7", markersize=5)
            spread = values.std(ddof=1) if len(values) > 1 else 0
            ax.errorbar(values.mean(), y, xerr=spread, fmt="D", capsize=4, markersize=5)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set(xlabel=f"{label}: mean and deviation of seeds")
    axes[1].set_yticklabels([])
    return save_figure(figure, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of finished runs."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


def main() -> None:
    """Trains what is missing, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=BASELINE.train.steps)
    parser.add_argument("--variants", nargs="+", choices=variants(BASELINE), help="instead of all")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train = dataclasses.replace(BASELINE.train, steps=args.steps)
    path = args.out / "ablations.jsonl"
    lines = read(path)
    done = {(line["variant"], line["seed"], line["steps"]) for line in lines}
    for name, variant in variants(dataclasses.replace(BASELINE, train=train)).items():
        if args.variants and name not in args.variants:
            continue
        missing = [seed for seed in args.seeds if (name, seed, args.steps) not in done]
        trainer = Trainer(variant) if missing else None
        for seed in missing:
            assert trainer is not None
            line = {"variant": name, "steps": args.steps} | trainer.run(seed)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
    order = list(variants(BASELINE))  # several calls, a variant each, may share the file
    lines = sorted(read(path), key=lambda line: (order.index(line["variant"]), line["seed"]))
    lines = [line for line in lines if line["steps"] == args.steps and line["seed"] in args.seeds]
    print(table(HEADERS, summary(lines)))
    print(draw(lines, args.out / "ablations.png"))


if __name__ == "__main__":
    main()
