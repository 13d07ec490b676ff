"""How much loss FP8 training costs: the same runs under several recipes, and their relative gap.

    python examples/fp8_loss_gap.py --config configs/tiny.py --steps 400 --out runs/fp8_loss_gap

Trains every preset from the same seeds on the same data, smooths the losses (EMA 0.9, as in the V3
report, appendix B.1, which found less than 0.25 %), and prints the gap to BF16 over the last
quarter of the steps. Writes losses as JSON, one file a run, and loss_gap.png; a run whose file is
there is not repeated, so that an interrupted call goes on where it stopped.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config, QuantConfig, load_config
from dsv3_jax.data.batches import Rows
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.quantization.recipe import RECIPES
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import init_state, train_step

EMA = 0.9
BASELINE = "bf16"


def train_losses(config: Config, seeds: list[int], out: Path) -> dict[int, list[float]]:
    """Next-token cross-entropy (nats a token) of every step, per seed; one compilation for all."""
    schedule = Schedule(config)
    init = jax.jit(partial(init_state, config=config))
    step_fn = jax.jit(partial(train_step, config=config), donate_argnums=0)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, config.train.seq_len + 1)
    losses = {}
    for seed in seeds:
        path = out / f"{config.quant.preset}-seed{seed}.json"
        identity = json.loads(
            json.dumps(dataclasses.asdict(dataclasses.replace(config, seed=seed)))
        )
        if path.is_file() and (saved := json.loads(path.read_text()))["config"] == identity:
            losses[seed] = saved["ce"]
            continue
        rows = Rows(open_corpus(config.data, seed).train, config.train.seq_len + 1, seed)
        state = init(jax.random.key(seed))
        ce, start = [], time.perf_counter()
        for step in range(config.train.steps):
            batch = np.zeros(shape, np.int32)
            read = rows.rows(schedule.first_row(step), schedule.rows(step))
            batch.reshape(-1, shape[-1])[: len(read)] = read
            state, metrics = step_fn(state, jnp.asarray(batch), schedule.settings(step))
            ce.append(float(metrics.terms.ce))
            if step == 0 or (step + 1) % 50 == 0:
                seconds = time.perf_counter() - start
                print(
                    f"{path.stem} step {step + 1}: {ce[-1]:.4f} after {seconds:.0f} s", flush=True
                )
        losses[seed] = ce
        path.write_text(json.dumps({"config": identity, "ce": ce}))
    return losses


def smooth(losses: list[float]) -> np.ndarray:
    """The exponential moving average with coefficient 0.9, starting at the first loss."""
    smoothed = np.array(losses, np.float64)
    for i in range(1, len(smoothed)):
        smoothed[i] = EMA * smoothed[i - 1] + (1 - EMA) * smoothed[i]
    return smoothed


def relative_gap(losses: list[float], baseline: list[float]) -> np.ndarray:
    """(smoothed - smoothed baseline) / smoothed baseline at every step."""
    return smooth(losses) / smooth(baseline) - 1


def plot(losses: dict[str, dict[int, list[float]]], out: Path) -> None:
    """Smoothed losses above, their gap to BF16 in percent below, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=[3, 2], layout="constrained"
    )
    for color, (preset, runs) in zip(
        plt.rcParams["axes.prop_cycle"].by_key()["color"], losses.items()
    ):
        for seed, ce in runs.items():
            label = preset if seed == min(runs) else None
            upper.plot(smooth(ce), color=color, label=label, linewidth=1)
            if preset != BASELINE:
                gap = 100 * relative_gap(ce, losses[BASELINE][seed])
                lower.plot(gap, color=color, label=label, linewidth=1)
    upper.set(ylabel="cross-entropy, EMA 0.9 [nats/token]")
    upper.legend()
    lower.axhspan(-0.25, 0.25, alpha=0.15, color="gray", label="0.25 %, the paper's bound")
    lower.axhline(0, color="gray", linewidth=0.8)
    lower.set(xlabel="step", ylabel="gap to bf16 [%]", ylim=(-1, 1))
    lower.legend()
    figure.savefig(out / "loss_gap.png", dpi=120)
    print(f"wrote {out / 'loss_gap.png'}")


def main() -> None:
    """Trains what is missing, prints the gaps and draws the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--presets", nargs="+", default=[BASELINE, "fp8_paper"], choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, help="default: the config's")
    parser.add_argument("--seq-len", type=int, help="default: the config's")
    # In f32 the baseline would be more exact than the paper's.
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_loss_gap"))
    args = parser.parse_args()
    if BASELINE not in args.presets:
        parser.error(f"--presets must include {BASELINE}, which the others are compared with")

    config = load_config(args.config)
    batch_size, seq_len = args.batch_size, args.seq_len
    train = dataclasses.replace(
        config.train,
        steps=args.steps,
        batch_size=batch_size or config.train.batch_size,
        seq_len=seq_len or config.train.seq_len,
    )
    model = dataclasses.replace(config.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    losses = {}
    for preset in args.presets:
        quant = QuantConfig(preset)
        run = dataclasses.replace(config, model=model, train=train, quant=quant).validate()
        losses[preset] = train_losses(run, args.seeds, args.out)
    last_quarter = slice(-max(args.steps // 4, 1), None)
    for preset, runs in losses.items():
        if preset == BASELINE:
            continue
        gaps = [
            float(100 * relative_gap(ce, losses[BASELINE][seed])[last_quarter].mean())
            for seed, ce in runs.items()
        ]
        each = ", ".join(f"{gap:+.3f}" for gap in gaps)
        mean = sum(gaps) / len(gaps)
        print(f"{preset}: {mean:+.3f} % loss against {BASELINE} over the last quarter ({each})")
    plot(losses, args.out)


if __name__ == "__main__":
    main()
