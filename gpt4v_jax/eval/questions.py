"""Questions, most about media: exact answers by kind, and the blind baselines that belong beside every such score."""

import collections
import sys

import numpy as np

from gpt4v_jax import sharding
from gpt4v_jax.data import sources
from gpt4v_jax.eval import common


def accuracy(subject: common.Subject) -> common.Result:
    """Share of questions whose greedy answer is exactly the true one; `loss` is nats an answer token."""
    return _ask(subject, sources.Questions(subject.source))


def permuted(subject: common.Subject) -> common.Result:
    """The same, each question asked of another record's media: what the model knows without its own. Questions without
    media are asked as they are."""
    return _ask(subject, sources.Questions(subject.source, others(subject.source.records).__getitem__))


def others(records) -> list[int]:
    """-> for each record another one that has media of all its kinds, of equal ones the next in a drawn cycle; itself
    where it has none, or no other has such, which is said."""
    order = np.random.default_rng(0).permutation(len(records))
    kinds = [frozenset(medium.modality for medium in record.all_media) for record in records]
    other, alone = list(range(len(records))), 0
    for wanted in set(kinds) - {frozenset()}:
        having = [int(r) for r in order if kinds[r] >= wanted]
        for here, after in zip(having, [*having[1:], having[0]], strict=True):
            if kinds[here] == wanted:
                other[here] = after
                alone += here == after
    if alone and sharding.is_first():
        print(f"{alone:,} of {len(records):,} records keep their media: no other has such", file=sys.stderr, flush=True)
    return other


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
