"""What XLA is told when a step is compiled: on the devices here, and for those that are not."""

from dsv3_jax.parallel.sharding import Layout

# Eigen multiplies rather than YNNPACK (docs/log.md). Where one device has all cores, independent
# products run side by side. With a device a core that makes devices wait for each other: 368 ms a
# step instead of 158; and a product keeps to its device's core.
ONE_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_enable_concurrency_optimized_scheduler": True,
}
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_multi_thread_eigen": False,
}
# So that rows travel while the other half of a batch is computed (expert_parallel.overlap).
OVERLAP_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Else the next exchange waits for the one before, and starts when its window is over.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
    },
    "tpu": {"xla_tpu_enable_async_all_to_all": True},
}


def compiler_options(layout: Layout) -> dict[str, bool | int | str]:
    """XLA's options for a training step of this layout, besides those of the environment."""
    if layout.platform == "cpu":
        return dict(ONE_CPU_OPTIONS if layout.mesh.size == 1 else CPU_OPTIONS)
    return dict(overlap_options(layout.platform)) if layout.expert.overlap else {}


def overlap_options(platform: str | None) -> dict[str, bool | int | str]:
    """Those that `expert_parallel.overlap` needs; none on CPUs, which exchange as they go."""
    return OVERLAP_OPTIONS.get({"cuda": "gpu"}.get(platform or "", platform or ""), {})
