"""The server from outside: the official client, curl, raw requests, and clients that misbehave."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from typing import Any

import httpx2 as httpx
import openai
import pytest
import uvicorn

from dsv3_jax.config import UserError
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.serving.answer import Limits
from dsv3_jax.serving.app import make_app
from dsv3_jax.serving.options import ServeOptions
from dsv3_jax.serving.protocol import Served
from dsv3_jax.serving.worker import Worker
from tests.helpers import random_variables, tiny_model

MODEL = tiny_model(
    num_hidden_layers=2,
    vocab_size=272,
    bos_token_id=256,
    eos_token_id=257,
    max_position_embeddings=128,
)
VARIABLES = random_variables(MODEL)
# ASCII alone, so that texts of tokens are texts.
HEAD = VARIABLES["params"]["lm_head"]
VARIABLES["params"]["lm_head"] = HEAD.at[128:].set(0.0)
BYTES = load_tokenizer("byte")
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('no such talk') }}"
    "{% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}",
    {},
)
KEY, PAGES = "a secret", 14


@pytest.fixture(scope="module")
def engine():
    options = EngineOptions(
        slots=4, max_length=120, pages=PAGES, chunks=(32,), drafts=1, top=2, page=16
    )
    engine = Engine(VARIABLES, MODEL, options)
    engine.warm_up()
    return engine


@contextlib.contextmanager
def serving(engine, *, key=KEY, max_waiting=8, seconds=60.0, body=4096, send_bytes=None):
    """A server on a free port; its address. Sockets take send_bytes at a time."""
    worker = Worker(engine, max_waiting)
    served = Served("tiny", BYTES, TEMPLATE, engine.options.max_length, 2)
    app = make_app(worker, served, Limits(body, seconds, key))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    sock = socket.create_server(("127.0.0.1", 0))
    if send_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


@pytest.fixture
def alone(engine):
    """What the model writes for a prompt, greedily, when nobody else asks."""
    wait_for(lambda: not engine.busy)
    plain = Engine(VARIABLES, MODEL, EngineOptions(slots=1, max_length=120, chunks=(32,)))

    def write(prompt: bytes, tokens: int, bos: bool = False) -> str:
        ids = (*(MODEL.bos_token_id,) * bos, *prompt)
        (done,) = plain.run([Request(ids, tokens)])
        stream = TextStream(BYTES, MODEL.eos_token_ids)
        return "".join(stream.push(i) for i in done.ids) + stream.flush()

    return write


def test_the_official_client_chats_and_completes(client, alone):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    how = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
    talk = client.chat.completions.create(**how)
    want = alone(b"s:be;u:hello;", 20)
    assert talk.choices[0].message.content == want and talk.choices[0].finish_reason == "length"
    assert (talk.usage.prompt_tokens, talk.usage.completion_tokens) == (13, 20)
    pieces = list(
        client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == want
    assert pieces[-1].usage.total_tokens == 33 and not pieces[-1].choices
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    text = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=9)
    assert text.choices[0].text == alone(b"hello", 9, bos=True)


def test_several_prompts_and_choices_seeds_stops_and_log_probabilities(client, alone):
    how = {"model": "tiny", "max_tokens": 6}
    two = client.completions.create(prompt=["ab", [256, 99]], n=2, seed=7, **how)
    again = client.completions.create(prompt=["ab", [256, 99]], n=2, seed=7, **how)
    texts = [choice.text for choice in two.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) > 2
    assert two.usage.prompt_tokens == 3 + 2 and two.usage.completion_tokens <= 24
    whole = alone(b"hello", 6, bos=True)
    stopped = client.completions.create(prompt="hello", stop=[whole[2:4]], temperature=0, **how)
    assert stopped.choices[0].text == whole[: whole.index(whole[2:4])]
    assert stopped.choices[0].finish_reason == "stop"
    shown = client.completions.create(prompt="hello", logprobs=2, temperature=0, **how)
    logprobs = shown.choices[0].logprobs
    assert "".join(logprobs.tokens) == whole and len(logprobs.top_logprobs[0]) == 2
    assert logprobs.token_logprobs[0] == max(logprobs.top_logprobs[0].values())
    talk = client.chat.completions.create(
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        model="tiny", logprobs=True, top_logprobs=1, temperature=0, max_tokens=3,
    )  # fmt: skip
    entries = talk.choices[0].logprobs.content
    assert bytes(b for e in entries for b in e.bytes).decode() == talk.choices[0].message.content
    assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)


def test_models_health_and_metrics(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "tiny"}
    client.completions.create(model="tiny", prompt="abc", max_tokens=30)
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers["dsv3_new_tokens_total"]) >= 30
    assert float(numbers["dsv3_pages"]) == PAGES
    assert float(numbers['dsv3_drafts_drafted_total{position="1"}']) > 0


def test_curl_streams_events(address, alone):
    body = json.dumps({"prompt": "hello", "max_tokens": 5, "temperature": 0, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{address}/v1/completions", "-H", f"Authorization: Bearer {KEY}",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    events = [line.removeprefix("data: ") for line in done.stdout.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == alone(b"hello", 5, bos=True)


BAD = {
    "no JSON": (b'{"prompt": ', 400, "the body is no JSON"),
    "deep": (b"[" * 4000, 400, "the body is"),
    "a list": (b"[]", 400, "the body is a list"),
    "no prompt": (b"{}", 400, "prompt is missing"),
    "unknown": (b'{"prompt": "a", "promt": 1}', 400, "unknown field 'promt'"),
    "unsupported": (b'{"prompt": "a", "presence_penalty": 1}', 400, "presence_penalty=1"),
    "model": (b'{"prompt": "a", "model": "gpt"}', 400, "'gpt' does not exist"),
    "vocabulary": (b'{"prompt": [1, 272]}', 400, "token ids from 1 to 272"),
    "negative": (b'{"prompt": [-1]}', 400, "token ids from -1"),
    "empty": (b'{"prompt": []}', 400, "the prompt is empty"),
    "temperature": (b'{"prompt": "a", "temperature": -1}', 400, "temperature=-1"),
    "nan": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=nan"),
    "text": (b'{"prompt": "a", "temperature": "hot"}', 400, "temperature='hot' is no number"),
    "top_p": (b'{"prompt": "a", "top_p": 0}', 400, "top_p=0"),
    "tokens": (b'{"prompt": "a", "max_tokens": 0}', 400, "max_new_tokens=0"),
    "long": (b'{"prompt": "a", "max_tokens": 500}', 400, "there is room for 120"),
    "longer": (b'{"prompt": "' + b"a" * 300 + b'"}', 400, "there is room for 120"),
    "n": (b'{"prompt": "a", "n": 1000}', 400, "n=1000"),
    "seed": (b'{"prompt": "a", "seed": 18446744073709551616}', 400, "seed=18446744073709551616"),
    "stop": (b'{"prompt": "a", "stop": [1]}', 400, "stop="),
    "logprobs": (b'{"prompt": "a", "logprobs": 3}', 400, "returns 0 to 2"),
    "stream": (b'{"prompt": "a", "stream": 1}', 400, "neither true nor false"),
    "large": (b'{"prompt": "' + b"a" * 5000 + b'"}', 413, "larger than 4,096 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_answered_with_what_is_wrong(case, address):
    body, status, said = BAD[case]
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{address}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_templates_that_fail_and_keys_that_are_wrong(client, address):
    bad = {"model": "tiny", "messages": [{"role": "user", "content": "fail"}]}
    with pytest.raises(openai.BadRequestError, match="no such talk"):
        client.chat.completions.create(**bad)
    with pytest.raises(openai.BadRequestError, match="role 'dog'"):
        client.chat.completions.create(model="tiny", messages=[{"role": "dog", "content": "a"}])
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}):
        for path in ("models", "models/tiny"):
            answer = httpx.get(f"{address}/v1/{path}", headers=headers)
            assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405


@pytest.fixture
def slow(engine, monkeypatch):
    """Steps take long enough for what a test does meanwhile."""
    wait_for(lambda: not engine.busy)
    step = engine.step

    def slowly():
        time.sleep(0.02)
        step()

    monkeypatch.setattr(engine, "step", slowly)
    yield
    wait_for(lambda: not engine.busy)


def asking(address: str, body: dict, receive_bytes: int | None = None) -> socket.socket:
    """A connection that has asked for completions, and has read nothing yet."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


def rest_of(connection: socket.socket) -> str:
    """All that comes until the server closes."""
    with connection:
        connection.settimeout(30)
        return b"".join(iter(lambda: connection.recv(2**16), b"")).decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_pages_back(stream, engine, address, slow):
    before = engine.statistics.requests["cancelled"]
    body = {"prompt": "hello", "max_tokens": 110, "stream": stream, "n": 3, "temperature": 0}
    connection = asking(address, body)
    wait_for(lambda: engine.running == 3)
    connection.close()
    wait_for(lambda: not engine.busy)
    assert engine.pools[0].free_pages == PAGES
    assert engine.statistics.requests["cancelled"] == before + 3


def test_a_slow_reader_holds_nobody_up_and_gets_all_of_its_text(engine, alone):
    """Its 3 streams with log-probabilities are more than sockets and the server hold for it."""
    with serving(engine, send_bytes=4096) as address:
        body = {"prompt": "hello", "max_tokens": 110, "n": 3, "temperature": 0}
        body |= {"stream": True, "logprobs": 2}
        slow_reader = asking(address, body, receive_bytes=4096)
        wait_for(lambda: engine.running == 3 or not engine.busy)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        text = client.completions.create(model="tiny", prompt="me", temperature=0, max_tokens=9)
        assert text.choices[0].text == alone(b"me", 9, bos=True)
        wait_for(lambda: not engine.busy)
        assert engine.pools[0].free_pages == PAGES, "what it has not read holds no pages"
        events = [line[6:] for line in rest_of(slow_reader).split("\n") if line[:6] == "data: "]
        assert events.pop() == "[DONE]"
        texts = ["", "", ""]
        for choice in (json.loads(event)["choices"][0] for event in events):
            texts[choice["index"]] += choice["text"]
        assert texts == [alone(b"hello", 110, bos=True)] * 3


@pytest.mark.slow
def test_a_reader_that_never_reads_is_left_at_the_end_of_its_time(engine):
    with serving(engine, send_bytes=4096, seconds=2.0) as address:
        body = {"prompt": "hello", "max_tokens": 110, "n": 3, "temperature": 0}
        body |= {"stream": True, "logprobs": 2}
        reader = asking(address, body, receive_bytes=4096)
        wait_for(lambda: not engine.busy)
        time.sleep(3.5)
        said = rest_of(reader)
        assert "[DONE]" not in said and len(said) > 2**14


def test_many_at_once_write_what_each_writes_alone(address, alone):
    """More than there are slots and pages for; half of them streamed."""
    prompts = [f"{'ab' * (i % 9)}{i}" for i in range(8)]
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=5)
        how = {"model": "tiny", "prompt": prompts[number], "temperature": 0, "max_tokens": 40}
        if number % 2:
            events = client.completions.create(**how, stream=True)
            got[number] = "".join(event.choices[0].text for event in events)
        else:
            got[number] = client.completions.create(**how).choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got == {i: alone(p.encode(), 40, bos=True) for i, p in enumerate(prompts)}


def test_a_full_queue_and_a_late_answer_are_said(engine, slow):
    with serving(engine, key=None, max_waiting=2, seconds=0.05) as address:
        body = {"prompt": "a", "n": 3}
        full = httpx.post(f"{address}/v1/completions", json=body)
        assert full.status_code == 429 and full.headers["Retry-After"] == "1"
        body = {"prompt": "a", "max_tokens": 118, "n": 2, "temperature": 0}
        late = httpx.post(f"{address}/v1/completions", json=body)
        assert late.status_code == 504 and "longer than 0.05 s" in late.text
        streamed = httpx.post(f"{address}/v1/completions", json=body | {"stream": True})
        assert "longer than 0.05 s" in streamed.text and "[DONE]" not in streamed.text


def test_a_request_larger_than_the_pool_is_refused():
    """Before the engine's thread sees it; nothing is compiled for it."""
    small = Engine(VARIABLES, MODEL, EngineOptions(slots=2, max_length=120, pages=3, page=16))
    with serving(small, key=None) as address:
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 80})
        assert answer.status_code == 400
        assert "all 3 pages hold 48" in answer.json()["error"]["message"]


def test_an_engine_that_fails_is_said_to_those_who_wait_and_to_those_who_come(engine, monkeypatch):
    wait_for(lambda: not engine.busy)

    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "step", fail)
    with serving(engine, key=None) as address:
        waited = httpx.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert waited.status_code == 503
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 503
        assert httpx.get(f"{address}/health").status_code == 503
    monkeypatch.undo()
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("value", [{"devices": 0}, {"port": 70000}, {"slots": 0}, {"api_key": ""}])
def test_options_that_cannot_be_served_with_are_refused_by_name(value: Any, tmp_path):
    (name,) = value
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        ServeOptions(checkpoint=tmp_path, **value).check()
