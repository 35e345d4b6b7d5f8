"""Texts, media and conversations -> prompts: documents that end where the answer begins."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, files, packing
from gpt4v_jax.data import media as media_lib
from gpt4v_jax.training.workdir import Trained

Read = Callable[[chat.Medium], Sequence[packing.Patches]]


def attach(layout: batch_lib.Layout, files: Sequence[tuple[str, bytes]]) -> tuple[tuple[chat.Medium, ...], Read]:
    """[(modality, a file's bytes)] -> (media for `prompt`, and what `generate` reads them by). Raises BadMedium."""
    for modality, _ in files:
        if not layout.reads(modality):
            raise config.InputError(f"this model reads no {modality}: leave it out")
    shapes = [media_lib.shape(m, lambda data=data: data, layout) for m, data in files]
    for (modality, _), shape in zip(files, shapes, strict=True):
        if modality == "audio" and shape[0] > layout.audio.seconds * 100:
            raise media_lib.BadMedium(f"a sound longer than model.audio.seconds={layout.audio.seconds}: cut it")
    found = tuple(chat.Medium(m, i, shape) for i, ((m, _), shape) in enumerate(zip(files, shapes, strict=True)))
    # Now, for packing leaves out a document with a medium that turns out to be bad.
    patches = [media_lib.patches(m.modality, files[m.key][1], m.shape, layout) for m in found]
    return found, lambda m: patches[m.key]


def prompt(trained: Trained, text: str, media: Sequence[chat.Medium] = ()) -> chat.Document:
    """-> the document of one user's turn; a model that was trained on plain text gets the plain text.

    Media go in front; or, where `<image>`, `<video>` or `<audio>` stands in the text as often as there are such media,
    into these places. Raises InputError where that does not work out.
    """
    special = trained.tokenizer.special
    if media and not trained.chats:
        raise config.InputError("this model was trained on plain text alone: leave the media out")
    if trained.chats:
        pieces = [
            chat.Piece("user", trained.tokenizer.encode(part)) if isinstance(part, str) else
            chat.Piece("user", medium=part) for part in _parts(text, media)
        ]  # fmt: skip
        return chat.document(pieces, special, trained.layout)
    if trained.run.model.source:
        start = [trained.tokenizer.id(token) for token in trained.run.data.start]
        if not start or None in start:
            raise config.InputError(f"data.start={trained.run.data.start!r} are no tokens: which ones start an answer?")
        return dataclasses.replace(plain(start), source=tuple(_not_empty(trained.tokenizer.prompt(text))))
    return plain(_not_empty(trained.tokenizer.prompt(text)))


def conversation(trained: Trained, turns: Sequence[tuple[str, Sequence[str | chat.Medium]]]) -> chat.Document:
    """-> the prompt of a conversation: turns are (role, texts and media in their order), the user's and the assistant's
    in turn, the user's last; the user's in a row are one. What `system` says is put before the user's next turn. Raises
    InputError for other orders."""
    if not trained.chats:
        raise config.InputError("this model was trained on plain text and knows no turns: give it a text to go on with")
    pieces, before = [], []
    for number, (role, parts) in enumerate(turns):
        config.one_of("role", role, ("system", "user", "assistant"))
        if role == "assistant" and (before or not number or turns[number - 1][0] != "user"):
            raise config.InputError(f"turn {number + 1} is the assistant's, and no user's is before it")
        if role == "assistant" and any(isinstance(part, chat.Medium) for part in parts):
            raise config.InputError(f"turn {number + 1} is the assistant's and has a medium: only the user's may")
        made = [chat.Piece(role, trained.tokenizer.encode(part), trained=False) if isinstance(part, str) else
                chat.Piece("user", medium=part) for part in parts]  # fmt: skip
        if not made:
            raise config.InputError(f"turn {number + 1} is empty: give it a text, be it an empty one, or leave it out")
        if role == "system":
            before += [dataclasses.replace(piece, role="user") for piece in made]
        else:
            pieces += before + made
            before = []
    if before or not turns or turns[-1][0] != "user":
        raise config.InputError("the last turn must be the user's: the answer is the assistant's")
    return chat.document(pieces, trained.tokenizer.special, trained.layout)


def _parts(text: str, media: Sequence[chat.Medium]) -> list[str | chat.Medium]:
    left = {name: [medium for medium in media if medium.modality == name] for name in batch_lib.MEDIA}
    marked = {name for name, found in left.items() if found and f"<{name}>" in text}  # of others a marker is plain text
    for name in marked:
        if text.count(f"<{name}>") != len(left[name]):
            raise config.InputError(f"{text.count(f'<{name}>')} <{name}> in the prompt, and {len(left[name])} files: "
                                    "write one for each, or none")
    parts, at = [medium for medium in media if medium.modality not in marked], 0
    for marker in files.MARKER.finditer(text):
        if marker[1] in marked:
            parts += [*([text[at : marker.start()]] if marker.start() > at else []), left[marker[1]].pop(0)]
            at = marker.end()
    return parts + [text[at:]] if text[at:] or not at else parts


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise config.InputError("the prompt is empty: a model of plain text needs at least one character")
    return ids


def plain(ids: Sequence[int]) -> chat.Document:
    """-> the document of a plain text's tokens."""
    return chat.shifted(np.array(ids, np.int32), np.zeros(len(ids), bool), np.ones(len(ids), bool))
