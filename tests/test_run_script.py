"""./run: what it sets up, when, and what it says; with a stand-in for Python, without network."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Answers the few calls ./run makes of a Python and writes each to $CALLS. FAKE_VERSION "ok", "bare"
# (no ensurepip) or "old" goes with the version; FAKE_UV=fail and FAKE_PIP=fail break installers.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-c "*find_spec*venv*) echo "${FAKE_VERSION:-3.11.7 ok}" ;;
    "-c "*platform*) echo 3.11.7 ;;
    "-c import "*) echo import >>"$CALLS" ;;
    "-m venv "*) echo venv >>"$CALLS"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m uv pip install "*)
        echo "uv $*" >>"$CALLS"
        sleep "${FAKE_SECONDS:-0}"
        [ "${FAKE_UV:-}" != fail ] ;;
    "-m pip install "*) echo "pip $*" >>"$CALLS"; [ "${FAKE_PIP:-}" != fail ] || {
        echo "ERROR: no matching distribution"; exit 1; } ;;
    *) echo "run $*"; exit "${FAKE_EXIT:-0}" ;;
esac
"""
TOOLS = ["awk", "cat", "cksum", "cp", "dirname", "flock", "mkdir", "mv", "rm", "sed", "sh", "sleep"]
TOOLS += ["id", "tail", "tr", "uname"]


class Checkout:
    """A copy of what ./run reads, with a PATH on which nothing but the stand-in is a Python."""

    def __init__(self, folder: Path):
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        for path in (self.root / "tests", self.root / "requirements", self.bin):
            path.mkdir(parents=True)
        for name in ("run", "pyproject.toml", "requirements/py311.txt", "requirements/py312.txt"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "train.py").touch()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.add_tool("python3", FAKE_PYTHON)
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "CALLS": str(self.calls)}

    def add_tool(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "run"), *args],
            env=self.env | env,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=20)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def made(self) -> list[str]:
        """The calls since this was last asked; of installations the installer's name only."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]


FIRST_SET_UP = ["venv", "pip", "uv", "import"]  # pip brings uv, uv brings the rest


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_help_lists_the_commands_and_sets_nothing_up(checkout):
    done = checkout.run("--help")
    assert done.returncode == 0
    for command in ("train", "infer", "test", "bench", "notebook"):
        assert f"  {command} " in done.stdout
    assert checkout.made() == []


def test_no_command_shows_the_usage_and_exits_2(checkout):
    done = checkout.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ./run COMMAND")


@pytest.mark.parametrize("typo, meant", [("trian", "train"), ("tests", "test"), ("Infer", "infer")])
def test_an_unknown_command_names_the_nearest(checkout, typo, meant):
    done = checkout.run(typo)
    assert done.returncode == 2
    assert f"unknown command '{typo}', did you mean '{meant}'?" in done.stderr


def test_a_word_near_to_nothing_gets_no_guess(checkout):
    done = checkout.run("quantize")
    assert done.returncode == 2
    assert "did you mean" not in done.stderr


def test_a_missing_script_is_said_before_anything_is_installed(checkout):
    done = checkout.run("infer")
    assert done.returncode == 1
    assert "has no infer.py" in done.stderr
    assert checkout.made() == []


def test_benchmarks_are_listed_and_near_names_suggested(checkout):
    benchmarks = checkout.root / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "bench_decode.py").touch()
    assert "  decode\n" in checkout.run("bench").stdout
    done = checkout.run("bench", "decoed")
    assert done.returncode == 2
    assert "did you mean 'decode'?" in done.stderr
    assert (
        checkout.run("bench", "decode", "--quick").stdout
        == "run -m benchmarks.bench_decode --quick\n"
    )


def test_the_first_call_sets_up_and_the_second_only_runs(checkout):
    assert checkout.run("train", "--seed", "1").stdout == f"run {checkout.root}/train.py --seed 1\n"
    assert checkout.made() == FIRST_SET_UP
    again = checkout.run("train", "--seed", "2")
    assert (again.stdout, again.stderr) == (f"run {checkout.root}/train.py --seed 2\n", "")
    assert checkout.made() == []


def test_arguments_pass_through_unchanged(checkout):
    done = checkout.run("test", "tests/foo.py", "-k", "a or  b", "")
    assert done.stdout == "run -m pytest tests/foo.py -k a or  b \n"


ALL_OF_THEM = [[], ["-q"], ["--slow", "-m", "slow"], ["--durations=9", "-x", "--color=yes"]]
# One process where tests are named, or where it is asked for: a debugger, another number.
NOT_SPREAD = [["tests/here.py"], ["tests/here.py::test_a"], ["-q", "tests"], ["-k", "name"]]
NOT_SPREAD += [["-n", "2"], ["-n0"], ["-p", "no:xdist"], ["--pdb"], ["-s"], ["--version"], ["--lf"]]


@pytest.mark.parametrize("words", ALL_OF_THEM + NOT_SPREAD, ids=" ".join)
def test_all_tests_are_spread_over_the_cores_and_named_ones_are_not(checkout, words):
    (checkout.root / "tests/here.py").touch()
    spread = "-n auto --dist worksteal " if words in ALL_OF_THEM else ""
    said = checkout.run("test", *words).stdout.rstrip()
    assert said == f"run -m pytest {spread}{' '.join(words)}".rstrip()


@pytest.mark.parametrize(
    "cores, gigabytes, workers", [(2, 23, 2), (64, 64, 36), (8, 14, 2), (1, 64, 1), (4, 1, 1)]
)
def test_a_worker_for_each_core_that_has_the_memory(
    cores, gigabytes, workers, request, monkeypatch, capsys
):
    pytest.importorskip("xdist")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    sizes = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": gigabytes * 10**6}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(Path, "read_text", lambda path: "max\n")  # a container without a limit
    found = request.config.hook.pytest_xdist_auto_num_workers(config=request.config)
    assert found == workers  # conftest.py's comes before xdist's own
    assert f"{workers} processes run the tests: {cores} cores" in capsys.readouterr().err


def test_the_commands_exit_code_is_the_scripts(checkout):
    assert checkout.run("test", FAKE_EXIT="143").returncode == 143


def test_what_train_needs_serves_infer_and_test_serves_both(checkout):
    (checkout.root / "infer.py").touch()
    checkout.run("train")
    checkout.made()
    checkout.run("infer")
    assert checkout.made() == []
    shutil.rmtree(checkout.root / ".venv")
    checkout.run("test")
    checkout.made()
    checkout.run("train")
    assert checkout.made() == []


def test_an_extra_of_another_command_is_added_and_kept(checkout):
    checkout.run("train", DSV3_ACCELERATOR="tpu")
    checkout.made()
    checkout.run("test")
    (line,) = [line for line in checkout.calls.read_text().splitlines() if line.startswith("uv")]
    assert line.endswith("[dev,plot,tokenizers,tpu]")
    assert checkout.made() == ["pip", "uv", "import"]  # the environment itself is kept
    checkout.run("train")
    assert checkout.made() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/py312.txt"])
def test_changed_requirements_install_again(checkout, name):
    checkout.run("train")
    checkout.made()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run("train")
    assert checkout.made() == ["pip", "uv", "import"]


def test_another_python_makes_the_environment_anew(checkout):
    checkout.run("train")
    checkout.made()
    other = checkout.add_tool("my python", FAKE_PYTHON)
    checkout.run("train", PYTHON=str(other))
    assert checkout.made() == FIRST_SET_UP
    checkout.run("train", PYTHON=str(other))
    checkout.run("train")
    assert checkout.made() == []


@pytest.mark.parametrize(
    "version, pins", [("3.11.2", "py311"), ("3.12.1", "py312"), ("3.14.0", "py312")]
)
def test_constraints_follow_the_python_version(checkout, version, pins):
    checkout.run("train", FAKE_VERSION=f"{version} ok")
    (line,) = [line for line in checkout.calls.read_text().splitlines() if line.startswith("uv")]
    assert f"-c {checkout.root}/requirements/{pins}.txt" in line


@pytest.mark.parametrize(
    "env, extras", [({}, "plot,tokenizers"), ({"DSV3_ACCELERATOR": "tpu"}, "plot,tokenizers,tpu")]
)
def test_the_accelerators_extra_is_installed(checkout, env, extras):
    checkout.run("train", **({"DSV3_ACCELERATOR": "cpu"} | env))
    assert f"[{extras}]" in checkout.calls.read_text()


def test_an_nvidia_driver_brings_the_cuda_extra(checkout):
    checkout.add_tool("nvidia-smi", "#!/bin/sh\n")
    checkout.run("train")
    assert "[plot,tokenizers,cuda13]" in checkout.calls.read_text()


def test_pip_installs_where_uv_cannot_and_says_so(checkout):
    done = checkout.run("train", FAKE_UV="fail")
    assert done.returncode == 0
    assert "uv could not install; using pip" in done.stderr
    assert checkout.made() == ["venv", "pip", "uv", "pip", "import"]


def test_a_failed_installation_shows_its_end_and_is_not_taken_as_finished(checkout):
    done = checkout.run("train", FAKE_UV="fail", FAKE_PIP="fail")
    assert done.returncode == 1
    assert "ERROR: no matching distribution" in done.stderr
    assert "Traceback" not in done.stderr
    checkout.made()
    assert checkout.run("train").returncode == 0
    assert checkout.made() == FIRST_SET_UP


def test_an_interrupted_set_up_is_not_taken_as_finished(checkout):
    first = checkout.start("train", FAKE_SECONDS="20")
    wait_until(lambda: checkout.calls.exists() and "uv" in checkout.calls.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    checkout.made()
    assert checkout.run("train").returncode == 0
    assert checkout.made() == FIRST_SET_UP


@pytest.mark.parametrize("with_flock", [True, False])
def test_two_calls_at_once_set_up_once(checkout, with_flock):
    if not with_flock:
        (checkout.bin / "flock").unlink(missing_ok=True)
    calls = [checkout.start("train", FAKE_SECONDS="0.5") for _ in range(2)]
    outputs = [call.communicate(timeout=20) for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert checkout.made() == FIRST_SET_UP
    assert sum("waiting for another set-up" in err for _, err in outputs) == 1


def test_a_lock_whose_owner_died_is_taken_over(checkout):
    (checkout.bin / "flock").unlink(missing_ok=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock = checkout.root / ".cache" / "set-up.lock.d"
    lock.mkdir(parents=True)
    (lock / "pid").write_text(f"{dead.pid}\n")
    assert checkout.run("train").returncode == 0
    assert not lock.exists()


def test_a_foreign_environment_is_left_alone(checkout):
    mine = checkout.root / ".venv" / "mine"
    mine.parent.mkdir()
    mine.touch()
    done = checkout.run("train")
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert mine.exists()
    assert checkout.run("train", DSV3_VENV=".cache/other").returncode == 0


def test_the_environment_of_another_checkout_is_left_alone(checkout, tmp_path):
    assert checkout.run("train").returncode == 0
    other = Checkout(tmp_path / "second")
    checkout.made()
    refused = other.run("train", DSV3_VENV=str(checkout.root / ".venv"))
    assert refused.returncode == 2
    assert f"belongs to the checkout {checkout.root}" in refused.stderr
    assert checkout.made() == other.made() == []
    (checkout.root / "run").unlink()  # moved or removed: its environment may be taken over
    assert other.run("train", DSV3_VENV=str(checkout.root / ".venv")).returncode == 0


def test_a_python_without_ensurepip_names_the_package(checkout):
    done = checkout.run("train", FAKE_VERSION="3.11.2 bare")
    assert done.returncode == 1
    assert "apt install python3.11-venv" in done.stderr


@pytest.mark.parametrize("version", ["3.9.18 old", "3.10.13 old"])
def test_an_old_python_is_refused_with_its_version(checkout, version):
    done = checkout.run("train", FAKE_VERSION=version)
    assert done.returncode == 1
    assert f"python3 is {version.split()[0]}" in done.stderr
    assert "needs Python 3.11 or newer" in done.stderr


def test_a_shim_that_starts_nothing_is_passed_over(checkout):
    checkout.add_tool("python3", "#!/bin/sh\nexit 127\n")
    checkout.add_tool("python3.12", FAKE_PYTHON)
    assert checkout.run("train").returncode == 0


def test_no_python_at_all_is_one_clear_message(checkout):
    (checkout.bin / "python3").unlink()
    done = checkout.run("train")
    assert done.returncode == 1
    assert "No Python 3 was found; install one" in done.stderr


def test_a_wrong_PYTHON_is_named(checkout):
    done = checkout.run("train", PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "PYTHON=/nowhere/python does not run" in done.stderr


def test_DSV3_PYTHON_is_used_as_it_is(checkout):
    script = '#!/bin/sh\ncase $1 in -c) ;; *) echo "$PYTHONPATH: $*" ;; esac\n'
    image = checkout.add_tool("image-python", script)
    done = checkout.run("train", "--seed", "1", DSV3_PYTHON=str(image))
    assert done.stdout == f"{checkout.root}: {checkout.root}/train.py --seed 1\n"
    assert not (checkout.root / ".venv").exists()


def test_DSV3_PYTHON_may_be_a_real_python(checkout):
    (checkout.root / "train.py").write_text("import sys, dsv3_jax; print(sys.argv[1:])")
    (checkout.root / "dsv3_jax").mkdir()
    done = checkout.run("train", "--x", "a b", DSV3_PYTHON=sys.executable)
    assert (done.stdout, done.stderr) == ("['--x', 'a b']\n", "")


def test_what_DSV3_PYTHON_lacks_is_named(checkout):
    image = checkout.add_tool("image-python", "#!/bin/sh\necho tyro rich\n")
    done = checkout.run("train", DSV3_PYTHON=str(image))
    assert done.returncode == 1
    assert "lacks: tyro rich" in done.stderr


def test_notebooks_open_in_their_folder_with_a_home_that_can_be_written(checkout):
    (checkout.root / "notebooks").mkdir()
    (checkout.root / ".cache").mkdir()
    script = '#!/bin/sh\ncase $1 in -c) ;; *) echo "$PWD $HOME $*" ;; esac\n'
    env = {"DSV3_PYTHON": str(checkout.add_tool("image-python", script))}
    done = checkout.run("notebook", "1_mla.ipynb", "--port", "9000", **env)
    folder, home, *words = done.stdout.split()
    assert (folder, home) == (f"{checkout.root}/notebooks", checkout.env["HOME"])
    assert words[:2] == ["-m", "jupyterlab"] and words[-3:] == ["1_mla.ipynb", "--port", "9000"]
    assert ("--allow-root" in words) == (os.getuid() == 0)
    done = checkout.run("notebook", HOME="/nonexistent", **env)
    home = f"{checkout.root}/.cache/home"
    assert done.stdout.split()[1] == home
    told = f"run: HOME=/nonexistent cannot be written: settings and caches go to {home}"
    assert told in done.stderr.splitlines()


def test_a_container_serves_to_outside(checkout):
    (checkout.root / "notebooks").mkdir()
    image = checkout.add_tool("image-python", '#!/bin/sh\ncase $1 in -c) ;; *) echo "$*" ;; esac\n')
    env = {"DSV3_PYTHON": str(image), "KUBERNETES_SERVICE_HOST": "10.0.0.1", "DISPLAY": ":0"}
    assert "--ip=0.0.0.0 --no-browser" in checkout.run("notebook", **env).stdout
    missing = checkout.add_tool("bare-python", "#!/bin/sh\necho jupyterlab\n")
    done = checkout.run("notebook", DSV3_PYTHON=str(missing))
    assert done.returncode == 1 and "lacks: jupyterlab" in done.stderr


def test_a_second_call_costs_under_a_tenth_of_a_second(checkout):
    checkout.run("train")

    def once() -> float:
        started = time.perf_counter()
        checkout.run("train")
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.1


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_slow_tests_that_ci_names_are_there():
    for line in (ROOT / ".ci" / "slow").read_text().splitlines():
        if line.startswith("#"):
            continue
        path, _, name = line.partition("::")
        text = (ROOT / path).read_text()  # fails where there is none
        assert not name or f"def {name.partition('[')[0]}(" in text, line
        assert "mark.slow" in text, line
