"""Questions, most about media: exact answers by kind, and the blind baselines that belong beside every such score."""

import collections

import numpy as np

from gpt4v_jax.data import sources
from gpt4v_jax.eval import common


def accuracy(subject: common.Subject) -> common.Result:
    """Share of questions whose greedy answer is exactly the true one; `loss` is nats an answer token."""
    return _ask(subject, sources.Questions(subject.source))


def permuted(subject: common.Subject) -> common.Result:
    """The same, each question asked of another record's media: what the model knows without its own."""
    count = len(subject.source.records)
    order = np.random.default_rng(0).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)  # one cycle through all: no medium stays in its place
    return _ask(subject, sources.Questions(subject.source, lambda record: int(other[record])))


def blanked(subject: common.Subject) -> common.Result:
    """The same with grey pictures and clips, and silence."""
    return _ask(subject, sources.Questions(subject.source, blank=True))


def counted(subject: common.Subject) -> common.Result:
    """No model: the answer that the training split gives most often to these words, else to this kind."""
    items = sources.Questions(subject.source).items
    words, kinds = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    training = sources.open_split(subject.run.data, "train")
    for record in sources.usable(training, subject.run.data):
        for kind, question, answer in sources.asked(record):
            words[question][answer] += 1
            kinds[kind][answer] += 1
    right = []
    for _, turn in items:
        seen = words.get(turn.question) or kinds[turn.kind]
        right.append(max(sorted(seen), key=seen.get, default=None) == turn.answer)
    return _by_kind(items, np.array(right), {})


def _ask(subject: common.Subject, questions: sources.Questions) -> common.Result:
    nats, tokens, exact = common.score(subject, questions)
    return _by_kind(questions.items, exact, {"loss": nats.sum() / tokens.sum()})


def _by_kind(items, right: np.ndarray, metrics: dict[str, float]) -> common.Result:
    kinds: dict[str, list[bool]] = {}
    for (_, turn), hit in zip(items, right, strict=True):
        kinds.setdefault(turn.kind, []).append(bool(hit))
    metrics = {"accuracy": right.mean()} | metrics | common.by_record(right, np.array([record for record, _ in items]))
    metrics |= {f"accuracy/{kind}": np.mean(hits) for kind, hits in kinds.items()}
    counts = {kind: (sum(hits), len(hits)) for kind, hits in kinds.items()}
    return common.Result(metrics, counts, tuple(map(bool, right)))
