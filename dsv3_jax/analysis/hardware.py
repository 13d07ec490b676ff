"""Accelerators by name, every number with its source.

Bandwidths are one-way, per device, in bytes a second, and nominal: `*_efficiency` is the fraction
that a good library reaches. Peaks are dense (no sparsity). An accelerator whose numbers could not
be sourced is left out rather than guessed; describe your own in a JSON file with the field names of
`Accelerator` and pass its path where a name is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.config import UserError
from dsv3_jax.config.files import read_json

_MAX_FILE_BYTES = 1 << 20
GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Accelerator:
    """One device and the two networks it sits on: scale-up (a node, a rack) and scale-out.

    FLOPs a second, dense; bytes, and bytes a second; efficiencies are fractions; US dollars. Raises
    UserError, with all reasons, for values that are not positive. Source: each says its own.
    """

    name: str
    bf16_flops: float  # dense peak, a second
    fp8_flops: float  # equal to bf16_flops where the matrix unit has no faster FP8
    hbm_bytes: float
    hbm_bandwidth: float
    scale_up_bandwidth: float
    scale_up_domain: int  # devices that reach each other over scale-up
    scale_out_bandwidth: float | None  # None: no sourced number
    source: str
    # Achieved over nominal. The ISCA paper (section 2.3.2, 4.3) measures 160 of 200 GB/s on NVLink
    # and counts 40 of 50 GB/s on a CX7; other devices are assumed to reach the same fraction.
    scale_up_efficiency: float = 0.8
    scale_out_efficiency: float = 0.8
    price_per_hour: float | None = None  # US dollars; None: give one to get costs

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "source"):
                if not isinstance(value, str) or not value:
                    problems.append(f"{field.name} must be a non-empty string")
            elif value is None and field.name in ("scale_out_bandwidth", "price_per_hour"):
                continue
            elif not isinstance(value, int | float) or not value > 0 or value == float("inf"):
                problems.append(f"{field.name}={value!r} must be a positive number")
            elif field.name.endswith("efficiency") and value > 1:
                problems.append(f"{field.name}={value} must be at most 1")
        if problems:
            raise UserError(f"accelerator {self.name!r}: " + "; ".join(problems))

    def peak_flops(self, fp8: bool) -> float:
        """Dense peak of the matrix units, a second."""
        return self.fp8_flops if fp8 else self.bf16_flops

    def bandwidth(self, scale_out: bool) -> float:
        """Achievable one-way bytes a second of a device on one of its two networks."""
        if not scale_out:
            return self.scale_up_bandwidth * self.scale_up_efficiency
        if self.scale_out_bandwidth is None:
            raise UserError(
                f"accelerator {self.name!r} has no sourced scale_out_bandwidth: keep the mesh "
                f"within its {self.scale_up_domain} scale-up devices, or describe it in a JSON file"
            )
        return self.scale_out_bandwidth * self.scale_out_efficiency


_DGX_NICS = "eight ConnectX-7 of 400 Gb/s a node (NVIDIA DGX BasePOD reference architecture)"

ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        Accelerator(
            "h800",
            bf16_flops=989.4 * TERA,
            fp8_flops=1978.9 * TERA,
            hbm_bytes=80 * GB,
            hbm_bandwidth=3350 * GB,
            scale_up_bandwidth=200 * GB,
            scale_up_domain=8,
            scale_out_bandwidth=50 * GB,
            price_per_hour=2.0,
            source=(
                "ISCA paper section 4.1 (NVLink 400 GB/s both ways, CX7 400 Gb/s; else as H100) "
                "and table 4 (432 TFLOPS at 43.73 % MFU: 988 TFLOPS peak); price: V3 report table 1"
            ),
        ),
        Accelerator(
            "h100",
            bf16_flops=989.4 * TERA,
            fp8_flops=1978.9 * TERA,
            hbm_bytes=80 * GB,
            hbm_bandwidth=3350 * GB,
            scale_up_bandwidth=450 * GB,
            scale_up_domain=8,
            scale_out_bandwidth=50 * GB,
            source=f"NVIDIA H100 SXM datasheet (sparse peaks halved); {_DGX_NICS}",
        ),
        Accelerator(
            "h200",
            bf16_flops=989.4 * TERA,
            fp8_flops=1978.9 * TERA,
            hbm_bytes=141 * GB,
            hbm_bandwidth=4800 * GB,
            scale_up_bandwidth=450 * GB,
            scale_up_domain=8,
            scale_out_bandwidth=50 * GB,
            source=f"NVIDIA H200 SXM datasheet (sparse peaks halved); {_DGX_NICS}",
        ),
        Accelerator(
            "gb200-nvl72",
            bf16_flops=2500 * TERA,
            fp8_flops=5000 * TERA,
            hbm_bytes=186 * GB,
            hbm_bandwidth=8000 * GB,
            scale_up_bandwidth=900 * GB,
            scale_up_domain=72,
            scale_out_bandwidth=None,
            source=(
                "NVIDIA GB200 NVL72 datasheet, a 72nd of the rack (180 PFLOPS BF16, 360 FP8, "
                "dense; 13.4 TB; 576 TB/s); 900 GB/s one way also in the ISCA paper, section 2.3.2"
            ),
        ),
        Accelerator(
            "tpu-v5e",
            bf16_flops=197 * TERA,
            fp8_flops=197 * TERA,
            hbm_bytes=16 * GB,
            hbm_bandwidth=819 * GB,
            scale_up_bandwidth=200 * GB,
            scale_up_domain=256,
            scale_out_bandwidth=3.125 * GB,
            source=(
                "Google Cloud TPU v5e documentation (ICI 400 GB/s both ways; two NICs of 100 Gb/s "
                "for 8 chips); the torus is counted as a crossbar, so all-to-alls are too fast"
            ),
        ),
        Accelerator(
            "tpu-v5p",
            bf16_flops=459 * TERA,
            fp8_flops=459 * TERA,
            hbm_bytes=95 * 2**30,
            hbm_bandwidth=2765 * GB,
            scale_up_bandwidth=600 * GB,
            scale_up_domain=8960,
            scale_out_bandwidth=6.25 * GB,
            source=(
                "Google Cloud TPU v5p documentation (ICI 1200 GB/s both ways, DCN 50 Gb/s a chip); "
                "the torus is counted as a crossbar, so all-to-alls are too fast"
            ),
        ),
        Accelerator(
            "tpu-v6e",
            bf16_flops=918 * TERA,
            fp8_flops=918 * TERA,
            hbm_bytes=32 * GB,
            hbm_bandwidth=1638 * GB,
            scale_up_bandwidth=400 * GB,
            scale_up_domain=256,
            scale_out_bandwidth=12.5 * GB,
            source=(
                "Google Cloud TPU v6e documentation (ICI 800 GB/s both ways; four NICs of 200 Gb/s "
                "for 8 chips); the torus is counted as a crossbar, so all-to-alls are too fast"
            ),
        ),
        Accelerator(
            "tpu-7x",
            bf16_flops=2307 / 2 * TERA,
            fp8_flops=4614 / 2 * TERA,
            hbm_bytes=96 * 2**30,
            hbm_bandwidth=7380 / 2 * GB,
            scale_up_bandwidth=300 * GB,
            scale_up_domain=9216 * 2,
            scale_out_bandwidth=None,
            source=(
                "Google Cloud TPU7x (Ironwood) documentation, half a chip, as JAX has two devices "
                "on each (192 GiB, 7.38 TB/s and ICI 1200 GB/s both ways a chip); the torus is "
                "counted as a crossbar, so all-to-alls are too fast"
            ),
        ),
    )
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known names closest to `name`, nearest first."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
    listed = ", ".join(sorted(known))
    return f"did you mean {' or '.join(close)}? Known: {listed}" if close else f"known: {listed}"


def accelerator(name: str) -> Accelerator:
    """The accelerator called `name`: a known name, "host" (this CPU, measured), or a JSON file.

    In bytes, and bytes and FLOPs a second. UserError names the nearest known accelerator, or the
    missing or wrong field of the file. Source: the makers' data sheets, in the field `source`.

    >>> import dsv3_jax as ds
    >>> ds.accelerator("h800").hbm_bytes / 1e9
    80.0
    """
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    if name == "host":
        return measure_host()
    if name.endswith(".json"):
        return _from_file(Path(name))
    raise UserError(f"unknown accelerator {name!r}: {nearest(name, [*ACCELERATORS, 'host'])}")


def _from_file(path: Path) -> Accelerator:
    try:
        values = read_json(path, _MAX_FILE_BYTES)
    except (OSError, UserError) as error:
        raise UserError(f"accelerator file {error}") from error
    fields = {f.name: f for f in dataclasses.fields(Accelerator)}
    for unknown in sorted(set(values) - set(fields)):
        raise UserError(
            f"accelerator file {path}: no field {unknown!r}: {nearest(unknown, fields)}"
        )
    needed = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(needed - set(values)):
        raise UserError(f"accelerator file {path}: missing {', '.join(missing)}")
    return Accelerator(**values)


def measure_host(size: int = 1024, repeats: int = 5) -> Accelerator:
    """This machine's CPU as an Accelerator: f32 matmul and copy rates that NumPy reaches here.

    Both "networks" are one device's memory, as virtual devices share it. Takes about a second.
    """
    square = np.ones((size, size), np.float32)
    block = np.ones(32 * 2**20, np.uint8)

    def best(work) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2 * size**3 / best(lambda: square @ square)
    bandwidth = 2 * block.nbytes / best(lambda: block.copy())  # a copy reads and writes
    return Accelerator(
        "host",
        bf16_flops=flops,
        fp8_flops=flops,
        hbm_bytes=_host_memory(),
        hbm_bandwidth=bandwidth,
        scale_up_bandwidth=bandwidth,
        scale_up_domain=2**20,
        scale_out_bandwidth=bandwidth,
        source="measured here: NumPy f32 matmul and copy",
    )


def _host_memory() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return float(line.split()[1]) * 1024
    return 8 * GB  # no /proc: the smallest machine the tests are meant for


# Peak dense BF16 FLOP/s of one device, by the beginning of jax.Device.device_kind; the first match
# counts. NVIDIA: data sheets of the H100 (SXM 1979, NVL 1671, PCIe 1513 TFLOP/s "with sparsity",
# which doubles), H200 (SXM 1979, NVL 1671) and A100 (312 dense); an H800 has the compute of an
# H100. TPU: cloud.google.com/tpu/docs, "peak compute per chip (bf16)".
PEAK_BF16_FLOPS = (
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA H800 PCIe", 756e12),
    ("NVIDIA H800", 989.4e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("TPU v6 lite", 918e12),  # v6e
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v4 lite", 137e12),
    ("TPU v4", 275e12),
)


def peak_bf16_flops(device_kind: str) -> float | None:
    """Peak dense BF16 FLOP/s of one device of this `jax.Device.device_kind`; None if unknown."""
    return next((peak for kind, peak in PEAK_BF16_FLOPS if device_kind.startswith(kind)), None)
