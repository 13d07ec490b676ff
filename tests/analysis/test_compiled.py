"""Compiled programs are read as they run: products, loops, exchanges by axis, what lies inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.analysis.compiled import groups_of, read_program
from dsv3_jax.analysis.hlo import executions, num_bytes, parse, product_flops

SIZES = {"data": 2, "tensor": 4}


@pytest.fixture(scope="module")
def text() -> str:
    """Five layers of x W, columns over `tensor`, repeated as often as an argument says."""
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 2)

    def layers(x, weights, times):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(
                x @ w, NamedSharding(mesh, P("data", "tensor"))
            ), None

        def repeated(_, x):
            return jax.lax.scan(layer, x, weights)[0]

        return jax.lax.fori_loop(0, times, repeated, x).sum()

    def shaped(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    return (
        jax.jit(layers)
        .lower(
            shaped((16, 64), jnp.float32, "data"),
            shaped((5, 64, 64), jnp.float32, None, None, "tensor"),
            shaped((), jnp.int32),
        )
        .compile()
        .as_text()
    )


def test_loop_bodies_count_as_often_as_they_run(text):
    one = 5 * 2 * 8 * 64 * 16  # of a device: 8 rows, 16 columns
    assert read_program(text, SIZES).flops == one
    thrice = read_program(text, SIZES, trips={r"jit\(layers\)/while$": 3})
    assert thrice.flops == 3 * one
    loops = {loop.trips: loop.known for loop in thrice.loops}
    mean = read_program(text, SIZES, trips={r"jit\(layers\)/while$": 0.25})
    assert mean.flops == one / 4  # of ranks that take different parts
    assert loops == {3: False, 5: True}


def test_collectives_are_counted_by_axis(text):
    report = read_program(text, SIZES, trips={r"jit\(layers\)/while$": 3})
    gathers = [each for each in report.collectives if each.op == "all-gather"]
    assert [each.axes for each in gathers] == [("tensor",)]
    # Each device sends its 8 x 16 floats to three others, in 5 layers, three times.
    assert report.sent_by_axes()[("tensor",), "all-gather"] == 8 * 16 * 4 * 3 * 5 * 3
    assert {each.axes for each in report.collectives if each.op == "all-reduce"} == {
        ("data",),
        ("tensor",),
    }
    assert not any(each.asynchronous or each.covered for each in report.collectives)


SCHEDULED = """HloModule m, is_scheduled=true

%product (a: bf16[8,16], b: bf16[16,32]) -> bf16[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %dot = bf16[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%async (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %x = bf16[8,16]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: bf16[8,16], b: bf16[16,32]) -> bf16[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %wrapped = ((bf16[8,16]), bf16[8,16]) async-start(%a), calls=%async, metadata={op_name="send"}
  %start = (bf16[8,16], bf16[16,16]) all-gather-start(%a), replica_groups=[4,2]<=[2,4]T(1,0)
  %fusion = bf16[8,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %kernel = bf16[8,32]{1,0} custom-call(%fusion), custom_call_target="mosaic_gpu_v2"
  %done = bf16[16,16]{1,0} all-gather-done(%start)
  %received = bf16[8,16]{1,0} async-done(%wrapped)
  ROOT %sum = bf16[8,32]{1,0} add(%fusion, %kernel)
}
"""


def test_what_lies_between_start_and_end():
    report = read_program(SCHEDULED, SIZES)
    found = {each.op: each for each in report.collectives}
    assert set(found) == {"all-to-all", "all-gather"}  # the wrapped one once
    assert found["all-to-all"].axes == ("tensor",) and found["all-gather"].axes == ("data",)
    for each in found.values():
        assert each.asynchronous and each.covered
        assert (each.flops_inside, each.kernels_inside) == (2 * 8 * 16 * 32, 1)
    assert found["all-to-all"].sent == 8 * 16 * 2 * 3 / 4
    assert found["all-gather"].sent == 8 * 16 * 2
    assert report.covered_share("all-gather") == 1.0
    assert report.kernels == {"kernel": 1}
    moved = SCHEDULED.replace("%start = ", "%early = ").replace("(%start)", "(%early)")
    lines = moved.splitlines()
    done = next(i for i, line in enumerate(lines) if "all-gather-done" in line)
    start = next(i for i, line in enumerate(lines) if "all-gather-start" in line)
    lines.insert(start + 1, lines.pop(done))  # ends before the product starts
    assert read_program("\n".join(lines), SIZES).covered_share("all-gather") == 0.0


@pytest.mark.parametrize(
    "attributes, axes, size",
    [
        ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}", ("tensor",), 4),
        ("replica_groups=mesh['data'=2,'tensor'=4] {'data','tensor'}", ("data", "tensor"), 8),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("tensor",), 4),
        ("replica_groups=[2,4]<=[8]", ("tensor",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("tensor",), 2),
        ("channel_id=1", ("data", "tensor"), 8),
    ],
)
def test_groups_are_understood_in_every_form(attributes, axes, size):
    assert groups_of(attributes, SIZES) == (axes, size)


def test_types_and_products():
    assert num_bytes("(bf16[8,16]{1,0:T(8,128)}, f8e4m3fn[4]{0}, token[])") == 8 * 16 * 2 + 4
    program = parse(SCHEDULED)
    assert program.is_scheduled
    dot = program.computations["product"][-1]
    assert product_flops(dot, program.types("product")) == 2 * 8 * 16 * 32
    assert executions(program)[0]["product"] == 1
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f { }")


def test_flops_of_kernels_are_those_of_their_shapes():
    def of(source, result, **operands):
        names = ", ".join(f"%{name}" for name in operands)
        text = "".join(f"  %{n} = {t} parameter(0)\n" for n, t in operands.items())
        call = f'custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/{source}"}}'
        program = (
            f"ENTRY %m () -> x {{\n{text}  ROOT %k = {result} custom-call({names}), {call}\n}}\n"
        )
        return read_program(program, SIZES).kernel_flops

    fp8 = "f8e4m3fn"
    assert of("jit(scaled_matmul)/kernel", "bf16[8,6]", a=f"{fp8}[8,128]", b=f"{fp8}[1,6,128]") == (
        2 * 8 * 6 * 128
    )
    rows, weights = f"{fp8}[256,128]", f"{fp8}[4,6,128]"
    assert of("jit(grouped_matmul)/kernel", "bf16[256,6]", a=rows, b=weights) == 2 * 256 * 6 * 128
    # Each of 256 rows is in one of 4 groups.
    for leading in ("", "1,"):  # layers of a stack may lead
        result = f"f32[{leading}4,6,7]"
        wgrad = of("jit(grouped_wgrad)/kernel", result, a=f"{fp8}[6,256]", b=f"{fp8}[7,256]")
        assert wgrad == 2 * 6 * 7 * 256
    # Left in an array for 3 layers, with its squares by tiles of 2 rows beside it; dense ones, too.
    into = "(f32[4,3,2], f32[3,4,6,7])"
    assert of("jit(grouped_wgrad_into)/kernel", into, a=f"{fp8}[6,256]", b=f"{fp8}[7,256]") == wgrad
    into = "(f32[1,3,2], f32[3,1,6,7])"
    assert of("jit(scaled_wgrad)/kernel", into, a=f"{fp8}[6,256]", b=f"{fp8}[7,256]") == wgrad
    # In BF16 rows are the first dim, as the products that made them left them.
    wgrad = of("jit(grouped_wgrad)/kernel", "f32[1,4,6,7]", a="bf16[256,6]", b="bf16[256,7]")
    assert wgrad == 2 * 6 * 7 * 256
    dgrad = of("jit(grouped_dgrad)/kernel", "bf16[256,6]", a="bf16[256,128]", b="bf16[4,128,6]")
    assert dgrad == 2 * 256 * 6 * 128
    q, kv, o = "bf16[1,256,2,24]", "bf16[1,256,2,32]", "(bf16[1,256,2,16], f32[1,2,256])"
    forward = of("attention_forward", o, q=q, kv=kv)
    assert forward == 2 * 2 * (256 * (256 + 128) / 2) * (24 + 16)
    assert of("jit(quantize_rows)/kernel", f"{fp8}[8,128]", a="bf16[8,128]") == 0


def test_flops_of_kernels_for_tpus_are_those_of_their_shapes():
    def of(source, result, *operands):
        names = ", ".join(f"%x{n}" for n in range(len(operands)))
        text = "".join(f"  %x{n} = {t} parameter({n})\n" for n, t in enumerate(operands))
        call = f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{source}"}}'
        body = f"{text}  ROOT %k = {result} custom-call({names}), {call}\n"
        report = read_program(f"ENTRY %m () -> x {{\n{body}}}\n", SIZES)
        assert sum(report.kernels.values()) == 1
        return report.kernel_flops

    groups, rows = "s32[4]", "bf16[256,128]"
    assert of("shard_map", "bf16[256,6]", groups, rows, "bf16[4,6,128]") == 2 * 256 * 6 * 128
    assert of("shard_map", "f32[4,6,7]", groups, "bf16[6,256]", "bf16[7,256]") == 2 * 6 * 7 * 256
    q, kv, shared, o = (
        "bf16[1,2,1024,24]",
        "bf16[1,2,1024,32]",
        "bf16[1,1024,8]",
        "bf16[1,2,1024,16]",
    )
    scores = 2 * 1024 * (1024 + 512) / 2
    forward = of("attention_forward", f"({o}, f32[1,2,1024,1])", "s32[1]", q, kv, shared)
    assert forward == 2 * scores * (24 + 16)
    backward = ("s32[1]", q, kv, shared, o, "f32[1,2,1024,1]")
    assert of("attention_key_gradients", f"({kv}, {shared})", *backward) == 2 * forward
    assert of("attention_query_gradients", q, *backward) == 2 * scores * (2 * 24 + 16)
    assert of("copy", "bf16[8]", groups) == 0
    turned, kept = "(f8e4m3fn[128,256], f32[2,1,128])", ("f8e4m3fn[256,128]", "f32[1,1,256]")
    assert of("jit(quantize_transposed)/quantize_tiles/pallas_call", turned, groups, *kept) == 0


def test_a_loop_of_a_tpu_program_is_counted_by_its_condition():
    """XLA for TPUs writes no trip counts."""
    text = """
%cond (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(58)
  %p = (s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %t = (s32[]) tuple(%next)
}

ENTRY %m (a: (s32[])) -> (s32[]) {
  %a = (s32[]) parameter(0)
  ROOT %w = (s32[]) while(%a), condition=%cond, body=%body
}
"""
    counts, (loop,) = executions(parse(text))
    assert counts["body"] == 29 and loop.known
    for other in ("direction=GT", "direction=NE"):
        counts, (loop,) = executions(parse(text.replace("direction=LT", other)))
        assert counts["body"] == 1 and not loop.known
