"""Several GPUs of one host: collectives, the exchange of experts, a MoE layer, and training.

    python -m benchmarks.bench_multi_gpu                        # everything, on all GPUs
    python -m benchmarks.bench_multi_gpu --parts exchange moe --cache DIR
    python -m benchmarks.bench_multi_gpu --virtual 4            # tiny, on CPU: only that it runs

Each part is a process of its own with a time limit: one that hangs costs its limit and no more.
Inside a part everything is compiled first, several programs at once, then measured one after the
other; with --cache the compiled programs are kept for the next time. GB/s count the bytes that must
leave a GPU; in brackets, as DeepEP's tables do, also those of rows that stay.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time

from benchmarks import multi_gpu_exchange, multi_gpu_layers, multi_gpu_soak
from benchmarks.multi_gpu_timing import Options, begin

PARTS = {
    "collectives": (multi_gpu_exchange.collectives, 90),
    "torch": (multi_gpu_exchange.torch_collectives, 60),
    "exchange": (multi_gpu_exchange.exchange, 240),
    "profile": (multi_gpu_exchange.profile, 120),
    "soak": (multi_gpu_soak.soak, 120),
    "moe": (multi_gpu_layers.moe_layer, 300),
    "slice": (multi_gpu_layers.training, 420),
}


def main() -> int:
    """Runs the parts one after the other; 1 if one failed or took too long."""
    options, words = parse()
    if options.part:
        begin(options.virtual, options.cache)
        PARTS[options.part][0](options)
        return 0
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for part in options.parts:
        limit = options.seconds or PARTS[part][1]
        command = [sys.executable, "-m", "benchmarks.bench_multi_gpu", "--part", part, *words]
        start = time.monotonic()
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                said = f"exit code {process.wait(limit)}"
            except subprocess.TimeoutExpired:
                said = f"ended after its {limit:.0f} s"
            finally:  # also what it started, and when this process is told to end
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        failed += process.returncode != 0
        print(f"== {part}: {time.monotonic() - start:.0f} s, {said}", flush=True)
    return 1 if failed else 0


def parse() -> tuple[Options, list[str]]:
    """The options, and the words to give to each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help="of each part; 0: its own limit")
    parser.add_argument("--cache", default="", help="folder for compiled programs")
    parser.add_argument("--virtual", type=int, default=0, help="tiny, on as many CPU devices")
    parser.add_argument("--tokens", type=int, nargs="+", default=[], help="a GPU")
    parser.add_argument("--ways", nargs="+", default=[], help="transports, of exchange and moe")
    parser.add_argument("--devices", type=int, nargs="+", default=[], help="of slice: 1 2 4")
    parser.add_argument("--beside", action="store_true", help="moe: shared_beside, by pallas")
    given = parser.parse_args()
    words = sys.argv[1:]
    return Options(**vars(given)), words


if __name__ == "__main__":
    sys.exit(main())
