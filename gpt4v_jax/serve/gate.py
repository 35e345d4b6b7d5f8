"""What every request passes: keys, how many at a time, how large and how slow a body may be, and the access log."""

import asyncio
import hmac
import logging
import time

from starlette.requests import ClientDisconnect

from gpt4v_jax.serve import errors
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.wire import ClientGone, Reply

# Without a key: they tell nothing of the model.
OPEN = ("/", "/page.css", "/page.js", "/look.js", "/page.svg", "/health")
WATCH = ("/health", "/metrics")  # also when the server is full
BODY_SECONDS = 60.0  # for a whole body
BODIES = 2**28  # bytes of bodies that are in memory at a time: each is kept until its request has ended
log = logging.getLogger("gpt4v_jax.access")


class Gate:
    """ASGI middleware. An exception that comes out of the app becomes an OpenAI error."""

    def __init__(self, app, server: Server):
        self.app, self.server, self.running = app, server, 0
        self.held = 0  # bytes of the bodies of all requests that run

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["began"], state["held"], path, status = time.monotonic(), 0, scope["path"], None

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.running += path not in WATCH
        try:
            self._check(scope)
            await self.app(scope, self._limited(state, receive), noted)
        except (ClientGone, ClientDisconnect):
            status = status or 499  # nobody reads it; the log has it
        except Exception as error:
            found = errors.of(error)
            if status is None:
                await Reply(found.body, found.status, found.headers)(scope, receive, noted)
        finally:
            self.running -= path not in WATCH
            self.held -= state["held"]
            self._note(scope, status or 499)

    def _check(self, scope) -> None:
        """Raises ApiError for who may not come in; notes who it is."""
        path, settings = scope["path"], self.server.settings
        if path not in WATCH and self.running > settings.connections:
            raise ApiError(f"{settings.connections} requests are running: try again later", None, "overloaded", 503,
                           {"Retry-After": "1"})  # fmt: skip
        scope["state"]["user"] = scope["client"][0] if scope.get("client") else ""
        if settings.keys and path not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            name = self._who(key.strip()) if scheme.lower() == b"bearer" else None
            if name is None:
                raise ApiError("a key is needed: send the header 'Authorization: Bearer KEY' with one of this server",
                               None, "invalid_api_key", 401, {"WWW-Authenticate": "Bearer"})  # fmt: skip
            scope["state"]["user"] = name

    def _who(self, given: bytes) -> str | None:
        """-> whose key it is. It takes the same time whichever it is, and whether it is one."""
        found = None
        for name, key in self.server.settings.keys:
            if hmac.compare_digest(given, key.encode()):
                found = name
        return found

    def _limited(self, state, receive):
        """-> receive, which raises ApiError for a body that is too large, too slow, or one too many."""
        most, read, whole = self.server.settings.max_body, 0, False
        until = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited():
            nonlocal read, whole
            if whole:  # what comes now is that the client hangs up
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
                    read += (size := len(message.get("body", b"")))
                    full = self.held + size > max(BODIES, most)
                    # A little more is thrown away, for most clients look for an answer only when all is sent.
                    while (full or read > most) and read < 2 * most and message.get("more_body"):
                        message = await receive()
                        read += len(message.get("body", b""))
            except TimeoutError:
                raise ApiError(f"the body did not come within {BODY_SECONDS:g} s", None, "timeout", 408,
                               {"Connection": "close"}) from None  # fmt: skip
            if read > most:
                raise ApiError(f"the body is larger than {most} bytes", None, "body_too_large", 413,
                               {"Connection": "close"})  # fmt: skip
            if full:
                raise ApiError(f"the bodies of running requests are {self.held:,} bytes already: try again later", None,
                               "overloaded", 503, {"Retry-After": "1", "Connection": "close"})  # fmt: skip
            state["held"] += size
            self.held += size
            whole = not message.get("more_body")
            return message

        return limited

    def _note(self, scope, status: int) -> None:
        """One line, and the counters; nothing of what was said."""
        seconds = time.monotonic() - scope["state"]["began"]
        route = getattr(scope.get("route"), "path", "other")
        self.server.metrics.requests.labels(route, str(status)).inc()
        self.server.metrics.seconds.labels(route).observe(seconds)
        tokens = scope["state"].get("tokens")
        raw = scope.get("raw_path", b"").decode("ascii", "replace")[:200]  # as it came: no line of its own in the log
        log.info("%s %s %d %.0f ms%s", scope["method"], raw, status, 1000 * seconds,
                 f" {tokens[0]}+{tokens[1]} tokens" if tokens else "")  # fmt: skip
