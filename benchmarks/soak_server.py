"""Many clients at once for minutes: nothing is lost, leaked, compiled anew or written otherwise.

    python -m benchmarks.soak_server --checkpoint runs/tiny --seconds 300 --clients 64 --drafts 1

A server of this process, and as many client threads, each with one request after the other out of a
set: prompts and answers of random lengths, greedy and drawn, whole and streamed. Some clients leave
in the middle of a stream. Every answer is compared with what an engine without drafts, sharing or
company writes for the same request. At the end: requests by how they ended, wrong answers, pages
missing, compilations while serving, and the process' resident memory by the minute. Exit code 1 if
anything is wrong. Needs the extra `serve`.
"""

import argparse
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import uvicorn

from dsv3_jax.data.supervised import find_template
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request, seed_of
from dsv3_jax.inference.streaming import TextStream
from dsv3_jax.loading import find_tokenizer, load
from dsv3_jax.serving.answer import Limits
from dsv3_jax.serving.app import make_app
from dsv3_jax.serving.protocol import Served
from dsv3_jax.serving.worker import Worker

LENGTH, PAGE_BYTES = 384, 4096
# After this many seconds what is allocated once has been.
SETTLED = 60.0
# Of the memory held then: what the allocator's arenas may still grow by.
GROWTH = 0.03


@dataclass
class Tally:
    """What has come of the requests so far."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def requests_of(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Bodies of /v1/completions: several beginnings, lengths of 1 to 160 and of 1 to 200 tokens."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(2, vocabulary) for _ in range(160)] for _ in range(6)]
    bodies = []
    for number in range(count):
        shared, own = rng.randrange(100), rng.randrange(1, 60)
        prompt = rng.choice(beginnings)[:shared] + [rng.randrange(2, vocabulary)] * own
        body = {"prompt": prompt, "max_tokens": rng.randrange(1, 200), "seed": number}
        bodies.append(body | {"temperature": rng.choice([0.0, 0.8]), "stream": number % 2 == 0})
    return bodies


def solo_texts(model, tokenizer, bodies) -> list[str]:
    """What each request writes by itself."""
    options = EngineOptions(slots=1, max_length=LENGTH, chunks=(160,), share_prefixes=False)
    engine, texts = Engine(model.variables, model.config.model, options), []
    for body in bodies:
        seed = seed_of(body["seed"], 0)
        how = (body["max_tokens"], body["temperature"], 1.0, seed)
        (done,) = engine.run([Request(tuple(body["prompt"]), *how)])
        stream = TextStream(tokenizer, model.config.model.eos_token_ids)
        texts.append("".join(stream.push(i) for i in done.ids) + stream.flush())
    return texts


def ask(port: int, body: dict[str, Any], leaves: bool) -> str | None:
    """The answer's text; None where the client left in the middle of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if leaves and not body["stream"]:
            time.sleep(0.05)
            return None
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()[:200]!r}")
        if not body["stream"]:
            return json.load(answer)["choices"][0]["text"]
        text = ""
        for line in answer:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if leaves and text:
                    return None
        return text
    finally:
        connection.close()


def client(port: int, bodies, texts, until: float, number: int, tally: Tally) -> None:
    """One request after the other, each out of the set, until the time is over."""
    rng = random.Random(number)
    while time.monotonic() < until:
        which, leaves = rng.randrange(len(bodies)), rng.random() < 0.15
        try:
            text = ask(port, bodies[which], leaves)
        except Exception as error:
            tally.ended[type(error).__name__] += 1
            tally.wrong.append(f"request {which}: {error}")
            continue
        tally.ended["left" if text is None else "answered"] += 1
        if text is not None and text != texts[which]:
            tally.wrong.append(f"request {which}: {text!r} is not {texts[which]!r}")


def resident_mib() -> float:
    """This process' resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


def main() -> int:
    """Prints what came of it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=100, help="different ones")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--pages", type=int, default=60, help="of 64 tokens; fewer than all need")
    parser.add_argument("--drafts", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint), find_tokenizer(args.checkpoint)
    config = model.config.model
    bodies = requests_of(args.requests, config.vocab_size)
    texts = solo_texts(model, tokenizer, bodies)
    options = EngineOptions(
        args.slots, LENGTH, args.pages, (32, 128), token_budget=160, drafts=args.drafts
    )
    engine = Engine(model.variables, config, options)
    engine.warm_up()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    served = Served("soak", tokenizer, find_template(None, args.checkpoint, tokenizer), LENGTH, 0)
    app = make_app(Worker(engine, 2 * args.clients), served, Limits(2**20, 600.0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    sock = socket.create_server(("127.0.0.1", 0), backlog=256)
    serving = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    serving.start()
    while not server.started:
        time.sleep(0.01)
    began, tally = time.monotonic(), Tally()
    rest = (sock.getsockname()[1], bodies, texts, began + args.seconds)
    clients = [threading.Thread(target=client, args=(*rest, n, tally)) for n in range(args.clients)]
    for each in clients:
        each.start()
    held: list[tuple[float, float]] = []
    while any(each.is_alive() for each in clients):
        time.sleep(5.0)
        held.append((time.monotonic() - began, resident_mib()))
    for _ in range(200):
        if not engine.busy:
            break
        time.sleep(0.05)
    missing = args.pages - engine.pools[0].free_pages
    server.should_exit = True
    serving.join()
    return report(engine, tally, held, missing, compiled)


def report(engine: Engine, tally: Tally, held, missing: int, compiled: list[str]) -> int:
    """Prints it; 1 if anything is wrong."""
    counts = engine.statistics
    print(f"clients: {dict(tally.ended)}; wrong: {len(tally.wrong)}", *tally.wrong[:3], sep="\n  ")
    print(f"engine: {counts}")
    print(f"pages missing: {missing}; compiled while serving: {len(compiled)}")
    print("resident MiB:", ", ".join(f"{s:.0f} s {mib:.0f}" for s, mib in held[:: 60 // 5]))
    settled = [mib for seconds, mib in held if seconds >= SETTLED]
    grown = (settled[-1] - settled[0]) / settled[0] if settled else 0.0
    print(f"grown after {SETTLED:g} s by {grown:.2%}")
    bad = tally.wrong or missing or compiled or grown > GROWTH or engine.busy
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
