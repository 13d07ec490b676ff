"""A model measured on text or prepared data: nats, bits, perplexity, drafts, expert load.

Rows are read whole with the true tokens before each position; MTP's drafts are compared with what
the main model itself would say greedily there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig, UserError
from dsv3_jax.data.checks import check_model
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.mixture import val_rows
from dsv3_jax.data.packed_rows import SupervisedRows
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.loading import Model, find_tokenizer, load
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import forward
from dsv3_jax.training.metrics import expert_stats


class Batch(NamedTuple):
    """Rows of T + 1 tokens; what counts where it is predicted; documents, None for one a row."""

    tokens: Int32[np.ndarray, "B T1"]
    counted: Bool[np.ndarray, "B T1"]
    segments: Int32[np.ndarray, "B T1"] | None = None


def text_batches(
    ids: Int32[np.ndarray, " N"], seq_len: int, batch_size: int, pad_id: int
) -> list[Batch]:
    """A text's tokens in rows that overlap by one, each predicted once; what fills up counts not.

    The first token is only read.
    """
    predicted = len(ids) - 1
    rows = -(-predicted // seq_len)
    rows += -rows % batch_size
    places = np.arange(rows)[:, None] * seq_len + np.arange(seq_len + 1)
    tokens = np.where(places < len(ids), ids[np.minimum(places, predicted)], pad_id)
    counted = (places < len(ids)) & (np.arange(seq_len + 1) > 0)
    cut = range(0, rows, batch_size)
    return [
        Batch(tokens[i : i + batch_size].astype(np.int32), counted[i : i + batch_size]) for i in cut
    ]


def measure(model: Model, batches: Sequence[Batch], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The numbers of a model on rows.

    tokens, nats_per_token, bits_per_token, perplexity; bits_per_byte where there is a tokenizer;
    mtp_accuracy, of each depth the share of drafts that greedy decoding would accept; and of each
    MoE layer, MTP's last, expert_load, max_vio and dead_experts as in metrics.jsonl. ValueError
    when nothing counts.
    """
    how = Pass(model.config.model, layout=model.layout)
    read = jax.jit(lambda variables, batch: _measure_batch(variables, batch, how))
    parts = [jax.device_get(read(model.variables, batch)) for batch in batches]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *parts)
    if not total["tokens"]:
        raise ValueError("no token counts")
    nats = float(total["nats"] / total["tokens"])
    found: dict[str, Any] = {
        "tokens": int(total["tokens"]),
        "nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
    }
    if tokenizer is not None:
        said = [batch.tokens[:, 1:][batch.counted[:, 1:]] for batch in batches]
        text_bytes = tokenizer.count_bytes(np.concatenate(said))
        if text_bytes:
            found["bits_per_byte"] = float(total["nats"]) / math.log(2) / text_bytes
    drafts = np.maximum(total["drafts"], 1)
    found["mtp_accuracy"] = (total["accepted"] / drafts).tolist()
    if total["load"].size:
        found |= expert_stats(total["load"])
    return found


def _measure_batch(variables: Any, batch: Batch, how: Pass) -> dict[str, Any]:
    segments = None if batch.segments is None else jnp.asarray(batch.segments)[:, :-1]
    real = jnp.asarray(batch.counted)[:, 1:] if segments is None else segments != 0
    ids = jnp.asarray(batch.tokens)[:, :-1]
    out = forward(variables, ids, how, segments=segments, counted=real)
    logits, *of_mtp = (how.layout.in_natural_order(x) for x in (out.logits, *out.mtp_logits))
    counted, targets = jnp.asarray(batch.counted)[:, 1:], jnp.asarray(batch.tokens)[:, 1:]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    greedy = logits.argmax(-1)
    accepted, drafts = [], []
    for depth, of_depth in enumerate(of_mtp, start=1):
        # Row i drafts token i + 1 + depth, which the main model says in row i + depth.
        same = of_depth[:, :-depth].argmax(-1) == greedy[:, depth:]
        valid = counted[:, depth:]
        if segments is not None:
            valid &= segments[:, :-depth] == segments[:, depth:]
        accepted.append((same & valid).sum())
        drafts.append(valid.sum())
    loads = [] if out.stats is None else [*out.stats.load_E]
    loads += [stats.load_E for stats in out.mtp_stats]
    experts = how.config.n_routed_experts
    return {
        "nats": jnp.where(counted, nats, 0.0).sum(),
        "tokens": counted.sum(),
        "accepted": jnp.array(accepted, jnp.int32),
        "drafts": jnp.array(drafts, jnp.int32),
        "load": jnp.stack(loads) if loads else jnp.zeros((0, experts), jnp.int32),
    }


def evaluate(
    checkpoint: Path,
    *,
    text: Path | None = None,
    data: Path | None = None,
    tokenizer: str | None = None,
    step: str = "auto",
    seq_len: int = 512,
    batch_size: int = 4,
    batches: int = 64,
) -> dict[str, Any]:
    """`measure` of a run, an import or a Hugging Face folder, on a text file or prepared data.

    A text is read whole; of prepared data at most `batches` of its validation side. UserError for
    what cannot be read, and when nothing counts.
    """
    if (text is None) == (data is None):
        raise UserError("give either --text FILE or --data PREPARED")
    for name, value in (("seq-len", seq_len), ("batch-size", batch_size), ("batches", batches)):
        if value <= 0:
            raise UserError(f"--{name} {value} must be positive")
    reader = find_tokenizer(checkpoint, tokenizer)
    model = load(checkpoint, step=step)
    longest = model.config.model.max_position_embeddings
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len} exceeds the model's {longest} positions")
    if text is not None:
        made = _of_text(text, seq_len, batch_size, reader)
    else:
        made = _of_data(str(data), model, reader, (seq_len + 1, batch_size, batches))
    try:
        return measure(model, made, reader)
    except ValueError as error:
        raise UserError(f"{text or data}: {error}") from error


def _of_text(path: Path, seq_len: int, batch_size: int, tokenizer: Tokenizer) -> list[Batch]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    ids = np.array([tokenizer.bos_token_id, *tokenizer.encode(text)], np.int32)
    if len(ids) < 2:
        raise UserError(f"{path} is empty")
    return text_batches(ids, seq_len, batch_size, tokenizer.eos_token_id)


def _of_data(
    path: str, model: Model, tokenizer: Tokenizer, sizes: tuple[int, int, int]
) -> list[Batch]:
    name = str(tokenizer.path) if tokenizer.path is not None else "byte"
    data = DataConfig(path=path, tokenizer=name, fim_rate=0.0)
    corpus = open_corpus(data, 0)
    check_model(model.config.model, corpus)
    found = []
    for batch in val_rows(corpus, *sizes, data):
        if isinstance(batch.rows, SupervisedRows):
            found.append(Batch(*batch.rows))
        else:
            counted = np.arange(sizes[0]) > 0
            found.append(Batch(batch.rows, np.tile(counted, (len(batch.rows), 1))))
    return found
