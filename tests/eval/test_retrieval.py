"""Which text belongs to which picture: ranks by hand, and scores whose answer is known."""

import itertools
import types

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, files, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.eval import common, retrieval
from tests import tiny
from tests.data.test_media import png

TOKENIZER = tokenizer_lib.train("byte", [], 0)
LAYOUT = batch_lib.layout(tiny.make_config(context=40), config.Data())


def naive(scores, texts) -> list[float]:
    out = []
    for i in range(len(texts)):
        rank = 0.0
        for j in range(len(texts)):
            if texts[j] != texts[i]:
                rank += 1.0 if scores[i][j] > scores[i][i] else 0.5 if scores[i][j] == scores[i][i] else 0.0
        out.append(rank)
    return out


def test_ranks_are_those_counted_one_by_one():
    rng = np.random.default_rng(0)
    for n, kinds, values in itertools.product((1, 2, 7), (2, 100), (3, 10**6)):
        scores, texts = rng.integers(0, values, (n, n)).astype(float), rng.integers(0, kinds, n).tolist()
        assert retrieval.ranked(scores, texts).tolist() == naive(scores, texts)


def test_ties_and_equal_texts():
    scores = np.array([[5.0, 5.0, 6.0], [1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    assert retrieval.ranked(scores, ["a", "b", "c"]).tolist() == [1.5, 1, 0]
    assert retrieval.ranked(scores, ["a", "b", "a"]).tolist() == [0.5, 1, 0], "the third text is the first, too"
    assert retrieval.ranked(np.zeros((4, 4)), list("abcd")).tolist() == [1.5] * 4


def subject(captions, other=()) -> common.Subject:
    """A picture with each caption, and questions of another kind."""
    picture = type("Given", (files.File,), {"read": lambda self: png(np.zeros((4, 4, 3), np.uint8))})("image", "")
    turns = [files.Turn("caption", (picture, "what?"), text) for text in captions]
    turns += [files.Turn("name", (picture, "who?"), text) for text in other]
    records = [{"where": str(i), "turns": [turn]} for i, turn in enumerate(turns)]
    data = config.Data(name="given")
    source = sources.from_records(records, data, TOKENIZER, LAYOUT, seed=None)
    return types.SimpleNamespace(source=source, run=config.Config(data=data), layout=LAYOUT)


def recall(monkeypatch, subject, nats, lost=()) -> common.Result:
    """nats(n) -> [n, n], record by text. lost: records that cannot be read."""

    def score(_, pairs):
        tokens = np.ones((pairs.n, pairs.n))
        tokens[[i for i in lost if i < pairs.n]] = 0
        values = np.where(tokens > 0, nats(pairs.n), 0)  # as common.score gives it
        return values.ravel(), tokens.ravel(), None

    monkeypatch.setattr(common, "score", score)
    return retrieval.recall(subject)


TEXTS = [f"text {i}" for i in range(12)]


def test_where_its_own_text_is_best(monkeypatch):
    found = recall(monkeypatch, subject(TEXTS, ["x", "y"]), lambda n: 1 - np.eye(n))
    all_right = {f"R@{k}/{kind}": 1.0 for kind in ("caption", "name") for k in (1, 5, 10)}
    interval = dict(zip(("low", "high"), common.interval(14, 14), strict=True))
    assert found.metrics == all_right | {"accuracy": 1.0, "plain": 1.0} | interval
    assert found.kinds == {"caption": (12, 12), "name": (2, 2)} and found.right == (True,) * 14


def test_where_its_own_text_is_worst(monkeypatch):
    found = recall(monkeypatch, subject(TEXTS), lambda n: np.eye(n))
    assert [found.metrics[f"R@{k}/caption"] for k in (1, 5, 10)] == [0, 0, 0] and not any(found.right)


def test_a_text_that_is_likely_anyway_does_not_win(monkeypatch):
    """Text 0 is the likeliest beside every picture; each is yet likelier beside its own than elsewhere."""
    found = recall(monkeypatch, subject(TEXTS), lambda n: 5 + np.arange(n) * 3.0 - np.eye(n))
    assert found.metrics["R@1/caption"] == 1 and found.metrics["plain"] == 1 / 12


def test_where_all_scores_are_equal(monkeypatch):
    """Each own text stands in the middle of twelve, behind five and a half."""
    found = recall(monkeypatch, subject(TEXTS), lambda n: np.full((n, n), 2.0))
    assert [found.metrics[f"R@{k}/caption"] for k in (1, 5, 10)] == [0, 0, 1]
    rng = np.random.default_rng(0)
    drawn = [recall(monkeypatch, subject(TEXTS), lambda n: rng.random((n, n))).metrics for _ in range(30)]
    for k in (1, 5, 10):
        assert abs(np.mean([m[f"R@{k}/caption"] for m in drawn]) - k / 12) < 0.08


def test_equal_texts_are_one(monkeypatch):
    found = recall(monkeypatch, subject(["same"] * 5), lambda n: np.eye(n))
    assert found.metrics["R@1/caption"] == 1


def test_what_cannot_be_read_comes_last(monkeypatch):
    """Also where there are fewer texts than ten."""
    for count in (2, 12):
        found = recall(monkeypatch, subject(TEXTS[:count]), lambda n: 1 - np.eye(n), lost=(1,))
        assert found.right == tuple(i != 1 for i in range(count))
        assert [found.metrics[f"R@{k}/caption"] for k in (1, 5, 10)] == [pytest.approx(1 - 1 / count)] * 3
    found = recall(monkeypatch, subject(TEXTS[:3]), lambda n: 1 - np.eye(n), lost=(0, 1, 2))
    assert found.metrics["R@10/caption"] == 0


def test_pairs_are_every_text_beside_every_picture():
    one = subject(["red", "green", "blue"], ["x"])
    pairs = retrieval.Pairs(one.source, "caption")
    assert pairs.n == 3 and len(pairs.needs(0)) == 9
    for i in range(9):
        first, question, answer = pairs.pieces(i)
        assert first.medium.key[0][0] == i // 3 and TOKENIZER.decode(question.ids) == "what?"
        assert TOKENIZER.decode(answer.ids) == ["red", "green", "blue"][i % 3]
        document = pairs.document(0, i)
        assert len(document) == pairs.needs(0)[i][0] == chat.lengths(pairs.pieces(i), LAYOUT)[0]
        assert document.weight.sum() == len(answer.ids) + 1
