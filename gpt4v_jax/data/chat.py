"""Conversations -> documents: pieces with a role, so that loss masks are structural.

A document's trained tokens are the assistant's pieces and their `<end>`; a mask is never found again in the text.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from gpt4v_jax import batch as batch_lib


@dataclasses.dataclass(frozen=True)
class Medium:
    """A picture, clip or sound that is decoded when its row is filled; `shape` is Layout.views', known before that."""

    modality: str  # image | video | audio
    key: Hashable  # what its source reads it by
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one turn: text, or a medium."""

    role: str  # user | assistant
    ids: Sequence[int] = ()
    medium: Medium | None = None
    trained: bool = True  # False: an answer that is only there to be read


@dataclasses.dataclass(frozen=True)
class Document:
    """What fills n contiguous positions of a row; arrays of length n. target and weight are batch.Batch's."""

    tokens: np.ndarray  # int32
    target: np.ndarray  # int32
    weight: np.ndarray  # float32
    ar: np.ndarray  # bool
    media: tuple[tuple[int, Medium], ...] = ()  # (position of the first placeholder, the medium); in the source, if any
    source: tuple[int, ...] = ()  # tokens that a separate encoder reads
    source_at: tuple[int, ...] = ()  # position of the document that follows each of them; (): the first
    trained: np.ndarray | None = None  # bool: the tokens that are to be learnt; weight says where they are targets
    pair: "Document | None" = None  # a text that goes with these media: a document of its own, behind it in the row
    shifted: bool = True  # False: a position's target is its own token, before it was masked

    def __len__(self) -> int:
        return len(self.tokens)


def document(
    pieces: Iterable[Piece], special: dict[str, int], layout: batch_lib.Layout, answers_only: bool = True
) -> Document:
    """Lays turns one after the other: `<user>` pieces `<assistant>` pieces `<end>` ...; a medium is its placeholders.

    A conversation that ends with the user's turn is a prompt: `<assistant>` follows it, and nothing is trained. Where a
    separate encoder reads the user's turns (Layout.place "source"), they are the source. answers_only False: the user's
    text is trained, too, but for what lies in a block or in the source.
    """
    tokens, trained, ar, media = [], [], [], []
    source, source_at = [], []

    def lay(ids, train, block=False):
        tokens.extend(ids)
        trained.extend([train] * len(ids))
        ar.extend([True] + [not block] * (len(ids) - 1) if ids else [])

    def ask(ids, train=False, block=False):
        """The user's tokens, to where they belong."""
        if layout.place != "source":
            return lay(ids, train, block)
        source.extend(ids)
        source_at.extend([len(tokens)] * len(ids))

    role, train, first = "", False, 0
    for piece in pieces:
        if piece.role != role:
            if role == "assistant":
                lay([special["<end>"]], train)
            (ask if piece.role == "user" else lay)([special[f"<{piece.role}>"]], False)
            role = piece.role
            first = first or role == "assistant" and len(tokens)
        train = piece.trained and (role == "assistant" or not answers_only)
        if piece.medium:
            media.append((len(source if layout.place == "source" else tokens), piece.medium))
            count = layout.count(piece.medium.modality, piece.medium.shape)
            ask([special[f"<{piece.medium.modality}>"]] * count, block=layout.prefix != "none")
        else:
            (ask if role == "user" else lay)(list(piece.ids), train)
    lay([special["<end>" if role == "assistant" else "<assistant>"]], train and role == "assistant")
    if layout.prefix == "media+prompt":  # up to the first answer, trained or given: a later question is no prefix
        first = first or len(tokens)
        ar[1:first] = [False] * (first - 1)
    made = shifted(np.array(tokens, np.int32), np.array(trained), np.array(ar), tuple(media))
    return dataclasses.replace(made, source=tuple(source), source_at=tuple(source_at)) if source else made


def pair(
    media: Sequence[Piece], text: Sequence[Piece], special: dict[str, int], layout: batch_lib.Layout
) -> Document:
    """-> the media alone, and as its `pair` the text alone; each ends where all was read. None is trained."""
    one, other = (document(pieces, special, layout) for pieces in (media, text))
    if layout.prefix == "all":
        one, other = (dataclasses.replace(d, ar=np.zeros_like(d.ar)) for d in (one, other))
    return dataclasses.replace(one, pair=dataclasses.replace(other, weight=np.zeros_like(other.weight)))


def lengths(pieces: Sequence[Piece], layout: batch_lib.Layout) -> tuple[int, int]:
    """-> how many positions `document` will lay in the stream and in the source, without laying them."""
    total, role = {"user": 0, "assistant": 1}, ""
    for piece in pieces:
        if piece.role != role:
            total["assistant"] += role == "assistant"  # <end>
            total[piece.role] += 1
        total[piece.role] += (
            layout.count(piece.medium.modality, piece.medium.shape) if piece.medium else len(piece.ids)
        )
        role = piece.role
    if layout.place == "source":
        return total["assistant"], total["user"]
    return sum(total.values()), 0


def needs(pieces: Sequence[Piece], layout: batch_lib.Layout) -> tuple[int, ...]:
    """-> what a document takes of a row: what Layout.room has."""
    stream, source = lengths(pieces, layout)
    media = media_needs([p.medium for p in pieces if p.medium], layout)
    return (stream, *media, *([source] if layout.source else []))


def media_needs(media: Iterable[Medium], layout: batch_lib.Layout) -> tuple[int, ...]:
    """-> (items, patches) of each of batch.MEDIA, one after the other."""
    taken = [0] * (2 * len(batch_lib.MEDIA))
    for medium in media:
        k = 2 * batch_lib.MEDIA.index(medium.modality)
        views = layout.views(medium.modality, medium.shape)
        taken[k] += len(views)
        taken[k + 1] += sum(map(len, views))
    return tuple(taken)


def shifted(tokens, trained, ar, media=()) -> Document:
    """Next-token targets: position t outputs token t + 1, where that one is trained and opens a causal step."""
    target = np.append(tokens[1:], 0).astype(np.int32)
    weight = np.append((trained & ar)[1:], False).astype(np.float32)
    return Document(tokens, target, weight, ar, media, trained=trained)
