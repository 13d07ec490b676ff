"""Times a training step of transformers' DeepseekV3ForCausalLM on the slice's shapes.

    python -m benchmarks.transformers_step [--rows 1]

Its best form that was found: all weights in BF16, `grouped_mm` experts, no recomputation, cuDNN's
attention, fused AdamW. No MTP and no float32 masters. Prints milliseconds, a median of five.
`bench_step` runs it in a process of its own. Needs torch, transformers and a GPU.
"""

import argparse
import statistics
import time

from dsv3_jax.config import load_config
from dsv3_jax.interop.hf_config import model_config_to_hf

SEQUENCE, REPEATS = 4096, 5


def main() -> None:
    """Prints the milliseconds of a step."""
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1)
    rows = parser.parse_args().rows
    model = load_config("configs/h200_slice.py").model
    config = transformers.DeepseekV3Config.from_dict(model_config_to_hf(model))
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    config.use_cache = False
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = transformers.DeepseekV3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, model.vocab_size, (rows, SEQUENCE), device="cuda")

    def step():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    for _ in range(3):
        step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{statistics.median(times):.1f}")


if __name__ == "__main__":
    main()
