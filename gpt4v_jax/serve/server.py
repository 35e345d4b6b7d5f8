"""What all endpoints share: the model, the engine, the settings, and how a request's body is read."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from starlette.requests import Request as Http

from gpt4v_jax.serve import errors, schema, wire
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.guards import Guard
from gpt4v_jax.serve.metrics import Metrics
from gpt4v_jax.serve.moderation import Moderation
from gpt4v_jax.serve.requests import Busy
from gpt4v_jax.training.workdir import Trained

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of `python -m gpt4v_jax.serve`, by its flags' names."""

    name: str  # of the model
    guard: Guard
    moderation: Moderation | None = None
    keys: tuple[tuple[str, str], ...] = ()  # (who, key); (): everybody may
    seconds: float = 300.0  # of a request, the queue included
    max_body: int = 25_000_000  # bytes
    max_media: int = 16  # of a request
    queued: int = 64  # requests that may wait in the engine, and so the most answers that one body may ask for
    connections: int = 256  # requests at a time, those of /health and /metrics not counted
    threads: int = 4  # that decode media and tokenize
    transcribe: str = "what is said?"  # what /v1/audio/transcriptions asks


# Values of a body, and lists and objects, which take over ten times as long: to parse it holds up all threads, the
# engine's among them.
MOST_VALUES, MOST_OPENED = 1_000_000, 100_000
LEAST_TEXT, CHARACTERS = 2**16, 32  # characters of a text; of a long context so many for each position


class Server:
    """engine: serve.engine.Engine, or what has its submit and its stats."""

    def __init__(self, trained: Trained, engine, settings: Settings):
        self.trained, self.engine, self.settings = trained, engine, settings
        self.metrics, self.created = Metrics(engine), int(time.time())
        self.following: set = set()  # follow.Following that are not at their end
        self.closing = False
        self.computing = 0  # requests within `beside`
        # Not anyio's threads: what is cancelled there gives its place back while its thread goes on.
        self._pool = concurrent.futures.ThreadPoolExecutor(settings.threads, "serve")
        self._one = concurrent.futures.ThreadPoolExecutor(1, "beside")

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Awaits what would hold up the event loop. Settings.threads at a time; what is cancelled while it waits is
        never begun."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    @contextlib.asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Around what a request has the model compute beside the engine, by `in_turn`: it has Settings.seconds, and no
        more than Settings.queued requests do so or wait for it. Raises Busy, and ApiError for what takes too long."""
        if self.computing >= self.settings.queued:
            raise Busy(f"{self.computing} requests wait already: try again later", min(1.0 + self.computing, 30.0))
        self.computing += 1
        try:
            async with asyncio.timeout(self.settings.seconds):
                yield
        except TimeoutError:
            raise ApiError(f"the request took longer than {self.settings.seconds:g} s: ask for less at a time, or try "
                           "again later", None, "timeout", 503, {"Retry-After": "30"}) from None  # fmt: skip
        finally:
            self.computing -= 1

    async def in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `in_thread`, one at a time, in the order in which they come."""
        return await asyncio.get_running_loop().run_in_executor(self._one, function, *arguments)

    def close(self) -> None:
        self.cut()
        for pool in (self._pool, self._one):
            pool.shutdown(wait=False, cancel_futures=True)
        self.settings.guard.close()

    def cut(self) -> None:
        """Ends the answers that still run: the server is closing."""
        self.closing = True
        for answers in list(self.following):
            answers.cut()

    async def read(self, http: Http, kinds: dict[str, schema.Kind]) -> dict[str, Any]:
        """-> the fields of a JSON body, checked, of this model. Raises ApiError."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(f"content-type is {errors.shown(kind)}: send application/json", None, "content_type", 415)
        given = await self.in_thread(parsed, await http.body(), kinds)
        self.check_model(given.get("model", given.get("engine")))
        return given

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model's name; without one it is this one."""
        if name not in (None, self.settings.name):
            raise errors.unknown_model(name, self.settings.name)

    def check_lengths(self, where: str, texts: Iterable[Any]) -> None:
        """Raises ApiError for a text that is too long to be looked at: to make tokens of it alone would hold up others.
        What is none is passed over."""
        most = max(LEAST_TEXT, CHARACTERS * self.trained.layout.context)
        for text in texts:
            if isinstance(text, str) and len(text) > most:
                raise ApiError(f"{where} has a text of {len(text):,} characters: at most {most:,} are read, and this "
                               f"model's context is {self.trained.layout.context} positions; shorten it", where,
                               "context_length_exceeded")  # fmt: skip

    async def check_text(self, text: str, where: str = "messages") -> None:
        """Raises ApiError for what moderation refuses."""
        self.check_lengths(where, [text])
        if self.settings.moderation is None:
            return
        category = await self.in_thread(self.settings.moderation.check, text, "request")
        if category is not None:
            self.metrics.refused.labels(category, "request").inc()
            raise ApiError(f"this request is refused ({category})", where, "content_filter")

    def count(self, http: Http, usage: dict[str, Any]) -> None:
        """Notes what an answer took, for /metrics and the access log."""
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        http.state.tokens = (prompt, completion)
        self.metrics.prompt_tokens.inc(prompt)
        self.metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.metrics.completion_tokens.inc(completion)

    @functools.cached_property
    def card(self) -> dict[str, Any]:
        """-> the model, as /v1/models lists it."""
        layout = self.trained.layout
        return {
            "id": self.settings.name, "object": "model", "created": self.created, "owned_by": "gpt4v_jax",
            "max_model_len": layout.context, "step": self.trained.step, "chats": self.trained.chats,
            "modalities": ["text", *(name for name in ("image", "video", "audio") if layout.reads(name))],
        }  # fmt: skip


def parsed(body: bytes, kinds: dict[str, schema.Kind]) -> dict[str, Any]:
    """-> the fields of a JSON body, checked. Raises ApiError, for one with too many values before it is parsed."""
    commas, opened = wire.counted(body)
    for count, what, most in ((commas, "values", MOST_VALUES), (opened, "lists and objects", MOST_OPENED)):
        if count > most:
            raise ApiError(f"the body has {count:,} {what}: at most {most:,} are read; send several requests", None,
                           "body_too_large", 413)  # fmt: skip
    try:
        return schema.read(wire.decoded(body), kinds)
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {error}", None, "invalid_json") from None
    except wire.TooDeep:
        raise ApiError("the body has lists or objects nested too deeply to be read: make it flatter", None,
                       "invalid_json") from None  # fmt: skip


def of(http: Http) -> Server:
    return http.app.state.server
