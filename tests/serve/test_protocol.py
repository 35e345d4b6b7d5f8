"""What uvicorn lacks: headers that never end, and an end."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from gpt4v_jax.serve import protocol

WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Loop:
    """Remembers what is to be called later; nothing runs."""

    def __init__(self):
        self.timers = []

    def call_later(self, seconds, function):
        self.timers.append(timer := mock.Mock(seconds=seconds, function=function))
        return timer

    def create_task(self, work, **_):
        work.close()
        return mock.Mock()


def connected(state: ServerState, most: int = 9):
    """-> (a connection, its timers)."""
    loop = Loop()
    made = protocol.Protocol(uvicorn.Config(mock.Mock(), limit_concurrency=most, log_config=None), state, {}, loop)
    transport = mock.Mock()
    transport.get_extra_info.return_value = None
    made.connection_made(transport)
    return made, loop.timers


def test_headers_must_end():
    """They have their time from the first moment, and again on the same connection after an answer."""
    connection, timers = connected(ServerState())
    (timer,) = timers
    assert timer.seconds == protocol.HEADER_SECONDS and timer.function == connection.transport.abort
    connection.data_received(WHOLE[:9])
    assert timers == [timer] and not timer.cancel.called  # more bytes give no more time
    connection.data_received(WHOLE[9:])
    assert timer.cancel.called and timers == [timer]
    connection.conn = type(connection.conn)(connection.conn.our_role)  # as after the answer
    connection.data_received(WHOLE[:9])
    assert len(timers) == 2 and not timers[1].cancel.called
    connection.connection_lost(None)
    assert timers[1].cancel.called


@pytest.mark.parametrize("sent", (b"GET / HTTP/1.1\r\nX: " + b"a" * 2**20, b"hello\r\n\r\n"))
def test_what_is_no_http_gets_a_body(sent):
    connection, _ = connected(ServerState())
    connection.data_received(sent)
    head, _, body = b"".join(call.args[0] for call in connection.transport.write.mock_calls).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-length: %d" % len(body) in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http" and "32,768 bytes" in error["message"]
    assert connection.transport.close.called


def test_connections_beyond_the_limit_are_closed():
    state = ServerState()
    one, two = connected(state, 1)[0], connected(state, 1)[0]
    assert not one.transport.abort.called and two.transport.abort.called


SCRIPT = """
import os, signal, types
from gpt4v_jax.serve import protocol
async def app(scope, receive, send):
    await receive()
    os.kill(os.getpid(), signal.SIGTERM)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
app.state = types.SimpleNamespace(server=types.SimpleNamespace(closing=False, cut=None))
protocol.HttpServer(app, "127.0.0.1", 0, 64).run()
print("over", app.state.server.closing)
"""


def test_sigterm_is_an_orderly_end():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout.strip()) == (0, "over True"), result.stderr
