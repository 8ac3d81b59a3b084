"""Answers owed, and a listener closed from outside, on a small server in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from marten.drain import close_listener, drain, unanswered
from tests.servers import wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's kernel")
# takes connections for ever; answers a line with the same line, once as many seconds have passed as it says
SERVER = """
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def serve(connection):
    while line := connection.recv(100):
        time.sleep(float(line))
        connection.sendall(line)
while True:
    try:
        threading.Thread(target=serve, args=(listener.accept()[0],)).start()
    except OSError:
        time.sleep(1)
"""


@pytest.fixture
def server() -> Iterator[tuple[int, int]]:
    """Process id and port."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def test_a_request_is_owed_until_it_is_answered(server: tuple[int, int]) -> None:
    _, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert unanswered(port) == 0
        for _ in range(2):  # on a new connection, and on one that has been answered before
            client.sendall(b"0.3")
            wait_until(lambda: unanswered(port) == 1, 1)
            assert client.recv(100) == b"0.3"
            wait_until(lambda: unanswered(port) == 0, 1)
            time.sleep(0.05)


def test_draining_refuses_the_new_and_answers_the_old(server: tuple[int, int]) -> None:
    pid, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"0.7")
        time.sleep(0.1)
        begun = time.monotonic()
        assert drain(pid, port, patience_s=10) == 0
        assert 0.4 < time.monotonic() - begun < 5
        client.settimeout(0.1)
        assert client.recv(100) == b"0.7"  # it was there before draining ended
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_patience_ends(server: tuple[int, int]) -> None:
    pid, port = server
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"60")
        time.sleep(0.1)
        assert drain(pid, port, patience_s=0.2) == 1


def test_only_the_named_port_of_a_live_process_is_closed(server: tuple[int, int]) -> None:
    pid, port = server
    assert not close_listener(pid, port + 1)
    socket.create_connection(("127.0.0.1", port)).close()
    assert not close_listener(2**22 + 1, port)
