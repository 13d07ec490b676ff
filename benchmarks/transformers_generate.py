"""transformers' `generate` beside ours: the same weights on a CPU, or random ones on a GPU.

    python -m benchmarks.transformers_generate --config configs/h200_slice.py --batch 1 32

Alone it makes a model of the config's shapes in BF16 on the GPU and prints milliseconds a token.
Needs torch and transformers.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from dsv3_jax.config import load_config
from dsv3_jax.interop.hf_config import model_config_to_hf


class Transformers:
    """A model of transformers, greedy, with its cache: a folder's in f32, a config's in BF16."""

    def __init__(self, source: Path, device: str = "cpu"):
        import torch
        import transformers

        self._torch, self._device = torch, device
        if source.is_dir():
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32
            )
        else:
            values = model_config_to_hf(load_config(source).model)
            config = transformers.DeepseekV3Config.from_dict(values)
            config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
            torch.set_default_dtype(torch.bfloat16)
            with torch.device(device):
                self._model = transformers.DeepseekV3ForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        self._model.eval()

    def rate(self, prompts: list[list[int]], new: int) -> float:
        """Tokens/s after the prompt's."""
        ids = self._torch.tensor(prompts, device=self._device)
        times = []
        with self._torch.no_grad():
            for count in (1, new):
                began = time.perf_counter()
                done = self._model.generate(
                    ids, max_new_tokens=count, min_new_tokens=count, do_sample=False
                )
                assert done.cpu().shape[1] == ids.shape[1] + count
                times.append(time.perf_counter() - began)
        return len(prompts) * (new - 1) / (times[1] - times[0])


def main() -> None:
    """Prints a line for each batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    peer = Transformers(args.config, "cuda")
    for batch in args.batch:
        prompts = [[5 + number] * args.prompt for number in range(batch)]
        peer.rate(prompts, 4)
        rate = peer.rate(prompts, args.new)
        print(f"transformers, batch {batch}: {1e3 * batch / rate:.2f} ms a step, {rate:.1f}/s")


if __name__ == "__main__":
    main()
