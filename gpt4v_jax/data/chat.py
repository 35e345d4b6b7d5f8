"""Conversations -> documents: pieces with a role, so that loss masks are structural.

A document's trained tokens are the assistant's pieces and their `<end>`; a mask is never found again in the text.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gpt4v_jax import batch as batch_lib


@dataclasses.dataclass(frozen=True)
class Piece:
    """One turn's text, or one picture (`picture`: its key in the source; `ids` is then empty)."""

    role: str  # user | assistant
    ids: Sequence[int] = ()
    picture: int = -1


@dataclasses.dataclass(frozen=True)
class Document:
    """What fills n contiguous positions of a row; arrays of length n. target and weight are batch.Batch's."""

    tokens: np.ndarray  # int32
    target: np.ndarray  # int32
    weight: np.ndarray  # float32
    ar: np.ndarray  # bool
    pictures: tuple[tuple[int, int], ...] = ()  # (position of the first placeholder, key in the source)
    source: tuple[int, ...] = ()  # tokens that a separate encoder reads

    def __len__(self) -> int:
        return len(self.tokens)


def document(pieces: Iterable[Piece], special: dict[str, int], layout: batch_lib.Layout) -> Document:
    """Lays pieces one after the other: `<user>` text `<assistant>` text `<end>` ...; a picture is its placeholders.

    A conversation that ends with the user's piece is a prompt: `<assistant>` follows it, and nothing is trained.
    """
    tokens, trained, ar, pictures = [], [], [], []

    def lay(ids, train, block=False):
        tokens.extend(ids)
        trained.extend([train] * len(ids))
        ar.extend([True] + [not block] * (len(ids) - 1))

    for piece in pieces:
        if piece.picture >= 0:
            pictures.append((len(tokens), piece.picture))
            lay([special["<image>"]] * layout.count("image")[0], False, block=layout.prefix != "none")
        elif piece.role == "user":
            lay([special["<user>"], *piece.ids, special["<assistant>"]], False)
        else:
            lay([*piece.ids, special["<end>"]], True)
    if layout.prefix == "media+prompt":
        first = trained.index(True) if True in trained else len(trained)
        ar[1:first] = [False] * (first - 1)
    return shifted(np.array(tokens, np.int32), np.array(trained), np.array(ar), tuple(pictures))


def length(pieces: Iterable[Piece], layout: batch_lib.Layout) -> int:
    """How many positions `document` will lay, without laying them."""
    extra = {"user": 2, "assistant": 1}
    return sum(layout.count("image")[0] if p.picture >= 0 else len(p.ids) + extra[p.role] for p in pieces)


def shifted(tokens, trained, ar, pictures=()) -> Document:
    """Next-token targets: position t outputs token t + 1, where that one is trained and opens a causal step."""
    target = np.append(tokens[1:], 0).astype(np.int32)
    weight = np.append((trained & ar)[1:], False).astype(np.float32)
    return Document(tokens, target, weight, ar, pictures)
