"""Errors of wire formats on what the MoE combine sends: E4M3, E5M2, LogFMT-n and BF16.

    python examples/combine_formats.py --checkpoint runs/tiny

Runs a trained model over validation text, takes the output of every layer's routed experts (what
"Insights into DeepSeek-V3", section 3.2, quantises), and prints each format's relative error and
bytes a number. Without --checkpoint the model is untrained and the text random.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_jax.config import Config, ModelConfig, config_from_dict, load_config
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.model.block import Block
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.moe import Experts
from dsv3_jax.model.transformer import Variables, init_variables
from dsv3_jax.quantization.block_scaled import PER_TOKEN, dequantize, quantize
from dsv3_jax.quantization.logfmt import decode, encode
from dsv3_jax.training.restore import read_meta, read_state


def logfmt(bits: int) -> Callable[[Array], Array]:
    """x to what LogFMT with that many bits makes of it."""
    return lambda x: decode(encode(x, bits), jnp.float32)


def rounded(x: Array, dtype: Any) -> Array:
    """x in f32, rounded to a dtype by the way, which XLA may not take for excess precision."""
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def e5m2(x: Array) -> Array:
    """x to what E5M2 with a scale per 128 channels makes of it."""
    channels = x.shape[-1]
    x = jnp.pad(x, [(0, 0), (0, -channels % 128)]).reshape(x.shape[0], -1, 128)
    scale = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-4) / 57344
    y = rounded(x / scale, jnp.float8_e5m2) * scale
    return y.reshape(y.shape[0], -1)[:, :channels]


# name: the round trip, and bits a number without the 16 or 32 bits of scale per 128 numbers
FORMATS: dict[str, tuple[Callable[[Array], Array], int]] = {
    "E5M2": (e5m2, 8),
    "E4M3": (lambda x: dequantize(quantize(x, PER_TOKEN), jnp.float32), 8),
    "LogFMT-8": (logfmt(8), 8),
    "LogFMT-10": (logfmt(10), 10),
    "BF16": (lambda x: rounded(x, jnp.bfloat16), 16),
}


def expert_outputs(variables: Variables, tokens: Array, config: ModelConfig) -> list[Array]:
    """The routed experts' output [B T, D] in f32, per MoE layer, for whole rows of tokens."""
    x = jnp.take(variables["params"]["embed_tokens"], tokens, axis=0).astype(config.dtype)
    of_tokens = Tokens(jnp.arange(tokens.shape[1])[None])
    outputs = []
    for name, dense, layers in (
        ("dense_layers", True, config.num_dense_layers),
        ("moe_layers", False, config.num_moe_layers),
    ):
        block = Block(Pass(config), dense)

        @jax.jit
        def run(layer, x, block=block):
            return block.apply(
                layer,
                x,
                of_tokens,
                mutable=["intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, Experts),
            )

        for number in range(layers):
            layer = {
                kind: jax.tree.map(lambda leaf, i=number: leaf[i], tree[name])
                for kind, tree in variables.items()
                if name in tree
            }
            (x, _, _), captured = run(layer, x)
            if not dense:
                ((y, _),) = captured["intermediates"]["mlp"]["experts"]["__call__"]
                outputs.append(y)
    return [output.reshape(-1, output.shape[-1]).astype(jnp.float32) for output in outputs]


def load(path: Path | None, config_path: str) -> tuple[Config, Variables, np.ndarray]:
    """A run's config, weights and four rows of its validation text; or random ones."""
    if path is None:
        config = load_config(config_path)
        variables = jax.jit(lambda key: init_variables(key, config.model))(jax.random.key(0))
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (4, 256))
        return config, variables, tokens
    step, meta = read_meta(path / "checkpoints")
    config = config_from_dict(meta["config"])
    abstract = jax.eval_shape(lambda key: init_variables(key, config.model), jax.random.key(0))
    restored, _ = read_state(path / "checkpoints", step, abstract, partial=True)
    text = open_corpus(config.data, config.seed).val
    length = min(256, config.train.seq_len, len(text) // 4)
    return config, restored, text.slice(0, 4 * length).reshape(4, length)


def main() -> None:
    """Prints a table: a row a layer, a column a format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a run directory")
    parser.add_argument("--config", default="configs/tiny.py", help="without a checkpoint")
    args = parser.parse_args()
    config, variables, tokens = load(args.checkpoint, args.config)
    print("relative error of the routed experts' output, in percent")
    print("layer".ljust(10), *(name.rjust(10) for name in FORMATS))
    round_trips = [jax.jit(round_trip) for round_trip, _ in FORMATS.values()]
    for number, x in enumerate(expert_outputs(variables, jnp.asarray(tokens), config.model)):
        errors = [
            float(100 * jnp.linalg.norm(round_trip(x) - x) / jnp.linalg.norm(x))
            for round_trip in round_trips
        ]
        print(f"{config.model.num_dense_layers + number:<10}", *(f"{e:10.3f}" for e in errors))
    print("bits".ljust(10), *(f"{bits:10d}" for _, bits in FORMATS.values()))


if __name__ == "__main__":
    main()
