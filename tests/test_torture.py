"""A run that is killed, stopped and damaged at random moments ends as the uninterrupted one does.

    python tests/test_torture.py --kills 40 --saves 20 --terms 10 --ints 10 --flips 10 --cuts 10

Every process is the whole of train.py. After each blow the same command goes on; at the end the
last state must have the sha256 of the run that nothing happened to. As a test it does a few of
each; of the kills, --saves fall inside a save.
"""

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dsv3_jax.config import load_config  # noqa: E402
from dsv3_jax.training.manifest import damage, steps_in  # noqa: E402
from dsv3_jax.training.restore import restore, state_sha256  # noqa: E402
from dsv3_jax.training.state import init_state  # noqa: E402
from tests.helpers import write_small_run  # noqa: E402

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=272, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64,
            bos_token_id=256, eos_token_id=257, num_attention_heads=2, q_lora_rank=None,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            rope_scaling=None, moe_intermediate_size=16, first_k_dense_replace=0,
            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            num_nextn_predict_layers=0, dtype="float32",
        ),
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps={steps}, batch_size=4, seq_len=24, log_every=1, eval_every=10**6,
                          eval_batches=1, sample_tokens=0),
        schedule=ScheduleConfig(warmup_steps=1, batch_start_ratio=1.0),
        checkpoint=CheckpointConfig(every_steps=10),
    )
"""


@dataclasses.dataclass
class Torture:
    """A run of `steps` steps in `folder`, and what has befallen it."""

    folder: Path
    steps: int
    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.config = write_small_run(self.folder, CONFIG, steps=self.steps)
        self.run = self.folder / "run"
        self.blows: list[str] = []

    def start(self, run: Path | None = None, *, cold: bool = False) -> subprocess.Popen:
        """Begins, or goes on with, the run; `cold`: all is compiled anew."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
        }
        if cold:
            environment.pop("JAX_COMPILATION_CACHE_DIR")
        command = [sys.executable, "train.py", "--config", str(self.config)]
        command += ["--run-dir", str(run or self.run), "--mesh.data", "1", "--devices", "1"]
        with (self.folder / "output").open("w") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def finish(self, run: Path | None = None) -> str:
        """Lets it end, and returns the sha256 of its last state."""
        process = self.start(run)
        assert process.wait(timeout=600) == 0, self.said()
        return last_state(run or self.run, self.steps)

    def reached(self, moment: str, saved: set[str]) -> bool:
        """Whether the process is there; `saved`: what checkpoints/ held when it started."""
        said, folder = self.said(), self.run / "checkpoints"
        if moment == "start":
            return True
        if moment == "tokenising":
            return "backend " in said
        if moment == "compiling":
            return "batch " in said
        here = {path.name for path in folder.glob("*")} if folder.exists() else set()
        if moment == "saving":  # a step's folder, or orbax's temporary one, has just appeared
            return any(
                not (folder / name / "MANIFEST.json").exists()
                for name in here - saved
                if name[0].isdigit()
            )
        return "\nstep " in said

    def blow(self, number: signal.Signals, moment: str) -> bool:
        """A signal at this moment of a process; False when the run ended before it."""
        if moment == "tokenising":
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        folder, newest = self.run / "checkpoints", self.newest()
        saved = {path.name for path in folder.glob("*")} if folder.exists() else set()
        process = self.start(cold=moment == "compiling")
        while not self.reached(moment, saved) and process.poll() is None:
            time.sleep(0.002)
        pause = {"start": 3.0, "tokenising": 0.3, "compiling": 3.0, "saving": 0.03, "training": 1}
        time.sleep(self.random.random() * pause[moment])
        process.send_signal(number)
        code = process.wait(timeout=600)
        if code == 0:
            return False
        if moment != "start":  # while Python imports, the signal itself or an ImportError ends it
            expected = -number if number == KILL else 128 + number
            assert code == expected, f"exit code {code}, not {expected}:\n{self.said()}"
            assert "Traceback" not in self.said(), self.said()
        assert self.newest() >= newest, f"step {newest} was lost:\n{self.said()}"
        self.tell(f"{number.name} while {moment}, at step {self.newest()}")
        return True

    def tell(self, blow: str) -> None:
        self.blows.append(blow)
        print(f"{time.strftime('%T')} {len(self.blows)} {blow}", flush=True)

    def damage(self, how: str) -> bool:
        """A flipped bit, or a cut, in the newest good checkpoint; False: it is the only one."""
        folder = self.run / "checkpoints"
        good = [step for step in steps_in(folder) if damage(folder / str(step)) is None]
        if len(good) < 2:
            return False
        step = folder / str(good[-1])
        files = [path for path in step.rglob("*") if path.is_file()]
        path = self.random.choice([f for f in files if f.stat().st_size])
        content = bytearray(path.read_bytes())
        if how == "flip":
            place = self.random.randrange(len(content))
            content[place] ^= 1 << self.random.randrange(8)
        else:
            del content[self.random.randrange(len(content)) :]
        path.write_bytes(content)
        self.tell(f"{how} in {path.relative_to(self.run)}")
        return True

    def newest(self) -> int:
        """The newest step that matches its manifest; 0: none."""
        folder = self.run / "checkpoints"
        good = [step for step in steps_in(folder) if damage(folder / str(step)) is None]
        return max(good, default=0)


def last_state(run: Path, steps: int) -> str:
    """The sha256 of the state after all steps."""
    config = load_config(run.parent / "small.py")
    abstract = jax.eval_shape(lambda key: init_state(key, config), jax.random.key(0))
    state, _ = restore(run / "checkpoints", steps, abstract._asdict())
    return state_sha256(state)


def torture(folder: Path, blows: list[tuple], *, steps: int, seed: int) -> list[str]:
    """What befell the runs: all `blows`, in random order, on as many runs as they take.

    Every run's last state must be that of the one that nothing happened to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Torture(folder, steps, seed)
    wanted = run.finish(folder / "undisturbed")
    run.random.shuffle(blows)
    for what, *where in blows:
        while not (run.damage(what) if what in ("flip", "cut") else run.blow(what, *where)):
            # It came to its end first, or has too little to damage.
            assert run.finish() == wanted, run.blows
            if run.newest() == steps and what not in ("flip", "cut"):
                shutil.rmtree(run.run)
    assert run.finish() == wanted, run.blows
    return run.blows


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_blows_at_random_moments_lose_nothing(tmp_path):
    blows = [(KILL, "saving"), (KILL, "training"), (KILL, "compiling"), ("flip",), ("cut",)]
    blows += [(TERM, "compiling"), (INT, "saving"), (TERM, "tokenising")]
    told = torture(tmp_path, blows, steps=60, seed=0)
    assert len(told) == len(blows)


def main() -> None:
    """Runs the numbers of the command line, and prints what befell."""
    # A shell's background jobs ignore SIGINT, and so would the runs that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("kills", "saves", "terms", "ints", "flips", "cuts", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    anywhere = ("start", "tokenising", "compiling", "training")
    everywhere = (*anywhere, "saving")
    blows: list[tuple] = [(KILL, "saving")] * options.saves
    blows += [(KILL, anywhere[i % 4]) for i in range(options.kills - options.saves)]
    blows += [(TERM, everywhere[i % 5]) for i in range(options.terms)]
    blows += [(INT, everywhere[i % 5]) for i in range(options.ints)]
    blows += [("flip",)] * options.flips + [("cut",)] * options.cuts
    with tempfile.TemporaryDirectory() as folder:
        told = torture(Path(folder), blows, steps=options.steps, seed=options.seed)
    print(f"{len(told)} blows: nothing lost, every last state that of the undisturbed run")


if __name__ == "__main__":
    main()
