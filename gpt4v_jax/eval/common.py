"""What every evaluator shares: what is evaluated, the scores of documents, intervals."""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import stats

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import pipeline, sources
from gpt4v_jax.data.tokenizer import Tokenizer

DRAWS = 1000  # of a bootstrap
NORMAL = 1.959964  # 97.5 % of the normal distribution lie below it
# Metrics that are no share of right answers -> how the table calls them.
OTHERS = {
    "loss_a_character": "nats a character", "loss_a_letter": "nats a letter", "wer": "WER", "bleu": "BLEU",
    "chrf": "chrF", "plain": "R@1, plain",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the split it is evaluated on. `source` is the split's, read once."""

    run: config.Config
    layout: batch_lib.Layout
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    eval_step: Callable  # training.step.make_eval_step, compiled
    params: Any
    source: Any
    split: str
    check: Callable[[], None] = lambda: None  # called before every batch; may raise, to leave the work undone
    embed_step: Callable | None = None  # training.step.make_embed_step, compiled; None where the model has no space


@dataclasses.dataclass(frozen=True)
class Result:
    """`metrics`: flat numbers; `kinds`: {kind of question: (right, asked)}; `right`: of each question in order."""

    metrics: dict[str, float]
    kinds: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    right: tuple[bool, ...] = ()

    def counts(self, kind: str = "all") -> tuple[int, int]:
        """-> (right, asked) of a kind, or of all of them."""
        if kind == "all":
            return sum(right for right, _ in self.kinds.values()), sum(asked for _, asked in self.kinds.values())
        return tuple(self.kinds.get(kind, (0, 0)))

    def share(self, kind: str = "all") -> tuple[float, float, float]:
        """-> (share right, low and high end of its 95 % interval)."""
        right, asked = self.counts(kind)
        if kind == "all" and "low" in self.metrics:
            return right / asked, self.metrics["low"], self.metrics["high"]
        return right / asked if asked else math.nan, *interval(right, asked)


def open_source(run: config.Config, split: str, tokenizer: Tokenizer, layout: batch_lib.Layout, limit: int = 0):
    """-> the source of a split of run.data.name for evaluation: its own order, at most `limit` records (0: all)."""
    data = dataclasses.replace(run.data, limit=limit)
    return sources.from_records(sources.open_split(data, split), data, tokenizer, layout, seed=None)


def score(subject: Subject, source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (nats, trained tokens, exact) of each document of a source.

    `exact`: every target is the argmax given the targets before it, which holds if and only if greedy decoding gives
    exactly these targets; so one forward pass scores greedy answers. All processes call it, and get the same.
    """
    count = len(source.needs(0))
    nats, tokens, exact = np.zeros(count), np.zeros(count), np.zeros(count, bool)
    for number, nats_n, hit_n in positions(subject, source):
        nats[number], tokens[number] = nats_n.sum(), len(nats_n)
        exact[number] = hit_n.any() and hit_n.all()  # what could not be read is wrong
    if not tokens.all() and sharding.is_first():
        lost = int((tokens == 0).sum())
        why = "no row can hold them, or their media cannot be read"
        print(f"{lost:,} of {count:,} documents count as wrong: {why}", file=sys.stderr, flush=True)
    return nats, tokens, exact


def positions(subject: Subject, source):
    """-> (number, nats [n], was the target the argmax [n]) of each document that a row can hold, of its n trained
    positions."""
    shards = sharding.ways(subject.mesh, "batch")
    rows = -(-subject.run.eval.batch // shards) * shards
    share = sharding.local_rows(subject.mesh, rows)
    for batch, documents in pipeline.all_rows(source, subject.layout, rows, share):
        subject.check()
        placed = sharding.put_batch(batch, subject.mesh, rows)
        scores = subject.eval_step(subject.params, placed)
        # Each process has filled its own rows; what they gave is known to all.
        (nats_BT, hit_BT), document_BT, weight_BT = sharding.gather((scores, placed.document, placed.weight))
        for row, numbers in enumerate(documents):
            for k, number in enumerate(numbers, 1):
                at = (document_BT[row] == k) & (weight_BT[row] > 0)
                yield number, nats_BT[row][at], hit_BT[row][at]


def bootstrap(score: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """-> 95 % interval of score(numbers of the items), of `count` items drawn with replacement (Efron 1979)."""
    rng = np.random.default_rng(0)
    drawn = [score(rng.integers(count, size=count)) for _ in range(DRAWS)]
    return tuple(float(q) for q in np.quantile(drawn, (0.025, 0.975)))


def by_record(right: np.ndarray, records: np.ndarray) -> dict[str, float]:
    """right [n] bool of questions, records [n]: whose -> {"low", "high"} of the share right. The questions of a record
    go together: they count as fewer, by the design effect of a ratio of clusters (Kish 1965), at least 1. Of k records
    the effect itself is known with k - 1 degrees of freedom; of one alone it is not known."""
    _, index = np.unique(records, return_inverse=True)
    asked, hits, p, k = np.bincount(index), np.bincount(index, right), right.mean(), index.max() + 1
    if k == 1 < len(right):
        return {"low": 0.0, "high": 1.0}
    alone = p * (1 - p) * len(right)
    effect, quantile = 1.0, NORMAL
    if alone and k < len(right):
        effect = max(((hits - p * asked) ** 2).sum() / alone * k / (k - 1), 1.0)
        quantile = stats.t.ppf(0.975, k - 1)
    low, high = interval(right.sum() / effect, len(right) / effect, quantile)
    return {"low": low, "high": high}


def interval(right: float, asked: float, z: float = NORMAL) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927)."""
    if not asked:
        return 0.0, 1.0
    p = right / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * (p * (1 - p) / asked + z * z / (4 * asked * asked)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)
