"""How far Hopper's FP8 accumulator drifts as K grows, and what promotion to f32 mends.

    python examples/accumulation_error.py --out docs/plots/numerics/accumulation_error.png

Emulates products of Gaussian matrices for K up to 4096 and plots the largest error, relative to the
rms of the exact results, for several promotion intervals N_C. About a minute on one CPU core.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize, quantize
from dsv3_jax.quantization.tensor_core import tensor_core_matmul

INTERVALS = {"no promotion": None, "N_C = 512": 512, "N_C = 128 (V3)": 128, "N_C = 32": 32}


def largest_error(a: BlockScaled, b: BlockScaled, promotion_interval: int | None) -> float:
    """The largest error of the emulated product over the rms of the exact one."""
    numbers = (np.asarray(dequantize(x, jnp.float32), np.float64) for x in (a, b))
    exact = np.matmul(next(numbers), next(numbers).T)
    got = np.asarray(tensor_core_matmul(a, b, promotion_interval=promotion_interval))
    return float(np.abs(got - exact).max() / np.sqrt(np.mean(exact**2)))


def main() -> None:
    """Prints a table and writes the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("accumulation_error.png"))
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the product")
    parser.add_argument("--max-k", type=int, default=4096)
    args = parser.parse_args()
    lengths = [k for k in (512, 1024, 2048, 4096, 8192, 16384) if k <= args.max_k]
    errors: dict[str, list[float]] = {name: [] for name in INTERVALS}
    print(f"largest error of {args.size} x {args.size} results over their rms, in percent")
    print("K".rjust(6), *(name.rjust(16) for name in INTERVALS))
    for length in lengths:
        rng = np.random.default_rng(length)
        # One scale for all, so that the only error is the accumulator's.
        a, b = (
            quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), shape)
            for shape in [(args.size, length)] * 2
        )
        for name, interval in INTERVALS.items():
            errors[name].append(100 * largest_error(a, b, interval))
        print(f"{length:6d}", *(f"{row[-1]:16.4f}" for row in errors.values()))
    plot(lengths, errors, args.out)


def plot(lengths: list[int], errors: dict[str, list[float]], out: Path) -> None:
    """One line a promotion interval, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in errors.items():
        axes.loglog(lengths, row, marker="o", label=name)
    axes.set(xlabel="contracted dimension K", ylabel="largest error / rms of results [%]")
    axes.set_xticks(lengths, [str(k) for k in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
