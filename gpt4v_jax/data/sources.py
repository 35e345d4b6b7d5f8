"""Where documents come from: prepared data sets, files, and mixtures of them, behind the few methods that packing and
evaluation need.

A source has `needs(epoch)`, what each document takes of a row (chat.needs), `document(epoch, i)`, and `read(medium)`,
its patches. What is read before the row plan is text and the headers of media; a medium is decoded when its row is
filled.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, datasets, files, media, objectives
from gpt4v_jax.data.bad import Bad
from gpt4v_jax.data.objectives import Task
from gpt4v_jax.data.records import Record, Turn
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.data.windows import Windows

CHUNK = 256  # records read at once
PAIR = -2  # in the place of a document's first turn


def cache_dir(data: config.Data) -> Path:
    given = data.cache or os.environ.get("GPT4V_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "gpt4v_jax"


def open_builder(data: config.Data):
    """-> the TFDS builder of data.name; one of ours is prepared when it is not there yet."""
    return datasets.prepare(data.name, str(cache_dir(data)), data.dir or os.environ.get("GPT4V_DATA_DIR", ""))


def splits(data: config.Data) -> list[str]:
    return files.splits(data.name) if files.named(data.name) else sorted(open_builder(data).info.splits)


def open_split(data: config.Data, split: str):
    """-> the records of a split: len(), [i] -> dict; media are their files' bytes."""
    if files.named(data.name):
        return files.open_split(data.name, split)
    builder = open_builder(data)
    if split not in builder.info.splits:
        known = sorted(builder.info.splits)
        near = config.nearest(split, known)
        raise config.InputError(f"split {split!r} of {data.name} is none of: {', '.join(known)}{near}")
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    records = builder.as_data_source(split, decoders=decoders)
    return datasets.adapted(records, builder.info.features) if data.name.startswith("tfds:") else records


def corpus(data: config.Data):
    """Every text of the training split, on which a tokenizer is trained."""
    for record in usable(open_split(data, "train"), data):
        if "text" in record:
            yield text_of(record["text"])
        elif "turns" in record:
            if record.get("system"):
                yield record["system"]
            for turn in record["turns"]:
                yield from (part for part in turn.parts if isinstance(part, str))
                yield turn.answer
        else:
            yield from map(text_of, record.get("captions", ()))
            for _, question, answer in questions(record):
                yield from (question, answer)


def read_all(records, count: int):
    """-> the first `count` records, one after the other; BadMedium in the place of one that cannot be used."""
    for first in range(0, count, CHUNK):
        numbers = list(range(first, min(first + CHUNK, count)))
        if hasattr(records, "__getitems__"):  # several times as fast as one by one
            yield from records.__getitems__(numbers)
            continue
        for i in numbers:
            try:
                record = records[i]
            except BadMedium as error:
                record = error
            yield record


def usable(records, data: config.Data):
    """The records that can be read; whoever makes documents of them counts the others."""
    return (r for r in read_all(records, limit(data, len(records))) if not isinstance(r, BadMedium))


def limit(data: config.Data, records: int) -> int:
    return min(data.limit or records, records)


def text_of(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def bytes_of(value) -> bytes:
    return value if isinstance(value, bytes) else np.asarray(value, np.uint8).tobytes()


def questions(record) -> list[tuple[str, str, str]]:
    """-> (kind, question, answer) of each question of a record."""
    fields = record["questions"]
    if not isinstance(fields, dict):  # tfds gives a list of dicts or a dict of lists, by how it was read
        fields = {name: [question[name] for question in fields] for name in ("kind", "question", "answer")}
    return [tuple(map(text_of, q)) for q in zip(fields["kind"], fields["question"], fields["answer"], strict=True)]


def asked(record) -> list[tuple[str, str, str]]:
    """-> `questions`, also of a conversation."""
    if "turns" not in record:
        return questions(record)
    return [(t.kind, "".join(part for part in t.parts if isinstance(part, str)), t.answer) for t in record["turns"]]


def media_of(record, turn: int = 0) -> list[tuple[str, bytes]]:
    """-> (modality, its file) of each medium of a record; of a conversation those of one turn's question."""
    if "turns" in record:
        return [(part.modality, part.read()) for part in record["turns"][turn].parts if not isinstance(part, str)]
    return [(name, bytes_of(record[name])) for name in batch_lib.MEDIA if name in record]


class Conversations:
    """Records of turns, most with media. A record of questions gives a document of `data.turns` of them, or as many as
    a row can hold, drawn from (seed, epoch, record), and one of each of `data.captions` captions; a conversation gives
    one document, or, where a row cannot hold it, one for each run of turns that fits. With task.pairs there is one more
    of each record with media: these alone, and one of its texts alone (chat.pair).

    A caption has a document of its own because beside it the questions can be answered without looking.
    """

    def __init__(self, records, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int | None,
                 task: Task | None = None):  # fmt: skip
        """task: what is made of each document; None: its answers' next tokens are learnt."""
        self.task = task or Task()
        if self.task.kind in ("span", "prefix"):
            raise config.InputError(f"data.objective={self.task.kind!r} is for plain text, and {data.name} holds "
                                    "conversations: use next_token or masked")
        self._records, self._data, self._seed = records, data, seed
        self.name, self.layout, self.special = data.name, layout, tokenizer.special
        self.records: list[Record] = []
        total = limit(data, len(records))
        # A share of the whole split: two of the hundred that an evaluation looks at are not yet two in a hundred.
        self.bad = Bad(data.name, len(records) if seed is None else total, data.bad)
        encode = _remember(tokenizer.encode)
        if "<user>" not in self.special:
            raise config.InputError(f"{data.name} holds conversations, and data.tokenizer={data.tokenizer!r} has no "
                                    "<user>: use byte, bpe or wordpiece")
        for i, raw in enumerate(read_all(records, total)):
            where = f"{data.name}: record {i}"
            try:
                if isinstance(raw, BadMedium):
                    raise raw
                where = raw.get("where", where)
                self.records.append(self._record(i, raw, encode))
            except BadMedium as error:
                self.bad.skip(getattr(error, "where", where), error)
        self._remembered = functools.lru_cache(maxsize=4)(self._needs)
        # Whether epochs differ in more than the order of documents.
        self._drawn = any(len(r.turns) > 1 and not r.ordered or len(r.captions) > 1 for r in self.records)
        # (record, first turn and turns; or -1, number of the caption; or PAIR, 0)
        self._documents: list[tuple[int, int, int]] = []
        for r, record in enumerate(self.records):
            if record.ordered:
                self._documents += [(r, first, count) for first, count in self._runs(record)]
            else:
                asked = [(r, 0, data.turns)] if data.turns and record.turns else []
                self._documents += asked + [(r, -1, k) for k in range(min(data.captions, len(record.captions)))]
            if self.task.pairs and all(record.pair):
                self._documents.append((r, PAIR, 0))

    def _record(self, i: int, raw: dict, encode) -> Record:
        found = []
        for name in batch_lib.MEDIA:
            if name in raw:
                found.append(self._medium(name, (i, name), functools.partial(bytes_of, raw[name])))
        if "turns" in raw:
            turns = []
            for number, turn in enumerate(raw["turns"]):
                asks = []
                for p, part in enumerate(turn.parts):
                    if isinstance(part, str):
                        asks.append(chat.Piece("user", encode(part)))
                    else:
                        asks.append(chat.Piece("user", medium=self._medium(part.modality, (i, number, p), part.read)))
                asked = "".join(part for part in turn.parts if isinstance(part, str))
                turns.append(Turn(turn.kind, asked, turn.answer, tuple(asks), encode(turn.answer)))
            return Record(i, (), tuple(turns), ordered=True, system=tuple(encode(raw.get("system", ""))))

        def turn(kind, question, answer):
            return Turn(kind, question, answer, (chat.Piece("user", encode(question)),), encode(answer))

        prompt = files.QUESTIONS[found[0].modality] if found else "describe it."
        captions = [turn("caption", prompt, text_of(c)) for c in raw.get("captions", ())]
        asked = [turn(*q) for q in questions(raw)] if "questions" in raw else []
        return Record(i, tuple(found), tuple(asked), tuple(captions))

    def _medium(self, modality: str, key, read: Callable[[], bytes]) -> chat.Medium:
        if not self.layout.reads(modality):
            section = {"image": "model.image.size=0", "video": "model.video.size=0", "audio": "model.audio.bins=0"}
            raise config.InputError(f"{self.name} has media of the kind {modality}, and {section[modality]}: set it")
        return chat.Medium(modality, key, media.shape(modality, read, self.layout))

    def _runs(self, record: Record) -> list[tuple[int, int]]:
        """-> (first turn, turns) of documents of a conversation, each as long as a row can hold. Those after the first
        begin with the system message and the media that were shown before, else their answers would be guesses."""
        runs, first = [], 0
        while first < len(record.turns):
            count = len(record.turns) - first
            while count > 1 and not self._fits(record, first, count):
                count -= 1
            runs.append((first, count))
            first += count
        return runs

    def _fits(self, record: Record, first: int, count: int) -> bool:
        need = chat.needs(_pieces(record, record.before(first), record.turns[first : first + count]), self.layout)
        return bool(np.all(np.array(need) <= self.layout.room))

    def pieces(self, epoch: int, i: int) -> list[chat.Piece]:
        """Document i of the epoch."""
        r, first, count = self._documents[i]
        record = self.records[r]
        found = record.media
        if record.ordered:
            found, turns = record.before(first), record.turns[first : first + count]
        elif first >= 0:
            turns = [record.turns[q] for q in self._order(epoch, record, record.turns)[:count]]
            while len(turns) > 1 and self._too_long(_pieces(record, found, turns)):
                turns.pop()
        else:
            turns = [record.captions[self._order(epoch, record, record.captions)[count]]]
        return [_drawn(piece, self._drawn_in(epoch)) for piece in _pieces(record, found, turns)]

    def _drawn_in(self, epoch: int) -> int:
        return epoch if self._data.augment and self._seed is not None else -1

    def _pair(self, epoch: int, i: int) -> tuple[list[chat.Piece], list[chat.Piece]]:
        """Document i of the epoch, which is a pair -> the pieces of its media, those of its text."""
        record = self.records[self._documents[i][0]]
        found, texts = record.pair
        text = texts[self._order(epoch, record, texts)[0]]
        return paired(found, text, self._drawn_in(epoch))

    def _too_long(self, pieces: list[chat.Piece]) -> bool:
        stream, source = chat.lengths(pieces, self.layout)
        return stream > self.layout.context or source > self.layout.source

    def _order(self, epoch: int, record: Record, turns):
        if len(turns) == 1:
            return [0]
        return np.random.default_rng((self._seed or 0, epoch, record.number)).permutation(len(turns))

    def needs(self, epoch: int) -> np.ndarray:
        return self._remembered(epoch if self._drawn else 0)

    def _needs(self, epoch: int) -> np.ndarray:
        rows = []
        for i, (_, first, _) in enumerate(self._documents):
            parts = self._pair(epoch, i) if first == PAIR else (self.pieces(epoch, i),)
            rows.append(np.sum([chat.needs(part, self.layout) for part in parts], axis=0))
        return np.array(rows, int).reshape(-1, len(self.layout.room))

    def document(self, epoch: int, i: int) -> chat.Document:
        if self._documents[i][1] == PAIR:
            return chat.pair(*self._pair(epoch, i), self.special, self.layout)
        made = chat.document(self.pieces(epoch, i), self.special, self.layout, self.task.answers_only)
        return self.task(made, epoch, i)

    def read(self, medium: chat.Medium, blank: bool = False):
        """-> its views' patches, or what `blank` makes of them. Raises BadMedium where it cannot be decoded, and counts
        it."""
        key, drawn = medium.key
        where = f"{self.name}: record {key[0]}"
        rng = None if drawn < 0 else np.random.default_rng((self._seed, drawn, key[0], 3))
        try:
            raw = self._records[key[0]]
            where = raw.get("where", where)
            if isinstance(key[1], str):
                data = bytes_of(raw[key[1]])
            else:
                data = raw["turns"][key[1]].parts[key[2]].read()
            return media.patches(
                medium.modality, data, medium.shape, self.layout, blank or medium.modality in self._data.blank,
                self._data.augment, rng,
            )  # fmt: skip
        except BadMedium as error:
            self.bad.skip(getattr(error, "where", where), error)
            raise


def _pieces(record: Record, found: tuple[chat.Medium, ...], turns) -> list[chat.Piece]:
    first = [chat.Piece("user", record.system)] if record.system else []
    first += [chat.Piece("user", medium=medium) for medium in found]
    return [*first, *(piece for turn in turns for piece in turn.pieces)]


def paired(found: tuple[chat.Medium, ...], text: Turn, drawn: int) -> tuple[list[chat.Piece], list[chat.Piece]]:
    """-> the pieces of media alone, and of a text alone."""
    return [_drawn(chat.Piece("user", medium=m), drawn) for m in found], [chat.Piece("assistant", text.answer_ids)]


def _drawn(piece: chat.Piece, drawn: int) -> chat.Piece:
    """The piece, its medium's key with the epoch by which it is augmented; -1: it is not."""
    if not piece.medium:
        return piece
    return dataclasses.replace(piece, medium=dataclasses.replace(piece.medium, key=(piece.medium.key, drawn)))


def _exchanged(pieces: list[chat.Piece], others: tuple[chat.Medium, ...]) -> list[chat.Piece]:
    """The pieces with their media in the places of `others`, modality by modality; what has no counterpart stays."""
    left = {name: itertools.cycle([m for m in others if m.modality == name]) for name in batch_lib.MEDIA}
    return [
        dataclasses.replace(p, medium=next(left[p.medium.modality], p.medium)) if p.medium else p for p in pieces
    ]  # fmt: skip


class Questions:
    """The questions of a source one by one: each is a document of its own, its record's media and one turn.

    media_of(record number in the source) -> another record's, for the baseline that permutes them; blank: for the one
    that has only their places.
    """

    def __init__(
        self, conversations: Conversations, media_of: Callable[[int], int] = lambda record: record, blank: bool = False
    ):
        self._media_of, self._records = media_of, conversations.records
        self.layout, self.special = conversations.layout, conversations.special
        self.read = functools.partial(conversations.read, blank=blank)
        self.asked = [(r, t) for r, record in enumerate(self._records) for t in range(len(record.turns))]
        self.items = [(r, self._records[r].turns[t]) for r, t in self.asked]

    def pieces(self, epoch: int, i: int, answered: bool = True) -> list[chat.Piece]:
        r, t = self.asked[i]
        record, other = self._records[r], self._records[self._media_of(r)]
        # A turn of a conversation is asked after those before it, whose answers are given and not scored.
        turns = record.turns[: t + 1] if record.ordered else [record.turns[t]]
        pieces = _pieces(record, record.media, turns)
        if other is not record:
            pieces = _exchanged(pieces, other.all_media)
        pieces = [dataclasses.replace(p, trained=False) for p in pieces[:-1]] + pieces[-1:]
        return [_drawn(piece, -1) for piece in (pieces if answered else pieces[:-1])]

    def needs(self, epoch: int) -> np.ndarray:
        rows = [chat.needs(self.pieces(epoch, i), self.layout) for i in range(len(self.items))]
        return np.array(rows, int).reshape(-1, len(self.layout.room))

    def document(self, epoch: int, i: int) -> chat.Document:
        return chat.document(self.pieces(epoch, i), self.special, self.layout)


def _remember(encode):
    known: dict[str, tuple[int, ...]] = {}
    return lambda text: known.get(text) or known.setdefault(text, tuple(encode(text)))


def _texts(records, data: config.Data, bad: Bad):
    for i, record in enumerate(read_all(records, limit(data, len(records)))):
        if isinstance(record, BadMedium):
            bad.skip(getattr(record, "where", f"{data.name}: record {i}"), record)
        else:
            yield text_of(record["text"])


def from_records(
    records, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int | None, share: float = 1.0,
    objective: config.Objective | None = None,
):  # fmt: skip
    """The records of a split -> documents. seed None: for evaluation, in order and not augmented. share: only so much
    of the beginning, of the records or of a text's tokens. objective: documents are made for it and data.objective;
    None: answers' next tokens are learnt, and all of a text's."""
    if not len(records):
        raise config.InputError(f"{data.name} has no record")
    task = objective and task_of(data.objective, objective, data, tokenizer, layout, seed)
    first = next(usable(records, data), {})
    if "text" in first:
        bad = Bad(data.name, len(records), data.bad)
        return Windows(_texts(records, data, bad), data, tokenizer, layout, seed, bad, share, task)
    if share < 1:
        data = dataclasses.replace(data, limit=max(round(share * limit(data, len(records))), 1))
    return Conversations(records, data, tokenizer, layout, seed, task)


def task_of(kind: str, objective: config.Objective, data: config.Data, tokenizer, layout: batch_lib.Layout, seed):
    return Task(kind, objective, tokenizer, seed, objectives.longest(data, layout.context))
