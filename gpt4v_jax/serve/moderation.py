"""What requests and answers may not say: word lists, and classifiers of our own training. docs/moderation.md

Refusals are counted by (category, where) and logged, never with the text.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt4v_jax import config
from gpt4v_jax.generate import classify
from gpt4v_jax.serve import folding
from gpt4v_jax.training import workdir

WHERE = ("request", "answer")
# What stands in or between words, and is left out of both: "mother-in-law" is three words.
BETWEEN = re.compile(r"[\s_'’‘.,\-\u2010-\u2015]")
COMMENT = re.compile(r"(^|\s)#.*")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WordList:
    """An entry of the file's "words"."""

    category: str = ""
    entries: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # of entries, one a line, beside the file; from "#" on a line is a comment
    where: tuple[str, ...] = WHERE
    substrings: bool = False  # entries are found within words, too

    def __post_init__(self):
        _named(self.category, self.where)


@dataclasses.dataclass(frozen=True)
class Head:
    """An entry of the file's "classifiers"."""

    category: str = ""
    workdir: str = ""  # of the trained model, beside the file
    labels: tuple[str, ...] = ()  # all answers that it was trained to give
    refuse: tuple[str, ...] = ()  # those that refuse
    threshold: float = 0.9  # of their probability together
    question: str = "{}"  # what was asked in training, {} for the text
    lower: bool = False  # the text in small letters, where the training texts were
    where: tuple[str, ...] = WHERE

    def __post_init__(self):
        _named(self.category, self.where)
        if not self.workdir:
            raise config.InputError("workdir is missing: name the folder of a trained run")
        if not self.refuse:
            raise config.InputError(f"refuse is missing: name those of labels={list(self.labels)} that refuse")
        for label in self.refuse:
            config.one_of("refuse", label, self.labels)
        if not 0 < self.threshold <= 1:
            raise config.InputError(f"threshold={self.threshold} must be a probability, above 0 and at most 1")


class Moderation:
    """Made by `load`. Thread-safe."""

    def __init__(self, lists: Sequence[tuple[WordList, "Words"]], heads: Sequence[tuple[Head, classify.Classifier]]):
        self._lists, self._heads = tuple(lists), tuple(heads)
        rows = [row for row, _ in (*lists, *heads)]
        # Of a score of `scores`: what reaches it refuses.
        self.thresholds = {row.category: 1.0 for row in rows} | {head.category: head.threshold for head, _ in heads}
        self._refused = collections.Counter({(row.category, where): 0 for row in rows for where in row.where})
        self._lock = threading.Lock()

    def check(self, text: str, where: str) -> str | None:
        """-> the category that refuses a whole text, or None; word lists are asked first. where: request | answer.

        A refusal is counted and logged. Raises InputError for a text that a classifier's tokenizer cannot read.
        """
        refused = self._listed(text, where, ended=True)
        for head, classifier in self._heads if refused is None else ():
            if where in head.where and _probability(head, classifier, text) >= head.threshold:
                refused = head.category
                break
        return self._told(refused, where, text)

    def words(self, text: str, where: str, ended: bool = False) -> str | None:
        """The same by the word lists alone, for an answer that grows: give it all of it so far, again and again.

        The last word is not looked at before something ends it, for "hell" may become "hello", unless the text has
        `ended`. folding.settled(text) says how much of the text has been looked at, and may be shown.
        """
        return self._told(self._listed(text, where, ended), where, text)

    def scores(self, text: str) -> dict[str, float]:
        """-> of each category the classifier's probability of its labels that refuse; 1 where a word list has the text,
        0 where none has. Wherever the category applies; nothing is counted."""
        folded = folding.fold(text)
        found = dict.fromkeys(self.thresholds, 0.0)
        for row, words in self._lists:
            found[row.category] = max(found[row.category], float(words.within(folded)))
        for head, classifier in self._heads:
            found[head.category] = max(found[head.category], _probability(head, classifier, text))
        return found

    def refusals(self) -> dict[tuple[str, str], int]:
        """-> how often `check` and `words` have refused, by (category, where); also those that never did."""
        with self._lock:
            return dict(self._refused)

    def _listed(self, text: str, where: str, ended: bool) -> str | None:
        config.one_of("where", where, WHERE)
        lists = [(row, words) for row, words in self._lists if where in row.where]
        folded = folding.fold(text) if lists else ""
        return next((row.category for row, words in lists if words.within(folded, ended)), None)

    def _told(self, category: str | None, where: str, text: str) -> str | None:
        if category is not None:
            with self._lock:
                self._refused[category, where] += 1
            log.warning("refused: category=%s where=%s length=%d", category, where, len(text))
        return category


class Words:
    """The entries of a word list, as folding.fold has them."""

    def __init__(self, row: WordList, entries: Sequence[str]):
        """Raises InputError for entries that could not be found, and for none."""
        if not entries:
            raise config.InputError(f"the category {row.category!r} has no words: give entries or files")
        self._parts: list[str] = []  # substrings
        self._runs: dict[int, set[tuple[str, ...]]] = collections.defaultdict(set)  # number of words -> the entries
        for entry in entries:
            folded = folding.fold(entry)
            words = tuple(folding.words(folded))
            odd = BETWEEN.sub("", folding.signs(folded))
            if row.substrings and folded.strip():
                self._parts.append(" ".join(folded.split()))
            elif row.substrings or not words:
                raise config.InputError(f"the entry {entry!r} has nothing that is looked for: remove it")
            elif odd:
                raise config.InputError(f"the entry {entry!r} has {odd[0]!r}, which is no part of a word: put it into "
                                        "a list with substrings=true")
            else:
                self._runs[len(words)].add(words)

    def within(self, folded: str, ended: bool = True) -> bool:
        """Whether a folded text has one of them. Of substrings one search each, of whole words one look-up for each
        word and length of an entry: no search goes back."""
        if self._parts:
            flat = " ".join(folded.split())
            return any(part in flat for part in self._parts)
        words = folding.words(folded)
        if words and not ended and not folding.ended(folded):
            words.pop()
        return any(
            not runs.isdisjoint(zip(*(words[k:] for k in range(count)), strict=False))
            for count, runs in self._runs.items()
        )


def load(path: Path | str) -> Moderation:
    """Reads a moderation file (docs/moderation.md) with its word lists and models; paths in it are relative to it.

    Raises InputError, which names file, key and value.
    """
    path = Path(path)
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise config.InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or not values:
        raise config.InputError(f'{path} must be a JSON object with "words", "classifiers" or both')
    for key, value in values.items():
        with _within(str(path)):
            config.one_of("key", key, ("words", "classifiers"))
            if not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
                raise config.InputError(f"{key}={_short(value)} must be a list of objects")
    lists, heads, opened = [], [], {}
    for i, given in enumerate(values.get("words", ())):
        row = config.parse(given, WordList, f"{path}: words[{i}]")
        with _within(f"{path}: words[{i}]"):
            lists.append((row, Words(row, [*row.entries, *_entries(row, path.parent)])))
    for i, given in enumerate(values.get("classifiers", ())):
        head = config.parse(given, Head, f"{path}: classifiers[{i}]")
        with _within(f"{path}: classifiers[{i}]"):
            if any(head.category == other.category for other, _ in heads):
                raise config.InputError(f"category={head.category!r} has a classifier already: give this one another")
            folder = path.parent / head.workdir
            opened[folder] = opened.get(folder) or workdir.restore(folder)
            heads.append((head, classify.Classifier(opened[folder], head.labels, head.question)))
    return Moderation(lists, heads)


def _probability(head: Head, classifier: classify.Classifier, text: str) -> float:
    """-> of the labels that refuse, in the window where it is highest."""
    text = folding.clean(text)
    p = classifier.probabilities(text.lower() if head.lower else text)
    return float(p[:, [label in head.refuse for label in classifier.labels]].sum(axis=1).max())


def _entries(row: WordList, folder: Path) -> list[str]:
    """-> those of a list's files."""
    lines = [COMMENT.sub("", line).strip() for file in row.files for line in _read(folder / file).splitlines()]
    return [line for line in lines if line]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise config.InputError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x}") from error


@contextlib.contextmanager
def _within(place: str):
    """What is wrong in this block is wrong at `place`."""
    try:
        yield
    except config.InputError as error:
        raise config.InputError(f"{place}: {error}") from error


def _named(category: str, where: tuple[str, ...]) -> None:
    if not category.strip():
        raise config.InputError("category is missing: name what is refused")
    for place in where:
        config.one_of("where", place, WHERE)
    if not where:
        raise config.InputError(f"where=[] applies nowhere: name {' or '.join(WHERE)}, or leave it out")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
