"""`python -m dsv3_jax serve` as its users have it: a run trained here, a process, clients."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello"}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The default run, of few steps."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--run-dir", str(run)]
    subprocess.run([*command, "--train.steps", "6"], cwd=ROOT, check=True, timeout=600)
    return run


@pytest.fixture
def server(checkpoint):
    """(the process, its address)."""
    command = [sys.executable, "-m", "dsv3_jax", "serve", "--checkpoint", str(checkpoint)]
    options = ["--speculative", "1", "--port", "0", "--slots", "4", "--max-length", "2048"]
    process = subprocess.Popen(
        [*command, *options, "--prefill-tokens", "64"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("serving tiny at http://127.0.0.1:"), said
        yield process, said.split()[-1].removesuffix("/v1")
    finally:
        process.kill()
        process.wait()


def test_a_checkpoint_trained_here_chats_with_an_openai_client_and_drains(server):
    process, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    how = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**how)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens == 12
    pieces = client.chat.completions.create(**how, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    # As README says it.
    said = subprocess.run(
        ["curl", "-s", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json",
         "-d", json.dumps({"messages": HELLO, "temperature": 0, "max_tokens": 12})],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(said.stdout)["choices"][0]["message"]["content"] == text
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    drafted = [line for line in lines if line.startswith("dsv3_drafts_drafted_total{")]
    assert drafted and float(drafted[0].split()[-1]) > 0, "with speculation on"

    long = {"prompt": "def main(", "max_tokens": 1500, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=120) as stream:
        events = (line[6:] for line in stream.iter_lines() if line.startswith("data: "))
        first = next(events)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{address}/health").status_code == 200:
            pass
        assert httpx.get(f"{address}/health").json()["status"] == "draining"
        late = httpx.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
        rest = list(events)
    assert rest[-1] == "[DONE]" and len(rest) > 100 and json.loads(first)["choices"]
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(timeout=30) == 0


def test_a_second_signal_ends_it_without_waiting(server):
    process, address = server
    long = {"prompt": "def main(", "max_tokens": 1500, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=120) as stream:
        events = (line[6:] for line in stream.iter_lines() if line.startswith("data: "))
        next(events)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        rest = []
        with contextlib.suppress(httpx.HTTPError):
            rest.extend(events)
        assert "[DONE]" not in rest
