"""POST /v1/chat/completions and /v1/completions."""

import contextlib
import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.generate import prompts, score
from gpt4v_jax.serve import chat, schema, server, stream
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.follow import Following
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.stream import Prompt
from gpt4v_jax.serve.wire import Reply, while_there
from gpt4v_jax.training.workdir import Trained

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(http: Http) -> Response:
    here = server.of(http)
    given = await here.read(http, schema.CHAT)
    wish = schema.asked(given, here.trained.run.model.vocab)
    if wish.n > (most := here.settings.queued):  # the queue would never have room for all
        raise ApiError(f"n={wish.n} must be at most {most} here: so many answers may wait", "n", "invalid_value")
    turns = await here.in_thread(chat.turns, given.get("messages"), here.settings.max_media)

    async def prepared() -> list[Prompt]:
        for text in chat.texts(turns):
            await here.check_text(text)
        return [Prompt(*await chat.prompt(here, turns))]

    found = await while_there(http.receive, prepared())
    return await answered(here, http, wish, found, stream.ChatForm, "messages")


@router.post("/v1/completions")
async def completions(http: Http) -> Response:
    here = server.of(http)
    given = await here.read(http, schema.COMPLETION)
    wish = schema.asked(given, here.trained.run.model.vocab)
    asked = several("prompt", given.get("prompt"))
    if len(asked) * wish.n > here.settings.queued:
        raise ApiError(f"{len(asked)} prompts with {wish.n} answers each: at most {here.settings.queued} answers a "
                       "request", "prompt", "too_many_prompts")  # fmt: skip
    here.check_lengths("prompt", asked)

    async def prepared() -> list[Prompt]:
        found = await here.in_thread(lambda: [text_prompt(here.trained, one) for one in asked])
        for one in found:
            await here.check_text(one.text, "prompt")
        return found

    return await answered(here, http, wish, await while_there(http.receive, prepared()), stream.Form, "prompt")


async def answered(here: Server, http: Http, wish: schema.Asked, asked: list[Prompt], form: type[stream.Form],
                   field: str) -> Response:  # fmt: skip
    """Queues the prompts' requests and answers with what comes of them, whole or as a stream."""
    more = {"user": http.state.user, "seconds": here.settings.seconds}
    requests = [request for one in asked for request in schema.requests(
        wish, one.document, one.read, here.trained.layout.context, field, **more)]  # fmt: skip
    if wish.echo and wish.logprobs is not None:
        asked = await while_there(http.receive, scored(here, asked, wish.logprobs))
    with contextlib.ExitStack() as opened:
        answers = opened.enter_context(Following(here, requests))

        await while_there(http.receive, answers.submit())
        made = form(here, wish, asked)
        if not wish.stream:
            return Reply(await while_there(http.receive, stream.whole(here, http, made, answers)))
        chunks = stream.chunks(here, http, made, answers)
        # An answer that fails at once fails with its status, not in the stream.
        first = await while_there(http.receive, anext(chunks))
        return stream.Events(first, chunks, opened.pop_all())


async def scored(here: Server, asked: list[Prompt], most: int) -> list[Prompt]:
    """-> the prompts with their own log-probabilities; once for all answers, and not on the engine's thread, where all
    others would wait for what has to be compiled."""
    async with here.beside():
        found = [await here.in_turn(score.prompt, here.trained, one.document, one.read, most) for one in asked]
    return [dataclasses.replace(one, scored=told) for one, told in zip(asked, found, strict=True)]


def several(name: str, value: Any) -> list[str | list[int]]:
    """-> the texts, or lists of token ids, that a text, a list of texts, token ids or lists of token ids are."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise schema.bad(name, value, "a text, a list of texts, a list of token ids, or a list of such lists")
    if all(type(one) is int for one in value):
        return [value]
    for one in value:
        if not isinstance(one, str) and not (isinstance(one, list) and one and all(type(id) is int for id in one)):
            raise schema.bad(name, one, "in each of its places a text, or a list of token ids")
    return value


def text_prompt(trained: Trained, asked: str | list[int], name: str = "prompt") -> Prompt:
    """-> the prompt of a text that the model goes on with, be it one that was trained on conversations."""
    with schema.naming(name):
        if isinstance(asked, list):
            ids, text = known_ids(trained, asked, name), trained.tokenizer.decode(asked)
        elif trained.chats:
            ids, text = trained.tokenizer.prompt(asked), asked
        else:
            return Prompt(prompts.prompt(trained, asked), None, asked)
        if not ids:
            raise schema.bad(name, asked, "a text that is not empty")
        if trained.run.model.source and not trained.chats:
            document = dataclasses.replace(prompts.prompt(trained, "x"), source=tuple(ids))
        else:
            document = prompts.plain(ids)
        return Prompt(document, None, text)


def known_ids(trained: Trained, ids: list[int], name: str) -> list[int]:
    """Raises ApiError for what is no token, and for the placeholders of media."""
    vocab = trained.run.model.vocab
    media = {trained.tokenizer.special.get(f"<{name}>") for name in batch_lib.MEDIA}
    for id in ids:
        if not 0 <= id < vocab:
            raise ApiError(f"{name} has the token {id}: the vocabulary has 0 to {vocab - 1}", name, "invalid_value")
        if id in media:
            raise ApiError(f"{name} has the token {id}, which stands for a medium: send it as a part of a message",
                           name, "invalid_value")  # fmt: skip
    return ids
