"""Where documents come from: a prepared data set, behind the few methods that packing and evaluation need.

A source has `sizes(epoch)` -> (lengths, media) of its documents, `document(epoch, i)`, and `picture(key)`; what is read
before the row plan is only lengths and text, pictures are decoded when their row is filled.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, datasets
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.data.transforms import decode_picture

CAPTION_PROMPT = "describe the picture."


def cache_dir(data: config.Data) -> Path:
    given = data.cache or os.environ.get("GPT4V_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "gpt4v_jax"


def open_builder(data: config.Data):
    """-> the TFDS builder of data.name; the data set is prepared when it is not there yet."""
    return datasets.prepare(data.name, str(cache_dir(data)), data.dir or os.environ.get("GPT4V_DATA_DIR", ""))


def splits(data: config.Data) -> list[str]:
    return sorted(open_builder(data).info.splits)


def open_split(data: config.Data, split: str):
    """-> the records of a split: len(), [i] -> dict; a picture is its file's bytes."""
    builder = open_builder(data)
    if split not in builder.info.splits:
        known = sorted(builder.info.splits)
        near = config.nearest(split, known)
        raise config.InputError(f"split {split!r} of {data.name} is none of: {', '.join(known)}{near}")
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    return builder.as_data_source(split, decoders=decoders)


def corpus(data: config.Data):
    """Every text of the training split, on which a tokenizer is trained."""
    records = open_split(data, "train")
    for i in range(limit(data, len(records))):
        record = records[i]
        if "text" in record:
            yield text_of(record["text"])
        else:
            yield from map(text_of, record["captions"])
            for _, question, answer in questions(record):
                yield from (question, answer)


def limit(data: config.Data, records: int) -> int:
    return min(data.limit or records, records)


def text_of(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def questions(record) -> list[tuple[str, str, str]]:
    """-> (kind, question, answer) of each question of a record."""
    fields = record["questions"]
    if not isinstance(fields, dict):  # tfds gives a list of dicts or a dict of lists, by how it was read
        fields = {name: [question[name] for question in fields] for name in ("kind", "question", "answer")}
    return [tuple(map(text_of, q)) for q in zip(fields["kind"], fields["question"], fields["answer"], strict=True)]


@dataclasses.dataclass(frozen=True)
class Turn:
    kind: str
    question: str
    answer: str
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class Conversations:
    """Pictures with captions and questions; a record's documents are picture and caption, `data.captions` times, and
    picture and `data.turns` questions, all drawn from (seed, epoch, record).

    A caption has a document of its own because beside it the questions can be answered without looking.
    """

    def __init__(self, records, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int):
        self._records = records
        self._data, self._seed = data, seed
        self.layout, self.special = layout, tokenizer.special
        if not layout.size:
            raise config.InputError("model.image.size=0, but the data set has pictures: set it, such as 72")
        encode = _remember(tokenizer.encode)
        self.captions: list[list[Turn]] = []  # of each record
        self.turns: list[list[Turn]] = []  # questions of each record
        self._documents: list[tuple[int, int]] = []  # (record, which of its captions; -1 means its questions)
        for i in range(limit(data, len(self._records))):
            record = self._records[i]
            captions = [("caption", CAPTION_PROMPT, text_of(c)) for c in record["captions"]]
            for turns, found in ((self.captions, captions), (self.turns, questions(record))):
                turns.append([Turn(*t, encode(t[1]), encode(t[2])) for t in found])
            self._documents += [(i, k) for k in range(-1 if data.turns else 0, min(data.captions, len(captions)))]

    def pieces(self, epoch: int, i: int) -> list[chat.Piece]:
        """Document i of the epoch."""
        record, k = self._documents[i]
        rng = np.random.default_rng((self._seed, epoch, record))
        if k < 0:
            order = rng.permutation(len(self.turns[record]))
            return turn_pieces(record, [self.turns[record][q] for q in order[: self._data.turns]])
        return turn_pieces(record, [self.captions[record][rng.permutation(len(self.captions[record]))[k]]])

    def sizes(self, epoch: int):
        return sizes(self, epoch, len(self._documents))

    def document(self, epoch: int, i: int) -> chat.Document:
        return chat.document(self.pieces(epoch, i), self.special, self.layout)

    def picture(self, key: int) -> np.ndarray:
        size = self.layout.size
        if self._data.pictures == "blank":
            return np.full((size, size, 3), 128, np.uint8)
        return decode_picture(self._records[key]["image"], size)


class Questions:
    """The questions of a split one by one: each is a document of its own, a picture and one turn."""

    def __init__(self, conversations: Conversations, picture_of=lambda record: record):
        self._picture_of = picture_of
        self.layout, self.special = conversations.layout, conversations.special
        self.items = [
            (record, turn) for record, turns in enumerate(conversations.turns) for turn in turns
        ]
        self.picture = conversations.picture

    def pieces(self, epoch: int, i: int) -> list[chat.Piece]:
        record, turn = self.items[i]
        return turn_pieces(self._picture_of(record), [turn])

    def sizes(self, epoch: int):
        return sizes(self, epoch, len(self.items))

    def document(self, epoch: int, i: int) -> chat.Document:
        return chat.document(self.pieces(epoch, i), self.special, self.layout)


def turn_pieces(picture: int, turns: list[Turn]) -> list[chat.Piece]:
    pieces = [chat.Piece("user", picture=picture)]
    for turn in turns:
        pieces += [chat.Piece("user", turn.question_ids), chat.Piece("assistant", turn.answer_ids)]
    return pieces


def sizes(source, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (positions, pictures) of each of `count` documents, each with one picture."""
    lengths = [chat.length(source.pieces(epoch, i), source.layout) for i in range(count)]
    return np.array(lengths), np.ones(count, int)


class Windows:
    """A text as windows of `context` tokens, each with the token that follows as its last target.

    In training they start at an offset drawn from (seed, epoch), and every epoch reads the whole text once; with
    seed None they start at 0, do not overlap, and cover the text up to the last whole window.
    """

    def __init__(self, ids: np.ndarray, layout: batch_lib.Layout, seed: int | None):
        self._ids, self._T, self._seed = ids.astype(np.int32), layout.context, seed
        if len(ids) < 2 * self._T:
            raise config.InputError(f"the text has {len(ids)} tokens, too few for two windows of {self._T}")

    def _offset(self, epoch: int) -> int:
        return 0 if self._seed is None else int(np.random.default_rng((self._seed, epoch, 1)).integers(self._T))

    def sizes(self, epoch: int):
        n = (len(self._ids) - 1 - self._offset(epoch)) // self._T
        return np.full(n, self._T), np.zeros(n, int)

    def document(self, epoch: int, i: int) -> chat.Document:
        T, start = self._T, self._offset(epoch) + i * self._T
        ids = self._ids[start : start + T + 1]
        return chat.Document(ids[:-1], ids[1:], np.ones(T, np.float32), np.ones(T, bool))

    def picture(self, key: int) -> np.ndarray:
        raise ValueError("a text has no pictures")


def _remember(encode):
    known: dict[str, tuple[int, ...]] = {}
    return lambda text: known.get(text) or known.setdefault(text, tuple(encode(text)))


def from_records(records, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int | None):
    """The records of a split -> documents to train on; windows of a text start at 0 with seed None (validation)."""
    if "text" in records[0]:
        return Windows(np.array(tokenizer.encode(text_of(records[0]["text"]))), layout, seed)
    return Conversations(records, data, tokenizer, layout, seed or 0)
