"""How much loss FP8 training costs: the same runs under several recipes, and their relative gap.

    python examples/fp8_loss_gap.py --out runs/fp8_loss_gap
    python examples/fp8_loss_gap.py --config configs/half_billion.py --steps 2000

Trains every preset from the same seeds on the same data and prints the gap to BF16 of the smoothed
losses over the last quarter of the steps (the V3 report, appendix B.1, found less than 0.25 %).
Losses go to `PRESET-seedN.jsonl` as they come, the curves of all that is there to loss_gap.png. A
run that is complete there is not repeated, so that an interrupted call goes on where it stopped and
several calls, one a preset, may share a folder.

Activations and products are bfloat16 in every run, whatever the config's dtype: "bf16" then means
what it does in the paper. `--dtype float32` leaves FP8 as the only rounding.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.analysis.loss_gap import BASELINE, gaps_of, plot_loss_gap, read_losses, read_run
from dsv3_jax.analysis.output import save_figure
from dsv3_jax.config import Config, QuantConfig, load_config
from dsv3_jax.data.batches import Rows
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.kernels import backend
from dsv3_jax.quantization.recipe import RECIPES
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState, init_state
from dsv3_jax.training.step import train_step


class Trainer:
    """One preset's compiled step, which serves every seed; `state` is the latest run's."""

    def __init__(self, config: Config):
        self.config = config
        self.state: TrainState | None = None
        self._init = jax.jit(partial(init_state, config=config))
        self._step = jax.jit(partial(train_step, config=config), donate_argnums=0)

    def losses(self, seed: int) -> Iterator[float]:
        """Next-token cross-entropy, nats a token, of one step after the other."""
        train, schedule = self.config.train, Schedule(self.config)
        shape = (schedule.max_micro_batches, schedule.micro_batch_size, train.seq_len + 1)
        rows = Rows(open_corpus(self.config.data, seed).train, train.seq_len + 1, seed)
        self.state, previous = self._init(jax.random.key(seed)), None
        for step in range(train.steps):
            batch = np.zeros(shape, np.int32)
            read = rows.rows(schedule.first_row(step), schedule.rows(step))
            batch.reshape(-1, shape[-1])[: len(read)] = read
            self.state, metrics = self._step(
                self.state, jnp.asarray(batch), schedule.settings(step)
            )
            if previous is not None:  # one step late, so that the device need not wait
                yield float(previous)
            previous = metrics.terms.ce
        if previous is not None:
            yield float(previous)

    def run(self, seed: int, folder: Path, every: int) -> list[float]:
        """The losses of a whole run, written to the folder every so many steps; or those there."""
        path = folder / f"{self.config.quant.preset}-seed{seed}.jsonl"
        config = dataclasses.asdict(dataclasses.replace(self.config, seed=seed))
        identity = json.loads(json.dumps(config))
        if path.is_file():
            saved, losses = read_run(path)
            if saved == identity and len(losses) == self.config.train.steps:
                return losses
        losses, start = [], time.perf_counter()
        with path.open("w") as file:
            file.write(json.dumps({"config": identity}) + "\n")
            written = 0
            for loss in self.losses(seed):
                losses.append(loss)
                if len(losses) % every == 0 or len(losses) == self.config.train.steps:
                    line = {
                        "step": len(losses),
                        "seconds": round(time.perf_counter() - start, 2),
                        "ce": [round(value, 6) for value in losses[written:]],
                    }
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    written = len(losses)
                    print(
                        f"{path.stem} step {line['step']}: {losses[-1]:.4f} "
                        f"after {line['seconds']:.0f} s",
                        flush=True,
                    )
        return losses


def main() -> None:
    """Trains what is missing, prints the gaps and draws the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--presets", nargs="+", default=[BASELINE, "fp8_paper"], choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, help="default: the config's")
    parser.add_argument("--seq-len", type=int, help="default: the config's")
    parser.add_argument("--data-path", help="default: the config's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--every", type=int, default=25, help="steps from line to line")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_loss_gap"))
    args = parser.parse_args()
    config = load_config(args.config)
    given = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    train = {"steps": args.steps} | {name: value for name, value in given.items() if value}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=args.dtype),
        train=dataclasses.replace(config.train, **train),
        data=dataclasses.replace(config.data, path=args.data_path or config.data.path),
    )
    trainers = {
        preset: Trainer(dataclasses.replace(config, quant=QuantConfig(preset)).validate())
        for preset in args.presets
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for trainer in trainers.values():
            trainer.run(seed, args.out, args.every)
    for choice in backend.choices():
        print(choice)
    report(args.out)


def report(folder: Path) -> None:
    """Prints the gap of every preset that the folder holds, and draws the curves."""
    losses = read_losses(folder)
    if BASELINE not in losses:
        print(f"no {BASELINE} in {folder} yet: nothing to compare with")
        return
    for preset in losses.keys() - {BASELINE}:
        gaps = list(gaps_of(losses, preset).values())
        if not gaps:
            print(f"{preset}: no seed that {BASELINE} has run too")
            continue
        each = ", ".join(f"{gap:+.3f}" for gap in gaps)
        mean = sum(gaps) / len(gaps)
        print(f"{preset}: {mean:+.3f} % loss against {BASELINE} over the last quarter ({each})")
    print(f"wrote {save_figure(plot_loss_gap(losses), folder / 'loss_gap.png')}")


if __name__ == "__main__":
    main()
