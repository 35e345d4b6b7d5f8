"""Media and texts in one space (objective.contrastive): labels by the nearest text, and retrieval both ways."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, pipeline, records, sources
from gpt4v_jax.eval import common, retrieval


class Pairs:
    """Each record's media and its answer of one kind; of the kind "caption" where records have captions, the first.

    said(answer) -> the tokens that stand in the answer's place; None: its own.
    """

    def __init__(self, conversations: sources.Conversations, kind: str,
                 said: Callable[[str], Sequence[int]] | None = None):  # fmt: skip
        self.layout, self.special, self.read = conversations.layout, conversations.special, conversations.read
        self.items: list[tuple[int, tuple[chat.Medium, ...], records.Turn]] = []  # (record, media, text)
        for r, record in enumerate(conversations.records):
            turns = [(t, turn) for t, turn in enumerate(record.turns) if turn.kind == kind]
            if kind == "caption":
                turns = [(0, turn) for turn in record.captions[:1]] or turns
            for t, turn in turns:
                found = record.before(t + 1) if record.ordered else record.media
                turn = dataclasses.replace(turn, answer_ids=tuple(said(turn.answer))) if said else turn
                self.items += [(r, found, turn)] if found else []

    def _pieces(self, i: int):
        _, found, turn = self.items[i]
        return sources.paired(found, turn, drawn=-1)

    def needs(self, epoch: int) -> np.ndarray:
        both = [[chat.needs(part, self.layout) for part in self._pieces(i)] for i in range(len(self.items))]
        return np.array(both, int).reshape(-1, 2, len(self.layout.room)).sum(1)

    def document(self, epoch: int, i: int) -> chat.Document:
        return chat.pair(*self._pieces(i), self.special, self.layout)


def kinds(conversations: sources.Conversations) -> list[str]:
    """-> the kinds of texts that media have."""
    found = {turn.kind for record in conversations.records for turn in record.turns}
    return sorted(found | {"caption" for record in conversations.records if record.captions})


def embedded(subject: common.Subject, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (media [n,E], texts [n,E], which of them could be read [n])."""
    n, there, out = len(pairs.items), np.zeros(len(pairs.items), bool), None
    shards = sharding.ways(subject.mesh, "batch")
    rows = -(-subject.run.eval.batch // shards) * shards
    for batch, documents in pipeline.all_rows(pairs, subject.layout, rows, sharding.local_rows(subject.mesh, rows)):
        subject.check()
        placed = sharding.put_batch(batch, subject.mesh, rows)
        vectors = subject.embed_step(subject.params, placed)
        *vectors, id_BP = sharding.gather((*vectors, placed.pair.id))
        out = np.zeros((2, n, vectors[0].shape[-1]), np.float32) if out is None else out
        for row, numbers in enumerate(documents):
            out[:, numbers] = [x[row, : len(numbers)] for x in vectors]
            there[numbers] = id_BP[row, : len(numbers)] >= 0
    if out is None:
        raise config.InputError(f"{subject.run.data.name}: no row can hold a medium and its text")
    return *out, there


def _of_kinds(subject: common.Subject):
    """-> (kind, its pairs, their texts' tokens, `embedded` of them) of every kind that has some."""
    for kind in kinds(subject.source):
        pairs = Pairs(subject.source, kind)
        if pairs.items:
            yield kind, pairs, [turn.answer_ids for _, _, turn in pairs.items], embedded(subject, pairs)


def zero_shot(subject: common.Subject) -> common.Result:
    """Each record's media against every different text of its kind: the share whose own text is the nearest.

    With eval.prompts, such as "a picture of {}", the text's vector is the mean of those of its prompts, of length 1
    (CLIP, Radford et al. 2021, sec. 3.1.4).
    """
    counts, right, whose, metrics = {}, [], [], {}
    for kind, pairs, said, (media, texts, there) in _of_kinds(subject):
        if subject.run.eval.prompts:
            texts, there = _prompted(subject, kind)
        first = {text: i for i, text in reversed(list(enumerate(said))) if there[i]}  # the same vector each time
        names = sorted(first)
        nearest = (media @ texts[[first[name] for name in names]].T).argmax(1) if names else np.zeros(len(said), int)
        hits = [bool(here and names[k] == text) for here, k, text in zip(there, nearest, said, strict=True)]
        counts[kind], metrics[f"accuracy/{kind}"] = (sum(hits), len(hits)), float(np.mean(hits))
        right += hits
        whose += [r for r, _, _ in pairs.items]
    metrics |= {"accuracy": float(np.mean(right))} | common.by_record(np.array(right), np.array(whose))
    return common.Result(metrics, counts, tuple(right))


def _prompted(subject: common.Subject, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (of each answer the mean of its prompts' vectors [n,E], which of them could be read with all prompts [n])."""
    total, there = 0.0, True
    for prompt in subject.run.eval.prompts:
        def said(answer, prompt=prompt):
            return subject.tokenizer.encode(prompt.format(answer))

        _, texts, read = embedded(subject, Pairs(subject.source, kind, said))
        total, there = total + texts, there & read
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12), there


def recall(subject: common.Subject) -> common.Result:
    """Recall at 1, 5 and 10 among all texts, and among all media, of the kind: by the product of their vectors. Equal
    texts are one; `accuracy` is recall at 1 of the text."""
    counts, right, whose, metrics = {}, [], [], {}
    for kind, pairs, said, (media, texts, there) in _of_kinds(subject):
        scores = np.where(there[:, None] & there, media @ texts.T, -np.inf)
        for way, matrix in (("text", scores), ("medium", scores.T)):
            ranks = np.where(there, retrieval.ranked(matrix, said), np.inf)
            metrics |= {f"R@{k}/{kind}/{way}": float((ranks < k).mean()) for k in retrieval.AT}
            if way == "text":
                hits = [bool(rank < 1) for rank in ranks]
        counts[kind] = (sum(hits), len(hits))
        right += hits
        whose += [r for r, _, _ in pairs.items]
    metrics |= {"accuracy": float(np.mean(right))} | common.by_record(np.array(right), np.array(whose))
    return common.Result(metrics, counts, tuple(right))
