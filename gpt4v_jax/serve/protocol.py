"""uvicorn, with what it lacks: clients that never end their headers are sent away, and SIGTERM has an end."""

import asyncio
import os
import signal
import threading

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.wire import encoded

HEADER_SECONDS = 10.0  # for a request's line and headers
HEADER_BYTES = 32_768
GRACE = 4.0  # seconds that running answers have when the server is told to end, before they are cut
LAST = 9.5  # seconds after which the process ends, whatever still runs (a compilation cannot be stopped)


class Protocol(H11Protocol):
    """Closes a connection whose next request's headers are not whole in time. uvicorn itself times only the pause
    before their first byte."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        most = self.config.limit_concurrency
        if most is not None and len(self.connections) > most:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data):
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._stop()

    def send_400_response(self, msg):
        """uvicorn's own has a line of text."""
        error = ApiError("the request is no HTTP, or its headers are too long: they may have "
                         f"{HEADER_BYTES:,} bytes", None, "invalid_http")  # fmt: skip
        body = encoded(error.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def connection_lost(self, exc):
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self._deadline or self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class HttpServer(uvicorn.Server):
    """Ends within LAST seconds of a signal, with status 0."""

    def __init__(self, app, host: str, port: int, connections: int):
        """connections: open ones; those beyond are closed at once."""
        super().__init__(uvicorn.Config(
            app, host, port, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, limit_concurrency=connections, h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=15, timeout_graceful_shutdown=round(GRACE) + 2,
        ))  # fmt: skip
        self._app = app

    async def shutdown(self, sockets=None) -> None:
        here = self._app.state.server
        here.closing = True
        asyncio.get_running_loop().call_later(GRACE, here.cut)
        await super().shutdown(sockets)

    def handle_exit(self, sig, frame) -> None:
        if not self.should_exit:
            last = threading.Timer(LAST, os._exit, (0,))
            last.daemon = True
            last.start()
        super().handle_exit(sig, frame)

    def run(self, sockets=None) -> None:
        # uvicorn raises the signal again when it is done: without this the process would die of it.
        before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            super().run(sockets)
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
