"""Requests in the engine, followed from the event loop: their Deltas come from the engine's thread, in the order in
which they are told, and nothing is left in the engine when nobody listens any more."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Sequence

from gpt4v_jax.serve import errors, folding
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.requests import Delta, Request

# Delta.finish -> OpenAI's finish_reason. What the server cuts for time is no whole answer: "length".
REASONS = {"stop": "stop", "length": "length", "forbidden": "stop", "timeout": "length",
           "content_filter": "content_filter"}  # fmt: skip


class Following:
    """A request's answers. Use as `with Following(...) as answers`: leaving it cancels what still runs."""

    def __init__(self, server, requests: Sequence[Request]):
        """server: api.Server."""
        self.server, self.requests = server, requests
        self._told: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._tickets: list = []
        self._texts, self._passed = [""] * len(requests), [0] * len(requests)  # told; characters passed on
        self._held: list[collections.deque[Delta]] = [collections.deque() for _ in requests]
        self._running = set(range(len(requests)))
        self._left, self.closing = False, False
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> "Following":
        self.server.following.add(self)
        return self

    def __exit__(self, *_) -> None:
        self.server.following.discard(self)
        self._left = True
        self._cancel()

    def cut(self) -> None:
        """The server is closing: the answers end here."""
        self.closing = True
        self._cancel()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def submit(self) -> None:
        """Queues all of them. Raises Busy and InputError, and has then queued none."""
        await self.server.in_thread(self._submit)

    def _submit(self) -> None:
        for i, request in enumerate(self.requests):
            ticket = self.server.engine.submit(request, functools.partial(self._tell, i))
            self._tickets.append(ticket)
            if self._left or self.closing:  # meanwhile: whoever cancels did not see this one
                ticket.cancel()

    def _tell(self, i: int, delta: Delta) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._told.put_nowait, (i, delta))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """-> (which request, what is new of its answer), until all have ended. The last Delta of each has `finish`, one
        of REASONS. Raises ApiError for an answer that failed."""
        while self._running:
            i, delta = await self._told.get()
            if i not in self._running:  # it was refused: what the engine had told before it heard of it
                continue
            if delta.finish not in (None, *REASONS):
                raise self._failed(delta)
            for passed in [delta] if self.server.settings.moderation is None else await self._moderated(i, delta):
                if passed.finish:
                    self._running.discard(i)
                yield i, passed

    def _failed(self, delta: Delta) -> ApiError:
        if delta.finish == "unreadable":
            return ApiError("a medium cannot be read: is its file whole?", None, "invalid_medium")
        if delta.finish == "cancelled":
            return errors.closing()
        errors.log.error("the engine failed: %s", delta.error or delta.finish)
        return errors.internal()

    async def _moderated(self, i: int, delta: Delta) -> list[Delta]:
        """-> the Deltas that may be passed on: what has been looked at, with the whole text before it, for a word may
        lie across several of them. A refusal ends the answer."""
        settings = self.server.settings
        self._held[i].append(delta)
        self._texts[i] += delta.text
        look = settings.moderation.check if delta.finish else settings.moderation.words
        category = await self.server.in_thread(look, self._texts[i], "answer")
        if category is not None:
            self._tickets[i].cancel()
            self.server.metrics.refused.labels(category, "answer").inc()
            return [Delta(finish="content_filter", cached=delta.cached)]
        most, held = len(self._texts[i]) if delta.finish else folding.settled(self._texts[i]), self._held[i]
        passed = []
        while held and self._passed[i] + len(held[0].text) <= most:
            self._passed[i] += len(held[0].text)
            passed.append(held.popleft())
        return passed


@dataclasses.dataclass
class Whole:
    """An answer, put together again."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
    end: tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...] = ()
    finish: str | None = None
    cached: int = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        for name in ("tokens", "logprobs", "top"):
            getattr(self, name).extend(getattr(delta, name))
        self.end = delta.end or self.end
        self.cached, self.finish = max(self.cached, delta.cached), delta.finish
        if delta.finish == "content_filter":
            self.text, self.logprobs, self.top, self.end = "", [], [], ()
