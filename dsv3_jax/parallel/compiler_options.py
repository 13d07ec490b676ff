"""What XLA is told when a step is compiled: on the devices here, and for those that are not."""

import jax

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
# Where an operation is done before another core has woken up: a product of an expert's down_proj in
# the default model takes 0.8 us on one core, and 3.7 shared out over two.
ONE_CORE_OPTIONS = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
# So that rows travel while the other half of a batch is computed (expert_parallel.overlap).
OVERLAP_OPTIONS: dict[str, dict[str, bool | int | float | str]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Else the next exchange waits for the one before, and starts when its window is over.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
    },
    "tpu": {
        "xla_tpu_enable_async_all_to_all": True,
        # Else a norm of rows, which its scheduler takes for 12 ms, is work enough for an exchange.
        "xla_lhs_loop_fusion_latency_multiplier": 0.01,
    },
}


def compiler_options(layout: Layout) -> dict[str, bool | int | float | str]:
    """XLA's options for a training step of this layout, besides those of the environment."""
    if layout.platform == "cpu":
        return dict(ONE_CPU_OPTIONS if layout.mesh.size == 1 else CPU_OPTIONS)
    return dict(overlap_options(layout.platform)) if layout.expert.overlap else {}


def overlap_options(platform: str | None) -> dict[str, bool | int | float | str]:
    """Those that `expert_parallel.overlap` needs; none on CPUs, which exchange as they go."""
    return OVERLAP_OPTIONS.get({"cuda": "gpu"}.get(platform or "", platform or ""), {})


def rounded_operands(platform: str, dtype: str) -> str | None:
    """What XLA rounds operands of plain products of this dtype to on a platform; None: nothing.

    float32 is multiplied as TF32 (11 bits) on GPUs and as bfloat16 (8 bits) on TPUs, unless JAX is
    told otherwise: `jax.config.jax_default_matmul_precision`, `jax.default_matmul_precision`.
    """
    told = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if dtype != "float32" or told is not None:
        return None
    return {"gpu": "TF32", "tpu": "bfloat16"}.get(platform)


def rounding_line(platform: str, dtype: str) -> str | None:
    """One line for people where `rounded_operands` is something, and how to have float32."""
    rounded = rounded_operands(platform, dtype)
    return rounded and (
        f"of float32 numbers, which XLA rounds to {rounded} here: "
        "JAX_DEFAULT_MATMUL_PRECISION=highest keeps them"
    )
