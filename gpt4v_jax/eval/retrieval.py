"""Which text belongs to which picture, by the likelihood of the text: recall at 1, 5 and 10, by kind of question."""

import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat, sources
from gpt4v_jax.eval import common

AT = (1, 5, 10)


class Pairs:
    """Every answer of one kind beside every record's media: document i is record i // n with answer i % n."""

    def __init__(self, conversations: sources.Conversations, kind: str):
        self.layout, self.special, self.read = conversations.layout, conversations.special, conversations.read
        self._questions = sources.Questions(conversations)
        self._asked = [i for i, (_, turn) in enumerate(self._questions.items) if turn.kind == kind]
        self.n, self.records = len(self._asked), [self._questions.items[i][0] for i in self._asked]

    def pieces(self, i: int) -> list[chat.Piece]:
        medium, answer = divmod(i, self.n)
        asked = self._questions.pieces(0, self._asked[medium], answered=False)
        return [*asked, self._questions.pieces(0, self._asked[answer])[-1]]

    def needs(self, epoch: int) -> np.ndarray:
        return np.array([chat.needs(self.pieces(i), self.layout) for i in range(self.n**2)])

    def document(self, epoch: int, i: int) -> chat.Document:
        return chat.document(self.pieces(i), self.special, self.layout)


def recall(subject: common.Subject) -> common.Result:
    """Each record's media against all texts of its kind: the share whose own text is the most likely one.

    A text's score is its log-likelihood given the media, less its mean over all media: else texts that are likely
    anyway win everywhere; "plain" is recall at 1 without that. "R@5" counts a text among the five best. Texts that are
    equal are one.
    """
    metrics, kinds, right, plain, records = {}, {}, [], [], []
    for kind in sorted({turn.kind for record in subject.source.records for turn in record.turns}):
        pairs = Pairs(subject.source, kind)
        nats, tokens, _ = common.score(subject, pairs)
        scores, there = (-nats).reshape(pairs.n, pairs.n), (tokens > 0).reshape(pairs.n, pairs.n)
        mean = scores.sum(axis=0, where=there) / np.maximum(there.sum(axis=0), 1)
        texts = [pairs.pieces(i)[-1].ids for i in range(pairs.n)]
        ranks, as_they_are = (ranked(np.where(there, s, -np.inf), texts) for s in (scores - mean, scores))
        ranks[~np.diag(there)] = as_they_are[~np.diag(there)] = np.inf  # one that cannot be read is wrong
        metrics |= {f"R@{k}/{kind}": float((ranks < k).mean()) for k in AT}
        kinds[kind] = (int((ranks < 1).sum()), pairs.n)
        right += [bool(rank < 1) for rank in ranks]
        plain += [bool(rank < 1) for rank in as_they_are]
        records += pairs.records
    if not kinds:
        raise config.InputError(f"{subject.run.data.name} has no questions to tell records apart by")
    metrics |= {"accuracy": float(np.mean(right)), "plain": float(np.mean(plain))}
    metrics |= common.by_record(np.array(right), np.array(records))
    return common.Result(metrics, kinds, tuple(right))


def ranked(scores: np.ndarray, texts) -> np.ndarray:
    """scores [n records, n texts], text i belonging to record i -> [n] how many other texts score higher than a
    record's own; a tie counts as half a text, and texts equal to its own do not count."""
    own = np.diag(scores)[:, None]
    other = np.array([[a != b for b in texts] for a in texts])
    above = (other & (scores > own)).sum(1)
    return above + 0.5 * (other & (scores == own)).sum(1)
