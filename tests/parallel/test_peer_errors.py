"""What a process says of the others' ends: which one it was, also where process 0 passes it on."""

import socket
import threading

import pytest

from dsv3_jax.parallel import peers


@pytest.fixture
def watched(monkeypatch):
    """watched(connections) -> the reason that a process with these connections ends for."""
    monkeypatch.setattr(peers, "GRACE", 0.0)

    def watch(connections: dict[int, socket.socket]) -> str:
        told: list[str] = []

        def end(what: str) -> None:
            told.append(what)
            raise SystemExit

        monkeypatch.setattr(peers, "_connections", connections)
        monkeypatch.setattr(peers, "_end", end)
        with pytest.raises(SystemExit):
            peers._watch()
        return told[0]

    return watch


@pytest.mark.parametrize(
    "failed, said", [(True, "process 2 ended with an error, which it has told"), (None, "killed")]
)
def test_the_process_that_ended_is_named_by_all(watched, monkeypatch, failed, said):
    """Process 2 to process 0, which passes it on to process 1."""
    at_0_of_1, at_1 = socket.socketpair()
    at_0_of_2, at_2 = socket.socketpair()
    if failed:
        monkeypatch.setattr(peers, "_connections", {0: at_2})
        monkeypatch.setattr(peers.jax, "process_index", lambda: 2)
        peers.say_goodbye(failed=True)
    at_2.close()
    told = watched({1: at_0_of_1, 2: at_0_of_2})
    assert said in told and told.startswith("process 2 ")
    assert watched({0: at_1}) == told


def test_a_process_that_is_done_ends_nobody(monkeypatch):
    here, there = socket.socketpair()
    there.sendall(peers.DONE)
    monkeypatch.setattr(peers, "_connections", {1: here})
    watch = threading.Thread(target=peers._watch, daemon=True)
    watch.start()
    watch.join(timeout=10)
    assert not watch.is_alive()
