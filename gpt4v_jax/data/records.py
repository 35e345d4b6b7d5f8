"""A record as it is known before its media are decoded: what is shown, asked and answered."""

import dataclasses

from gpt4v_jax.data import chat


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer. `asks`: the user's pieces, which may hold media besides the text."""

    kind: str
    question: str
    answer: str
    asks: tuple[chat.Piece, ...]
    answer_ids: tuple[int, ...]

    @property
    def pieces(self) -> tuple[chat.Piece, ...]:
        return (*self.asks, chat.Piece("assistant", self.answer_ids))


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a record before its media are decoded. `media` come before the first question."""

    number: int  # in the split
    media: tuple[chat.Medium, ...]
    turns: tuple[Turn, ...]
    captions: tuple[Turn, ...] = ()
    ordered: bool = False  # a conversation, whose turns stay as they are
    system: tuple[int, ...] = ()  # a conversation's first words, in front of each document that is made of it

    def before(self, turn: int) -> tuple[chat.Medium, ...]:
        """-> the media of the record and of its turns before this one."""
        asked = (piece.medium for t in self.turns[:turn] for piece in t.asks if piece.medium)
        return (*self.media, *asked)

    @property
    def pair(self) -> tuple[tuple[chat.Medium, ...], tuple[Turn, ...]]:
        """-> media and what is said of them, one of which is their text: the captions, or else the answers; of a
        conversation the first turn."""
        if self.ordered:
            return self.before(1), self.turns[:1]
        return self.media, self.captions or self.turns

    @property
    def all_media(self) -> tuple[chat.Medium, ...]:
        return self.before(len(self.turns))
