"""A context four times as long: a tiny V3 trained at 256 tokens finds a needle in 1,024.

    python examples/needle.py --out runs/needle

A document is filler with needles in it, each a token that stands for a key and a value; then
questions, keys that were planted, whose values are to follow. Trains configs/needle.py on documents
of 256 tokens, and its weights further by configs/needle_1k.py on documents of 1,024 with YaRN, as
V3's two phases do. Measured are answers in documents that no run has seen: of the first model at
both lengths, and of the second.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from dsv3_jax import cli, load, running
from dsv3_jax.analysis.output import table
from dsv3_jax.model.transformer import forward

ROOT = Path(__file__).parent.parent
KEYS, VALUES, FILLER = "012345", "!@$%^&", " .,:;-_/"
NEEDLES, QUESTIONS = 4, 8
BOS = 256


def needle(key: str, value: str) -> str:
    """The letter of a key and a value."""
    return chr(ord("A") + len(VALUES) * KEYS.index(key) + VALUES.index(value))


def document(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """(what is read, questions with their answers); `length` tokens with bos and eos."""
    keys = rng.permutation(list(KEYS))[:NEEDLES]
    values = dict(zip(keys, rng.choice(list(VALUES), NEEDLES), strict=True))
    text = rng.choice(list(FILLER), length - 2 - 2 * QUESTIONS)
    places = rng.choice(len(text), NEEDLES, replace=False)
    text[places] = [needle(key, value) for key, value in values.items()]
    asked = "".join(key + values[key] for key in rng.choice(keys, QUESTIONS))
    return "".join(text), asked


def write_documents(path: Path, count: int, length: int, seed: int) -> Path:
    """Documents as records of a prompt and its completion."""
    rng = np.random.default_rng(seed)
    records = (document(rng, length) for _ in range(count))
    lines = (json.dumps({"prompt": text, "completion": asked}) for text, asked in records)
    path.write_text("\n".join(lines) + "\n")
    return path


def found(run: Path, length: int, documents: int = 64, seed: int = 1) -> float:
    """The share of answers that a run's model gives right in new documents of this length."""
    model = load(run)
    config = dataclasses.replace(model.config.model, max_position_embeddings=length)
    rng = np.random.default_rng(seed)
    texts = ["".join(document(rng, length)) for _ in range(documents)]
    tokens = np.array([[BOS, *text.encode()] for text in texts], np.int32)
    answer = jax.jit(lambda variables, ids: forward(variables, ids, config).logits.argmax(-1))
    said = np.concatenate([answer(model.variables, rows) for rows in np.split(tokens, 8)])
    places = length - 2 - 2 * np.arange(QUESTIONS)  # of the values, the last tokens first
    return float(np.mean(said[:, places - 1] == tokens[:, places]))


def main() -> None:
    """Writes data, trains, extends, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/needle"))
    parser.add_argument("--documents", type=int, default=8_000)
    parser.add_argument("--steps", type=int, help="of the first run")
    parser.add_argument("options", nargs="*", help="after --: options of train.py for both runs")
    given = parser.parse_args()
    out = given.out
    for length, count in ((256, given.documents), (1024, given.documents // 40)):
        data, lines = out / f"data-{length}", out / f"needles-{length}.jsonl"
        if not data.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_documents(lines, count, length, seed=length)
            cli.main(["prepare", str(lines), "--out", str(data), "--tokenizer", "byte"])
    for length, name in ((256, "needle"), (1024, "needle_1k")):
        argv = ["--config", str(ROOT / f"configs/{name}.py"), "--run-dir", str(out / str(length))]
        argv += ["--data.path", str(out / f"data-{length}")]
        argv += given.options
        if length == 1024:
            argv += ["--init-from", str(out / "256")]
        elif given.steps:
            argv += ["--train.steps", str(given.steps)]
        if code := running.train(argv):
            raise SystemExit(code)
    rows = [
        [name, length, f"{found(out / run, length):.1%}"]
        for name, run, length in (
            ("trained at 256", "256", 256),
            ("the same", "256", 1024),
            ("extended to 1,024", "1024", 1024),
        )
    ]
    print(table(["model", "tokens", "answers that are right"], rows))


if __name__ == "__main__":
    main()
