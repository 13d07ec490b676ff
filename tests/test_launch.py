"""The recipes in launch/ give options that exist, and what the processes look for."""

import re
import subprocess
from pathlib import Path

import yaml

from dsv3_jax import cli
from dsv3_jax.config import DistributedConfig
from dsv3_jax.parallel.hosts import JOBSET_PORT, Processes, find_processes

ROOT = Path(__file__).parent.parent
SBATCH = (ROOT / "launch/slurm.sbatch").read_text()
JOBSET = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())


def parsed(argv):
    return cli.parse_config(argv, default_config=ROOT / "configs/deepseek_v3.py", description="")


def test_slurm_starts_one_process_a_host_with_options_that_exist():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH, re.M))
    assert directives["ntasks-per-node"] == "1"
    command = SBATCH.split("srun")[-1].split('"$@"')[0].replace("\\\n", " ")
    command = command.replace('"$SLURM_JOB_NUM_NODES"', directives["nodes"])
    argv = command.split("./run train ")[1].split()
    config = parsed(argv)
    assert config.mesh.num_devices == int(directives["nodes"]) * int(directives["gpus-per-node"])
    assert config.watchdog.exit
    number, seconds = re.fullmatch(r"(\w+)@(\d+)", directives["signal"]).groups()
    assert number == "TERM" and int(seconds) >= 120
    assert subprocess.run(["bash", "-n", ROOT / "launch/slurm.sbatch"]).returncode == 0


def test_the_slurm_recipe_names_files_that_exist():
    for name in re.findall(r"(?:configs|launch|dsv3_jax)/[\w/.]+\w", SBATCH):
        assert (ROOT / name).exists(), name


def test_jobset_gives_options_that_exist_and_numbers_that_agree(monkeypatch):
    [job] = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    monkeypatch.chdir(ROOT)
    assert container["command"] == ["./run", "train"]
    config = parsed(container["args"])
    hosts, gpus = spec["completions"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["completionMode"] == "Indexed" and job["replicas"] == 1
    assert spec["parallelism"] == config.distributed.num_processes == hosts
    assert config.mesh.num_devices == hosts * gpus
    assert container["ports"] == [{"containerPort": JOBSET_PORT}]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert any(config.run_dir.startswith(mount + "/") for mount in mounts)


def test_jobset_pods_find_each_other():
    [job] = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]["template"]["spec"]["containers"][0]
    values = {
        "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": JOBSET["metadata"]["name"],
        "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']": job["name"],
    }
    environ = {
        e["name"]: values[e["valueFrom"]["fieldRef"]["fieldPath"]]
        for e in spec["env"]
        if "valueFrom" in e
    }
    environ["JOB_COMPLETION_INDEX"] = "1"  # set by Kubernetes
    found = find_processes(DistributedConfig(num_processes=2), environ)
    assert found == Processes(f"dsv3-hosts-0-0.dsv3:{JOBSET_PORT}", 2, 1)
