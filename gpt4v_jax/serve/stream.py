"""Answers as OpenAI's bodies, whole or in pieces, and the pieces as server-sent events."""

import asyncio
import collections
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax.data import chat
from gpt4v_jax.generate import prompts
from gpt4v_jax.serve import errors, shapes, wire
from gpt4v_jax.serve.follow import REASONS, Following, Whole
from gpt4v_jax.serve.requests import Delta
from gpt4v_jax.serve.schema import Asked
from gpt4v_jax.serve.server import Server

READ_SECONDS = 30.0  # in which a client must have read what was sent to it


@dataclasses.dataclass(frozen=True)
class Prompt:
    document: chat.Document
    read: prompts.Read | None = None
    text: str = ""  # for echo
    scored: tuple[Sequence[float | None], Sequence[shapes.Top]] | None = None  # by generate.score, for echo, too


class Form:
    """The bodies of one request. Choice k belongs to prompt k // n."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, server: Server, wish: Asked, prompts: Sequence[Prompt]):
        self.wish, self.prompts, self.names = wish, prompts, shapes.names_of(server.trained.tokenizer)
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()),
                      "model": server.settings.name}  # fmt: skip
        self._places = collections.defaultdict(shapes.Place)  # by choice

    def body(self, choices: list[dict], usage: dict) -> dict[str, Any]:
        return self._head | {"object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict[str, Any]:
        found = self._head | {"object": self.chunk_kind, "choices": choices}
        return found | {"usage": usage} if self.wish.include_usage else found

    def usage(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        n = self.wish.n
        # Of n answers the first reads the prompt, which the others then find remembered.
        cached = sum(min(w.cached for w in wholes[k : k + n]) for k in range(0, len(wholes), n))
        return shapes.usage([p.document for p in self.prompts], sum(len(w.tokens) for w in wholes), cached)

    def choice(self, k: int, whole: Whole) -> dict[str, Any]:
        echo = self.wish.echo and whole.finish != "content_filter"
        text = self.prompts[k // self.wish.n].text + whole.text if echo else whole.text
        return {"index": k, "text": text, "logprobs": self._logprobs(k, whole, echo)} | ended(whole.finish)

    def pieces(self, k: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        """-> the choices of the chunks that tell of a Delta."""
        echo = first and self.wish.echo
        text = self.prompts[k // self.wish.n].text + delta.text if echo else delta.text
        return [{"index": k, "text": text, "logprobs": self._logprobs(k, delta, echo)} | ended(delta.finish)]

    def _logprobs(self, k: int, part: Whole | Delta, echo: bool) -> dict[str, Any] | None:
        if self.wish.logprobs is None:
            return None
        tokens, logprobs, top = list(part.tokens[: len(part.logprobs)]), list(part.logprobs), list(part.top)
        for token, logprob, best in part.end:  # as vLLM: who counts tokens counts on it (lm-evaluation-harness)
            tokens, logprobs, top = [*tokens, token], [*logprobs, logprob], [*top, best]
        prompt = self.prompts[k // self.wish.n]
        if echo and prompt.scored:
            before, best = prompt.scored
            tokens, logprobs, top = prompt.document.tokens.tolist() + tokens, [*before, *logprobs], [*best, *top]
        return shapes.legacy_logprobs(self.names, tokens, logprobs, top, self._places[k])


class ChatForm(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, k: int, whole: Whole) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": k, "message": message, "logprobs": self._logprobs(k, whole, False)} | ended(whole.finish)

    def pieces(self, k: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        found = []
        if first:
            found.append({"delta": {"role": "assistant", "content": ""}, "logprobs": None})
        if delta.text or delta.logprobs:
            found.append({"delta": {"content": delta.text}, "logprobs": self._logprobs(k, delta, False)})
        if delta.finish:
            found.append({"delta": {}, "logprobs": None} | ended(delta.finish))
        return [{"index": k, "finish_reason": None} | piece for piece in found]

    def _logprobs(self, k: int, part: Whole | Delta, echo: bool) -> dict[str, Any] | None:
        if self.wish.logprobs is None:
            return None
        return shapes.chat_logprobs(self.names, part.tokens[: len(part.logprobs)], part.logprobs, part.top)


def ended(finish: str | None) -> dict[str, Any]:
    """-> finish_reason; where the server had to cut the answer for time, vLLM's stop_reason says so."""
    return {"finish_reason": finish and REASONS[finish]} | ({"stop_reason": finish} if finish == "timeout" else {})


async def whole(server: Server, http: Http, form: Form, answers: Following) -> dict[str, Any]:
    """-> the body of answers that are not streamed."""
    wholes = [Whole() for _ in answers.requests]
    try:
        async for k, delta in _timed(server, http, answers):
            wholes[k].add(delta)
    finally:
        server.count(http, usage := form.usage(wholes))
    return form.body([form.choice(k, whole) for k, whole in enumerate(wholes)], usage)


async def chunks(server: Server, http: Http, form: Form, answers: Following) -> AsyncIterator[dict[str, Any]]:
    """-> the bodies of the chunks."""
    wholes, begun = [Whole() for _ in answers.requests], set()
    try:
        async for k, delta in _timed(server, http, answers):
            wholes[k].add(delta)
            for piece in form.pieces(k, delta, k not in begun):
                yield form.chunk([piece])
            begun.add(k)
        if form.wish.include_usage:
            yield form.chunk([], form.usage(wholes))
    finally:
        server.count(http, form.usage(wholes))


async def _timed(server: Server, http: Http, answers: Following) -> AsyncIterator[tuple[int, Delta]]:
    first = True
    async for found in answers.deltas():
        if first:
            server.metrics.first.observe(time.monotonic() - http.state.began)
        first = False
        yield found


class Events(Response):
    """Server-sent events, one for each chunk, then [DONE]. The client may hang up at any time."""

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], opened: contextlib.ExitStack):
        """opened: closed at the end, whatever comes; the answers are in it."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first, self.rest, self.opened = first, rest, opened

    async def __call__(self, scope, receive, send) -> None:
        with self.opened:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await wire.while_there(receive, self._send(send))

    async def _send(self, send) -> None:
        async def event(text: str, more: bool = True) -> None:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})
            except TimeoutError:
                raise wire.ClientGone from None

        async with contextlib.aclosing(self.rest) as rest:
            await event(wire.encoded(self.first))
            try:
                async for chunk in rest:
                    await event(wire.encoded(chunk))
            except wire.ClientGone:
                raise
            except Exception as error:  # the status is sent already
                await event(wire.encoded(errors.of(error).body))
        await event("[DONE]", more=False)
