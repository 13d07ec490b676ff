"""The processes of a run watch each other: when one is killed, the others say so and end.

JAX notices a dead process by its missing heartbeats, a minute or two later, and then ends the
others with a stack trace; meanwhile they wait in a collective. Here process 0 holds a connection to
each other one, and the kernel closes the connections of a process that dies, however it dies.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

# What is sent, a byte each: all is done; process N, in the next 4, ended by an error or is dead.
DONE, FAILED, DEAD = b"d", b"f", b"k"
_TOLD = {FAILED: "ended with an error, which it has told", DEAD: "was killed"}
GRACE = 10.0  # seconds in which a process may tell an error of its own

_connections: dict[int, socket.socket] = {}


def watch(coordinator: str) -> None:
    """Connects this process with process 0, and process 0 with all, and starts to watch.

    To be called on every process of several, once JAX's own start-up is done.
    """
    host = coordinator.rpartition(":")[0]
    with socket.create_server(("", 0)) if jax.process_index() == 0 else socket.socket() as server:
        mine = server.getsockname()[1] if jax.process_index() == 0 else 0
        port = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
        if jax.process_index() == 0:
            for _ in range(jax.process_count() - 1):
                connection, _ = server.accept()
                _connections[int.from_bytes(_receive(connection, 4), "big")] = connection
        else:
            connection = socket.create_connection((host, port), timeout=60)
            connection.settimeout(None)
            connection.sendall(_number(jax.process_index()))
            _connections[0] = connection
    threading.Thread(target=_watch, name="peers", daemon=True).start()
    atexit.register(say_goodbye, failed=False)


def say_goodbye(*, failed: bool) -> None:
    """Tells the others that this process ends: they need not take it for dead."""
    _tell(FAILED + _number(jax.process_index()) if failed else DONE)


def _number(process: int) -> bytes:
    return process.to_bytes(4, "big")


def _tell(message: bytes) -> None:
    for connection in _connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(message)


def _watch() -> None:
    """In a thread: waits for each connection's last word."""
    with selectors.DefaultSelector() as selector:
        for index, connection in _connections.items():
            selector.register(connection, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                word, process = _receive(_connections[key.data], 1), key.data
                if word == DONE:
                    continue
                if word in _TOLD:  # process 0 passes on what another one said
                    process = int.from_bytes(_receive(_connections[key.data], 4), "big")
                else:
                    word = DEAD
                if word == FAILED:
                    time.sleep(GRACE)
                _tell(word + _number(process))
                _end(f"process {process} {_TOLD[word]}")


def _end(what: str) -> None:
    print(
        f"error: {what}, so process {jax.process_index()} ends too; the same command goes on from "
        "the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or b"" when the other end is gone."""
    try:
        return connection.recv(count, socket.MSG_WAITALL)
    except OSError:
        return b""
