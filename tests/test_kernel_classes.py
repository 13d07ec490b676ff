"""The benchmark's classes of kernels, on lines as a GPU's compiled program has them."""

from benchmarks.kernel_classes import Kernel, Row, classed, table

STEP = "jit(train_step)/"
KERNELS = {
    "attention": ("attention_forward_mosaic_gpu_kernel", ""),
    "products in BF16: head": ("nvjet_sm90_tst_256x128", STEP + "jvp()/dot_general"),
    "products by our kernels: experts, weight gradients": (
        "kernel_mosaic_gpu_kernel",
        STEP + "transpose(jvp())/Block/mlp/experts/jit(grouped_wgrad_into)/kernel/mpmd_map",
    ),
    "weights quantised": (
        "kernel_mosaic_gpu_kernel",
        STEP + "jit(quantize_blocks)/kernel/mpmd_map",
    ),
    "optimizer": ("loop_convert_select_fusion_1", STEP + "convert_element_type"),
    "gradient norm": ("input_reduce_fusion_42", STEP + "reduce_sum"),
    "elementwise: experts": ("loop_convert_fusion", STEP + "jvp()/Block/mlp/experts/mul"),
    "copies": ("MemcpyD2D", ""),
    "XLA: unnamed": ("loop_broadcast_fusion_36", ""),
    "collectives, and waiting for peers": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "jit(forward)/MoE/experts/shard_map/all_gather",
    ),
    "elementwise: dense and router": ("loop_select_fusion", "jit(forward)/Block/mlp/select_n"),
    "elementwise: a layer's sum": ("wrapped_add", "jit(forward)/MoE/add"),
    "operands, turned or converted": ("wrapped_transpose", "made['gate_up_proj'][0].values"),
}


def test_each_kernel_has_its_class():
    kernels = [
        Kernel(name, path, "f32[2]{0}", ms, 1) for ms, (name, path) in enumerate(KERNELS.values())
    ]
    rows = classed(kernels)
    assert list(rows) == list(reversed(KERNELS)), "longest first"
    assert rows["copies"] == Row(7, 1)
    assert classed(kernels * 2)["copies"] == Row(14, 2)
    assert "| copies | 7.0 | 9.0 | 1 |" in table(rows)
