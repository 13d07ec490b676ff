"""`compile`: programs for devices that are not here, what is said of them, and of bad input."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax import cli
from dsv3_jax.analysis.compiled import Buffer
from dsv3_jax.analysis.hardware import ACCELERATORS
from dsv3_jax.analysis.planner import plan_training
from dsv3_jax.compiling import command, programs, remedies, targets
from dsv3_jax.compiling.apart import Task, _why, compile_apart
from dsv3_jax.compiling.command import CompileOptions
from dsv3_jax.compiling.naming import WeightNames, describe, pass_of
from dsv3_jax.compiling.picture import draw
from dsv3_jax.compiling.report import Report, _memory_asked, _refused, compile_program
from dsv3_jax.compiling.text import leaves_host, lines
from dsv3_jax.config import (
    ExpertParallelConfig,
    ParallelConfig,
    RunError,
    ShardingConfig,
    UserError,
    load_config,
)
from dsv3_jax.parallel.mesh import AXES
from tests.helpers import tiny_config, tiny_model

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = tiny_model(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def on_cpus() -> programs.Built:
    """A training step on eight CPU devices, in two micro-batches of eight rows."""
    config = dataclasses.replace(
        tiny_config(TINY, batch_size=16, micro_batch_size=8),
        mesh=ParallelConfig(data=4, node=2),
        sharding=ShardingConfig(state="fsdp"),
    )
    return programs.training(config, programs.layout_on(config, jax.devices()[:8]))


@pytest.fixture(scope="module")
def report(on_cpus, tmp_path_factory) -> Report:
    target = targets.Target("eight CPUs", "cpu", (8,), 8, ACCELERATORS["h200"])
    return compile_program(on_cpus, target, tmp_path_factory.mktemp("hlo") / "step.txt")


def test_a_report_says_what_a_device_holds_and_sends(on_cpus, report):
    held = sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(on_cpus.arguments))
    assert sum(report.held.values()) == held
    assert held <= report.arguments < 1.2 * held + 4096  # rows and settings come besides
    assert report.arguments < report.peak and report.fits
    loops = {loop.source: loop.trips for loop in report.program.loops}
    assert loops["jit(train_step)/while"] == 2  # micro-batches
    assert {axis for axes, _ in report.program.sent_by_axes() for axis in axes} == {"data", "node"}
    text = "\n".join(lines(report, ACCELERATORS["h200"]))
    assert "eight CPUs: 8 x h200; mesh data 4, node 2" in text
    assert "data + node" in text and "peak / capacity: 0.0 %" in text


def _bytes_on_a_device(leaf) -> int:
    return jnp.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).nbytes


def test_the_report_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(report, ACCELERATORS["h200"], tmp_path / "step.png").stat().st_size > 10_000


def test_buffers_are_named_by_what_they_are_in_the_model(on_cpus):
    names = WeightNames(on_cpus.arguments["state"]["params"], on_cpus.layout)
    D, V = TINY.hidden_size, TINY.vocab_size
    source = "jit(train_step)/while/body/transpose(jvp())/Block/mlp/experts/shard_map/psum"
    assert names.of((V, D)).startswith("embed_tokens")
    assert describe(Buffer(1, f"f32[{V},{D}]{{1,0}}", "all-gather", "x/jvp()/y"), names).endswith(
        "forward (y)"
    )
    other = describe(Buffer(1, "f32[977,31]", "fusion", source), names)
    assert other == "routed experts, backward (psum)"
    assert pass_of("jit(f)/transpose(jvp())/checkpoint/rematted_computation/x") == "computed again"


def test_a_program_that_a_tpu_refuses_is_told_by_its_allocations():
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 26.44G of 15.75G hbm. Exceeded hbm capacity by 10.69G.\n\n"
        "Largest program allocations in hbm:\n\n"
        "  1. Size: 4.00G\n     Shape: f32[129280,7168]{1,0}\n     Unpadded size: 4.00G\n\n"
        '  2. Size: 2.50G\n     Operator: op_type="dot" op_name="jit(train_step)/jvp()/head/dot" '
        'source_file="a.py"\n     Shape: bf16[1024]{0}\n     Allocation type: HLO temp\n'
    )
    costs = {
        "topology": "v5e:2x2",
        "num_devices": 4,
        "mesh": {"data": 4},
        "capacity": 16e9,
        "held": {"weights": 5},
        "choices": [],
        "findings": [],
    }
    asked = _memory_asked(said, 5)
    assert asked == int(26.44 * 2**30)
    report = _refused(said, asked, 5, **costs)
    assert not report.fits and report.peak == int(26.44 * 2**30)
    found = [(each.num_bytes, each.type, each.what) for each in report.buffers]
    assert found == [
        (4 * 2**30, "f32[129280,7168]{1,0}", "an argument"),
        (2.5 * 2**30, "bf16[1024]{0}", "jit(train_step)/jvp()/head/dot"),
    ]
    assert "does not" not in "\n".join(lines(report, ACCELERATORS["tpu-v5e"]))


def test_a_kernel_that_exceeds_a_core_s_own_memory_is_no_program_that_does_not_fit():
    """It is an error that names the kernel: no mesh and no smaller batch mends it."""
    said = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space "
        "vmem while allocating on stack for %scaled_matmul.1. Scoped allocation with size 18.00M "
        "and limit 16.00M exceeded scoped vmem limit by 2.00M."
    )
    assert _memory_asked(said, 5) is None
    assert _memory_asked("INTERNAL: 3.00G exceeds the requirements", 5) is None


def test_temporaries_that_alone_exceed_a_device_are_added_to_its_arguments():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (35.50G) exceeds available HBM (15.75G). HLO module: jit_train_step"
    )
    assert _memory_asked(said, 5) == 35.5 * 2**30 + 5
    assert _memory_asked("RESOURCE_EXHAUSTED: of something else", 5) == 0


def test_remedies_come_cheapest_first_and_are_valid():
    config = dataclasses.replace(
        tiny_config(TINY, batch_size=32, micro_batch_size=16), mesh=ParallelConfig(data=8)
    )
    options = [remedy.option for remedy in remedies.of_training(config)]
    assert options == [
        "--optimizer.moment-dtype bfloat16",
        "--sharding.state fsdp",
        "--train.micro-batch-size 8",
        "--train.remat v3",
    ]
    assert all(not remedy.config.problems() for remedy in remedies.of_training(config))


def test_remedies_of_serving_are_those_that_its_program_takes():
    config = dataclasses.replace(tiny_config(TINY), mesh=ParallelConfig(data=8))

    def options(batch: int, decode: bool) -> list[str]:
        what = programs.Serving(batch, 64, fp8_weights=False)
        return [remedy.option for remedy in remedies.of_serving(config, what, decode)]

    assert options(16, decode=True) == ["--fp8-weights True", "--fp8-cache True", "--batch 8"]
    assert options(16, decode=False) == ["--fp8-weights True", "--batch 8"]
    assert options(8, decode=False) == ["--fp8-weights True"]  # 4 do not spread over 8 devices


def test_devices_along_inner_axes_share_a_host():
    mesh = dict(zip(AXES, (1, 32, 8, 8, 1, 1)))
    h200 = ACCELERATORS["h200"]
    assert not leaves_host(("local",), mesh, h200)
    assert leaves_host(("node",), mesh, h200) and leaves_host(("data", "local"), mesh, h200)
    assert not leaves_host(("data",), mesh, ACCELERATORS["tpu-v5p"])  # one torus


@pytest.mark.parametrize(
    "name, platform, count",
    [("h200:256x8", "gpu", 2048), ("v5p:8x16x16", "tpu", 2048), ("tpu7x:4x4x8", "tpu", 256)],
)
def test_topologies_are_understood(name, platform, count):
    target = targets.parse_topology(name)
    assert (target.platform, target.num_devices) == (platform, count)


@pytest.mark.parametrize("name", ["h20:1x8", "h200", "h200:8", "v5p:8x16", "h200:0x8", "v6e:axb"])
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(UserError, match=r"h200:256x8 \(hosts x GPUs of each\)"):
        targets.parse_topology(name)


def test_a_missing_compiler_comes_with_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    version = jax.__version__
    with pytest.raises(UserError, match=rf"aot-gpu.*jax\[cuda13-local\]=={version}"):
        targets.devices_of(targets.parse_topology("h200:1x8"))
    with pytest.raises(UserError, match=rf"aot-tpu.*jax\[tpu\]=={version}"):
        targets.devices_of(targets.parse_topology("v5p:2x2x1"))


def test_a_mesh_that_does_not_multiply_out_says_what_would():
    config = dataclasses.replace(tiny_config(TINY), mesh=ParallelConfig(data=3, node=2))
    with pytest.raises(UserError, match=r"= 6 devices, and the topology has 8: use --mesh.data 4"):
        programs.layout_on(config, jax.devices()[:8])
    config = dataclasses.replace(config, mesh=ParallelConfig(data=2, tensor=3))
    with pytest.raises(UserError, match=r"which 3 .* does not divide"):
        programs.layout_on(config, jax.devices()[:8])


def test_serving_programs_check_their_sizes():
    config = dataclasses.replace(tiny_config(TINY), mesh=ParallelConfig(node=8))
    layout = programs.layout_on(config, jax.devices()[:8])
    with pytest.raises(UserError, match=r"batch=12 .* multiple of the 8 devices .* use 16"):
        programs.serving(config, layout, programs.Serving(12), decode=True)
    with pytest.raises(UserError, match="context=100 must be a multiple of 64"):
        programs.serving(config, layout, programs.Serving(8, 100), decode=True)
    with pytest.raises(UserError, match=r"11 places .* multiple of the 8 devices"):
        programs.serving(config, layout, programs.Serving(8, 64, 3), decode=True)
    halves = programs.Serving(8, 64, micro_batches=2)
    with pytest.raises(UserError, match="or 2 with 8 sequences a multiple of 2 x 8 groups"):
        programs.serving(config, layout, halves, decode=True)
    alone = programs.layout_on(tiny_config(TINY), jax.devices()[:1])
    with pytest.raises(UserError, match="experts on several devices"):
        programs.serving(tiny_config(TINY), alone, halves, decode=True)


def test_what_serves_need_not_train():
    """Experts with redundant ones are spread, and no rows of training divide over the devices."""
    config = load_config("deepseek_v3")
    config = dataclasses.replace(config, mesh=ParallelConfig(node=40, local=8))
    options = CompileOptions(CONFIGS, "h200:40x8", "decode", redundant_experts=64)
    assert options.validate(config) == config
    with pytest.raises(UserError, match="n_routed_experts=256 and 32 redundant ones must be"):
        dataclasses.replace(options, redundant_experts=32).validate(config)
    with pytest.raises(UserError, match="a micro-batch of 128 sequences"):
        CompileOptions(CONFIGS, "h200:40x8").validate(config)


def test_an_option_that_nobody_has_is_refused(capsys):
    argv = ["compile", "--config", str(CONFIGS / "tiny.py"), "--topology", "h200:1x8"]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--mesh.dtaa", "8"])
    assert "--mesh.data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program, options, said",
    [
        ("train", ["--context", "64"], "--context is for --program prefill or decode"),
        ("train", ["--no-fp8-weights"], "--fp8-weights is for --program prefill or decode"),
        ("prefill", ["--fp8-cache"], "--fp8-cache is for --program decode"),
        ("decode", ["--plan", "2"], "--plan is for --program train"),
        ("train", ["--plan", "2", "--hlo", "x"], "--hlo is for one program"),
        ("train", ["--plan", "2", "--plot", "x"], "--plot is for one program"),
        ("train", ["--plan", "2", "--remedies", "1"], "--remedies is for one program"),
        ("train", ["--plan", "-1"], "--plan -1 must not be negative"),
    ],
)
def test_an_option_that_the_program_would_not_read_is_refused(program, options, said):
    argv = ["compile", "--config", str(CONFIGS / "tiny.py"), "--topology", "h200:1x8"]
    with pytest.raises(UserError, match=said):
        cli.main([*argv, "--program", program, *options])


def _aborting(planned):
    raise RunError("XLA aborts")


def test_the_best_plans_that_training_runs_are_compiled(report, capsys, monkeypatch, tmp_path):
    config = tiny_config(TINY, batch_size=16, micro_batch_size=8)
    options = command.CompileOptions(CONFIGS / "tiny.py", "h200:1x8", plan=2)
    target, asked = targets.parse_topology("h200:1x8"), []

    def compiled(planned):
        asked.append(planned)
        return report

    assert command._planned(options, config, target, compiled) == 0
    assert [planned.mesh.num_devices for planned in asked] == [8, 8]
    assert asked[0] != asked[1] and not any(planned.problems() for planned in asked)
    assert "plans, compiled" in capsys.readouterr().out

    def refused_once(planned):
        if planned == asked[0]:
            raise RunError("no program for h200:1x8: XLA aborts, a.cc:1] Check failed: 16 == 64")
        return compiled(planned)

    out = tmp_path / "plans.json"
    kept = dataclasses.replace(options, json=out)
    del asked[1:]
    assert command._planned(kept, config, target, refused_once) == 0
    assert len(asked) == 3 and len(set(map(str, asked))) == 3  # the next is taken in its place
    assert "  left out: no program for h200:1x8: XLA aborts" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert [sorted(each) for each in results] == [["plan", "refused"], *[["plan", "report"]] * 2]
    with pytest.raises(RunError, match=r"none of \d plans for h200:1x8 compiles"):
        command._planned(options, config, target, _aborting)

    search = plan_training(config, target.accelerator, 8)
    mesh = ParallelConfig(pipe=2, data=4)
    estimated = dataclasses.replace(search.plans[0], mesh=mesh, schedule="dualpipe")
    found = dataclasses.replace(search, plans=[estimated, *search.plans])
    monkeypatch.setattr(command, "plan_training", lambda *_, **__: found)
    del asked[:]
    command._planned(options, config, target, compiled)
    assert "left out: plans under dualpipe, which training does not run" in capsys.readouterr().out
    assert asked[0] == search.plans[0].configured(config)
    found = dataclasses.replace(search, plans=[estimated])
    with pytest.raises(UserError, match="none of the best 1 plans can run"):
        command._planned(options, config, target, compiled)


class _Ends:
    """Unpickled, it ends the process that does so."""

    topology = "h200:256x8"

    def __init__(self, how, *arguments):
        self.how = how, arguments

    def __reduce__(self):
        return self.how


def test_a_compiler_that_ends_is_told_in_one_line():
    """In a process of its own: this one goes on."""
    begins = "^no program for h200:256x8: its compiler ended with "
    with pytest.raises(RunError, match=begins + "signal SIGABRT$"):
        compile_apart(_Ends(os.abort))
    with pytest.raises(RunError, match=begins + "exit code 3$"):
        compile_apart(_Ends(os._exit, 3))
    killed = "no program for h200:256x8: its compiler was killed"
    with pytest.raises(RunError, match=killed):
        compile_apart(_Ends(signal.raise_signal, signal.SIGKILL))
    log = (
        "W0000 00:00:1.1 2 spmd_partitioner.cc:652] Involuntary full rematerialization.\n"
        "F0000 00:00:1764.91  71 spmd_partitioner_util.cc:2374] Check failed: a == b (16 vs. 64)\n"
        "*** Check failure stack trace: ***\n    @  0x7f  absl\n"
    )
    assert _why(-signal.SIGABRT, log) == (
        "XLA aborts, spmd_partitioner_util.cc:2374] Check failed: a == b (16 vs. 64)"
    )


def test_what_another_process_raises_is_raised_here():
    with pytest.raises(UserError, match="unknown topology 'h20:1x8'"):
        compile_apart(Task(tiny_config(TINY), "h20:1x8"))


AOT = {
    "h200:1x8": ["--mesh.data", "2", "--mesh.node", "2", "--mesh.local", "2"],
    "v5p:2x2x1": ["--mesh.data", "2", "--mesh.node", "1", "--mesh.local", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", AOT)
def test_a_tiny_model_is_compiled_for_devices_that_are_not_here(topology, tmp_path):
    platform = targets.parse_topology(topology).platform
    if reason := targets.missing(platform):
        pytest.skip(reason)
    out = tmp_path / "report.json"
    argv = ["--config", str(CONFIGS / "tiny.py"), "--topology", topology, "--json", str(out)]
    options = "--sharding.state fsdp --expert-parallel.transport padded --model.num-hidden-layers 1"
    options += " --model.first-k-dense-replace 0 --model.num-nextn-predict-layers 0 "
    options += "--train.batch-size 8 --train.seq-len 64"
    options = options.split()
    assert cli.main(["compile", *argv, *AOT[topology], *options]) == 0
    report = json.loads(out.read_text())
    assert report["fits"] and 0 < report["arguments"] < report["peak"] < report["capacity"]
    assert any(each["op"] == "all-to-all" for each in report["program"]["collectives"])
    assert report["lowering_seconds"] + report["compile_seconds"] < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, node, local, rows",
    [
        ("h200:2x4", 2, 4, "--train.seq-len 512 --model.dtype bfloat16"),
        ("v5p:2x2x1", 2, 2, "--train.seq-len 64"),
    ],
)
def test_rows_of_one_half_travel_over_products_of_the_other(topology, node, local, rows, tmp_path):
    """XLA's own schedule, of two layers in a loop; over each axis 90 % of the bytes are asked."""
    if reason := targets.missing(targets.parse_topology(topology).platform):
        pytest.skip(reason)
    out = tmp_path / "report.json"
    options = f"--topology {topology} --mesh.data 1 --mesh.node {node} --mesh.local {local} "
    options += f"--sharding.state fsdp --train.remat full {rows} "
    options += "--expert-parallel.overlap --expert-parallel.transport padded "
    options += "--expert-parallel.dispatch-format fp8 --expert-parallel.combine-format bf16 "
    options += "--model.num-hidden-layers 2 --model.first-k-dense-replace 0 "
    options += "--model.num-nextn-predict-layers 0 --train.batch-size 16"
    argv = ["--config", str(CONFIGS / "tiny.py"), "--json", str(out), *options.split()]
    assert cli.main(["compile", *argv]) == 0
    collectives = json.loads(out.read_text())["program"]["collectives"]
    for axis in ("node", "local"):
        moved = [e for e in collectives if e["op"] == "all-to-all" and e["axes"] == [axis]]
        sent = [each["sent"] * each["runs"] for each in moved]
        beside = [b for b, e in zip(sent, moved) if e["flops_inside"] or e["kernels_inside"]]
        assert sum(beside) / sum(sent) > 0.9, axis


@pytest.mark.parametrize("path", sorted((CONFIGS / "scale").glob("*.py")), ids=lambda p: p.stem)
def test_a_preset_takes_all_devices_of_the_topology_that_it_names(path):
    config = load_config(path)
    topology = re.search(r"--topology (\S+)", path.read_text())[1]
    assert config.mesh.num_devices == targets.parse_topology(topology).num_devices
    assert config.problems() == []
    assert f"configs/scale/{path.name} " in path.read_text()


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_serving_programs_are_built_as_generate_builds_them(program):
    config = dataclasses.replace(
        tiny_config(TINY),
        mesh=ParallelConfig(node=2, local=2, data=2),
        expert_parallel=ExpertParallelConfig(transport="padded"),
    )
    layout = programs.layout_on(config, jax.devices()[:8])
    what = programs.Serving(
        batch=8, context=64, redundant_experts=4, fp8_weights=program == "decode"
    )
    built = programs.serving(config, layout, what, decode=program == "decode")
    with jax.set_mesh(built.layout.mesh):
        text = built.lower().as_text()
    assert "all_to_all" in text
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(built.arguments["weights"]["params"])}
    assert ("float8_e4m3fn" in kinds) == (program == "decode")
    experts = built.arguments["weights"]["params"]["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert jax.tree.leaves(experts)[0].shape[1] == TINY.n_routed_experts + 4
