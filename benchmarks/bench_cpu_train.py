"""Training tokens/s on CPU: the default model here, and the same architecture in transformers.

    pip install '.[oracle]'
    DSV3_PYTHON=python ./run bench cpu_train

Both train configs/tiny.py without MTP (transformers trains none): f32, the same batch, forward,
backward, AdamW with its clipping, on all cores. All take turns, so that a busy machine slows
all, and medians are compared. transformers runs with each of its attention and expert
implementations, and its fastest counts. Ours is also timed with MTP, as `./run train` runs it.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.cli import use_virtual_devices
from dsv3_jax.config import Config, ModelConfig, load_config
from dsv3_jax.parallel.mesh import batch_sharding, fill_mesh, make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.dry_run import count_parameters
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import abstract_state, create_state
from dsv3_jax.training.step import jit_train_step

TINY = Path(__file__).parent.parent / "configs" / "tiny.py"
# What transformers 5 offers for training. Its batched_mm, meant for decoding, copies an expert's
# weights for every token: 6 GB a layer here.
ATTENTION = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "eager")


WARM_UP_STEPS = 3


@dataclasses.dataclass
class Contestant:
    """A training step on a fixed batch."""

    step: Callable[[], float]  # runs one step to its end and returns the loss
    parameters: int


def ours(config: Config, rows: np.ndarray) -> Contestant:
    """This project's compiled step, laid out as `./run train` does: a device a core."""
    use_virtual_devices(None, all_cores=True)
    config = fill_mesh(config)
    mesh = make_mesh(config.mesh)
    layout = make_layout(mesh, config.sharding, config.expert_parallel)
    abstract = abstract_state(config, layout)
    settings = Schedule(config).settings(0)
    compiled = jit_train_step(config, layout, abstract)
    batch = jax.device_put(rows[None], batch_sharding(mesh, batch_dim=1))
    held = [create_state(config, abstract)]

    def step() -> float:
        held[0], metrics = compiled(held[0], batch, settings)
        return float(metrics.loss)

    return Contestant(step, count_parameters((abstract.params, abstract.router)))


def theirs(config: Config, rows: np.ndarray, attention: str, experts: str) -> Contestant:
    """transformers' DeepseekV3ForCausalLM with torch's AdamW."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hf_config = transformers_config(config.model)
    hf_config._attn_implementation = attention
    hf_config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(hf_config).train()
    plan = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.learning_rate,
        betas=(plan.b1, plan.b2),
        eps=plan.eps,
        weight_decay=plan.weight_decay,
    )
    # Shifting is ours: the last token of a row is a target only.
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in (rows[:, :-1], rows[:, 1:]))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        optimizer.step()
        return float(loss.detach())

    named = dict(model.named_buffers())
    biases = sum(b.numel() for n, b in named.items() if n.endswith("e_score_correction_bias"))
    parameters = sum(p.numel() for p in model.parameters()) + biases
    return Contestant(step, parameters)


def transformers_config(model: ModelConfig):
    """The same architecture as transformers names it."""
    from transformers import DeepseekV3Config

    values = dataclasses.asdict(model)
    for name in ("scoring_func", "topk_method", "num_nextn_predict_layers", "dtype"):
        values.pop(name)  # transformers knows one router only, and no MTP in training
    yarn = values.pop("rope_scaling")
    rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    if yarn is not None:
        rope |= yarn | {"rope_type": "yarn"}
        rope.pop("type")
    values["num_key_value_heads"] = model.num_attention_heads
    return DeepseekV3Config(**values, rope_parameters=rope, pad_token_id=None)


def serve(make: Callable[..., Contestant], args: tuple, pipe: Any) -> None:
    """The life of a contestant's process: says its size, then runs a timed step at each request."""
    try:
        contestant = make(*args)
        for _ in range(WARM_UP_STEPS):
            contestant.step()
    except (ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(contestant.parameters)
    while pipe.recv():
        start = time.perf_counter()
        contestant.step()
        pipe.send(time.perf_counter() - start)


@dataclasses.dataclass
class Entry:
    """A contestant in a process of its own: no thread pool or allocator is shared."""

    name: str
    parameters: int
    pipe: Any
    seconds: list[float] = dataclasses.field(default_factory=list)


def enter(name: str, make: Callable[..., Contestant], *args: Any) -> Entry | None:
    """Starts a contestant; None, with the reason on the screen, when it cannot run here."""
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    context.Process(target=serve, args=(make, args, other_end), daemon=True).start()
    other_end.close()
    if isinstance(answer := pipe.recv(), str):
        print(f"left out: {name}: {answer}")
        return None
    return Entry(name, answer, pipe)


def take_turns(entries: list[Entry], repeats: int) -> None:
    """`repeats` timed steps of each, one at a time in turn; the others wait, asleep."""
    for _ in range(repeats):
        for entry in entries:
            for _ in range(2):  # the first finds cold caches and is not counted
                entry.pipe.send(True)
                seconds = entry.pipe.recv()
            entry.seconds.append(seconds)


def report(contestants: list[Entry], tokens: int) -> None:
    """A table; each is compared with the fastest of transformers."""
    base = min(statistics.median(c.seconds) for c in contestants if "transformers" in c.name)
    print(f"{'':<36} {'parameters':>12} {'ms/step':>9} {'min':>8} {'tokens/s':>9} {'ratio':>6}")
    for c in contestants:
        median = statistics.median(c.seconds)
        print(
            f"{c.name:<36} {c.parameters:>12,} {median * 1e3:>9.1f} {min(c.seconds) * 1e3:>8.1f} "
            f"{tokens / median:>9.0f} {base / median:>5.2f}x"
        )


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each")
    parser.add_argument("--batch-size", type=int, default=None, help="rows; the config's if unset")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error}: pip install '.[oracle]'") from error

    with_mtp = load_config(TINY)
    train = with_mtp.train
    batch_size = args.batch_size or train.batch_size
    train = dataclasses.replace(train, batch_size=batch_size, micro_batch_size=None)
    with_mtp = dataclasses.replace(with_mtp, train=train)
    without = dataclasses.replace(
        with_mtp, model=dataclasses.replace(with_mtp.model, num_nextn_predict_layers=0)
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = np.random.default_rng(0).integers(0, 256, (batch_size, train.seq_len + 1))
    rows = rows.astype(np.int32)
    print(
        f"batch {batch_size} x {train.seq_len}, f32, {cores} cores, load "
        f"{os.getloadavg()[0]:.1f}; jax {jax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    peers = [
        enter(f"transformers, {attention} + {experts}", theirs, without, rows, attention, experts)
        for attention in ATTENTION
        for experts in EXPERTS
    ]
    same = enter("dsv3_jax", ours, without, rows)
    entries = [e for e in (*peers, same, enter("dsv3_jax with MTP", ours, with_mtp, rows)) if e]
    if same is None or not any("transformers" in e.name for e in entries):
        raise SystemExit("nothing to compare")
    if different := {e.parameters for e in peers if e} - {same.parameters}:
        raise SystemExit(
            f"not the same model: {same.parameters:,} parameters here, {different} in transformers"
        )
    take_turns(entries, args.repeats)
    for entry in entries:
        entry.pipe.send(False)
    report(entries, tokens=batch_size * train.seq_len)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
