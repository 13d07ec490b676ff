"""What tests of the model share: tiny configs, random weights, and the only table of tolerances."""

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.interop.name_map import leaves
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import TrainState

# The largest `relative_error` allowed. Each is some five times what was seen, and far under what a
# wrong term gives: a missing YaRN correction moves logits by 0.1, a wrong norm epsilon by 1e-3.
TOLERANCE = {
    # One operation in f32 against f64: a sum of some 64 products, each rounded to 6e-8.
    "f32_op": 2e-6,
    # Four layers in f32, forward. Seen: 1e-6.
    "f32_model": 1e-5,
    # Gradients add up every path through those layers. Seen: 3e-6.
    "f32_gradient": 2e-5,
    # bf16 keeps 8 bits, 4e-3 a rounding, and a layer has a dozen roundings. Seen: 5e-3, and 0.06 to
    # 0.11 for the worst of 800 logits after three layers.
    "bf16_op": 2e-2,
    "bf16_model": 0.15,
    # A central difference of step h = 1e-3 in f64 has an error of h**2.
    "finite_difference": 1e-5,
    # The same sums in another order, in f32: micro-batches, devices, chunks.
    "f32_reordered": 5e-6,
}


def relative_error(got: Any, want: Any) -> float:
    """The largest error of one element over the root mean square of all wanted elements.

    For trees, the worst leaf. A leaf that is wanted to be zero throughout must be exactly that.
    """
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree, f"{got_tree} is not {want_tree}"
    return max(map(_relative_error, got_leaves, want_leaves))


def _relative_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} is not {want.shape}"
    assert np.isfinite(got).all(), "not finite"
    worst, scale = np.abs(got - want).max(initial=0.0), np.sqrt(np.mean(np.square(want)))
    if scale == 0.0:
        return 0.0 if worst == 0.0 else float("inf")
    return float(worst / scale)


def write_small_run(folder: Path, config: str, **values: Any) -> Path:
    """A config file of this text, its {corpus!r} and other fields filled in, and the corpus."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = f"Document {number}. " + "The quick brown fox jumps over the lazy dog. " * 20
        (corpus / f"{number}.txt").write_text(text)
    path = folder / "small.py"
    path.write_text(config.format(corpus=str(corpus), **values))
    return path


def tiny_model(**overrides: Any) -> ModelConfig:
    """A V3 with every part in it, too small to be slow; dims are odd where they may be."""
    return dataclasses.replace(
        ModelConfig(
            vocab_size=37,
            hidden_size=24,
            num_hidden_layers=3,
            max_position_embeddings=64,
            bos_token_id=35,
            eos_token_id=36,
            num_attention_heads=3,
            q_lora_rank=20,
            kv_lora_rank=12,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
            rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
            intermediate_size=28,
            moe_intermediate_size=14,
            first_k_dense_replace=1,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=1,
            initializer_range=0.2,
            dtype="float32",
        ),
        **overrides,
    )


def tiny_config(model: ModelConfig | None = None, **train: Any) -> Config:
    """A run of `tiny_model` in steps of 4 rows of 9 + 1 tokens."""
    train = {"steps": 20, "batch_size": 4, "seq_len": 9} | train
    return Config(
        model=model or tiny_model(),
        train=TrainConfig(**train),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=2, batch_start_ratio=1.0),
    )


def random_variables(config: ModelConfig, seed: int = 0) -> Any:
    """Variables with nothing at its initial constant: norms near 1, router biases near 0.

    NumPy draws them, in the shapes that the table of weights gives: compiling `init_variables`
    takes longer than most tests, and tracing it a second, for each module that does so as it is
    imported. That the table has the model's shapes is tests/test_weights.py's to say.
    """
    rng = np.random.default_rng(seed)
    variables: dict[str, Any] = {"params": {}, "router": {}}
    for path, leaf in sorted(leaves(config).items()):
        *modules, name = path
        values = rng.normal(size=leaf.lead + leaf.dims)
        if name.endswith("norm"):
            values = 1 + 0.2 * values
        elif name == "e_score_correction_bias":
            values = 0.2 * values
        else:
            values = config.initializer_range * values
        place = reduce(lambda tree, module: tree.setdefault(module, {}), modules, variables)
        place[name] = jnp.asarray(values, jnp.float32)
    return variables


def random_state(config: Config) -> TrainState:
    """The state before a run's first step, of `random_variables`; nothing is compiled for it."""
    variables = random_variables(config.model)
    moments = jax.eval_shape(make_optimizer(config.optimizer).init, variables["params"])
    opt_state = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), moments)
    step, skipped, in_row = (jnp.asarray(np.int32(0)) for _ in range(3))
    return TrainState(step, *variables.values(), opt_state, skipped, in_row)


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    """Ordinary tokens, int32: neither bos nor eos, which tiny_model has at the end."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size - 2, shape)
    return ids.astype(np.int32)
