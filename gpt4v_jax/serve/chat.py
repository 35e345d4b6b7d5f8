"""OpenAI's messages -> turns -> the prompt of a conversation, with the media in their places."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.data import chat
from gpt4v_jax.generate import prompts
from gpt4v_jax.serve import schema
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.guards import Guard
from gpt4v_jax.training.workdir import Trained

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MESSAGE = {"role": schema.one_of(*ROLES), "content": schema.anything, "name": schema.text}
PARTS = {  # type -> (the field that holds it, the field's kind, the modality)
    "text": ("text", schema.text, None),
    "image_url": ("image_url", schema.section(url=schema.text, detail=schema.one_of("auto", "low", "high")), "image"),
    "video_url": ("video_url", schema.section(url=schema.text), "video"),
    "audio_url": ("audio_url", schema.section(url=schema.text), "audio"),
    "input_audio": ("input_audio", schema.section(data=schema.text, format=schema.text), "audio"),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A medium as a message has it: a URL, or base64."""

    modality: str
    url: str = ""
    data: str = ""
    where: str = ""  # such as messages[0].content[1]


Turn = tuple[str, list[str | Given]]


def turns(messages: Any, most_media: int) -> list[Turn]:
    """-> (role, texts and media in their order) of each message. Raises ApiError."""
    if not isinstance(messages, list) or not messages:
        raise schema.bad("messages", messages, "a list of at least one message")
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        given = schema.read(message, MESSAGE, where)
        if "role" not in given or "content" not in given:
            raise ApiError(f"{where}.{'content' if 'role' in given else 'role'} is missing", where)
        content = given["content"]
        parts = [content] if isinstance(content, str) else _parts(content, f"{where}.content")
        found.append((ROLES[given["role"]], parts))
    count = sum(isinstance(part, Given) for _, parts in found for part in parts)
    if count > most_media:
        raise ApiError(f"{count} media: give at most {most_media} a request", "messages", "too_many_media")
    return found


def _parts(content: Any, where: str) -> list[str | Given]:
    if not isinstance(content, list) or not content:
        raise schema.bad(where, content, "a text, or a list of parts")
    found = []
    for number, part in enumerate(content):
        here = f"{where}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str) or part["type"] not in PARTS:
            raise schema.bad(f"{here}.type", part.get("type") if isinstance(part, dict) else part,
                             f"one of {', '.join(PARTS)}")  # fmt: skip
        field, kind, modality = PARTS[part["type"]]
        given = schema.read(part, {"type": schema.text, field: kind}, here)
        needed = "data" if field == "input_audio" else "url"
        if field not in given or modality and needed not in given[field]:
            raise ApiError(f"{here}.{field}{f'.{needed}' if field in given else ''} is missing", here)
        found.append(Given(modality, where=here, **{needed: given[field][needed]}) if modality else given[field])
    return found


def texts(turns: Sequence[Turn]) -> list[str]:
    """-> what each side says at a time, for moderation: as the model reads it, with nothing between its parts, and,
    of several parts, with lines between them, too, so that neither hides a word."""
    found = []
    for _, run in itertools.groupby(turns, lambda turn: turn[0] == "assistant"):
        parts = [part for _, of_turn in run for part in of_turn if isinstance(part, str)]
        found += dict.fromkeys(("".join(parts), "\n".join(parts)))
    return found


async def fetched(turns: Sequence[Turn], guard: Guard, layout: batch_lib.Layout,
                  in_thread) -> list[tuple[str, bytes]]:  # fmt: skip
    """-> (modality, bytes) of each medium, in their order. in_thread(function, *arguments): awaits it."""
    found = []
    for medium in (part for _, parts in turns for part in parts if isinstance(part, Given)):
        with schema.naming(medium.where, "invalid_medium"):
            if medium.url:
                data = await guard.read(medium.modality, medium.url)
            else:
                data = await in_thread(guard.decode, medium.modality, medium.data)
            await in_thread(guard.check, medium.modality, data, layout)
        found.append((medium.modality, data))
    return found


def laid(trained: Trained, turns: Sequence[Turn],
         files: Sequence[tuple[str, bytes]]) -> tuple[chat.Document, prompts.Read | None]:  # fmt: skip
    """-> (the conversation's prompt, what reads its media). Takes as long as media take to be decoded."""
    with schema.naming("messages"):
        media, read = prompts.attach(trained.layout, files) if files else ((), None)
        left = iter(media)
        found = [(role, [part if isinstance(part, str) else next(left) for part in parts]) for role, parts in turns]
        return prompts.conversation(trained, found), read


async def prompt(here, turns: Sequence[Turn]) -> tuple[chat.Document, prompts.Read | None]:
    """-> `laid` of messages by `turns`, with their media. here: server.Server."""
    files = await fetched(turns, here.settings.guard, here.trained.layout, here.in_thread)
    return await here.in_thread(laid, here.trained, turns, files)
