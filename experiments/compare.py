"""What can be said of a few seeds: means with intervals, and differences between variants on the same test items.

A difference has two sources of chance: seeds (train again, and it comes out otherwise) and items (ask other questions).
Each has an interval by Student's t:

- from the variance of the seeds' differences over the number of seeds, with one degree of freedom fewer than seeds, and
- from the variance over records of the difference in their items, mean over seeds: records, since the questions of
  one go together (a ratio of clusters, as in gpt4v_jax/eval/common.py), with one degree of freedom fewer than records,

and half the interval of both is the root of the sum of the two halves' squares (Howe 1974; Zou and Donner 2008: MOVER).
Satterthwaite's degrees of freedom would be less wide, but with three seeds they are large just when the seeds happen to
agree: of 15 pairs of equal variants one stood at "5 % for all" in up to 30 % of simulated sweeps; so, in 4 % at most
(tests/experiments/test_compare.py). What both hold (how an item comes out under a seed) is counted twice, which errs to
the wide side. So three seeds are enough where the questions are what varies, and where the seeds are, the
t-distribution with two degrees of freedom says how little three of them are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.05
BETTER, WORSE, NEITHER, ALONE = "better", "worse", "not distinguishable", "one seed: not judged"
LOST = "not finite: not judged"


class Mean(NamedTuple):
    """low, high: a 95 % interval; None where there is a single seed."""

    mean: float
    low: float | None = None
    high: float | None = None


class Difference(NamedTuple):
    """One variant less another. p: two-sided, that they are the same; None with a single seed, or where a value is not
    finite, as are the others."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    seeds: float | None = None  # standard error by the seeds alone
    items: float | None = None  # and by the items alone; None where they are not known


def over_seeds(values: Sequence[float]) -> Mean:
    """-> the mean of one value a seed and its interval by Student's t: what another seed's mean would be like."""
    n, mean = len(values), float(np.mean(values))
    if n < 2 or not math.isfinite(mean):
        return Mean(mean)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1) * np.std(values, ddof=1) / n**0.5)
    return Mean(mean, mean - half, mean + half)


def difference(one: Sequence[float], other: Sequence[float], right: tuple[np.ndarray, np.ndarray] | None = None,
               records: np.ndarray | None = None) -> Difference:  # fmt: skip
    """one, other: a metric of each of the same seeds. right: of both [seeds, items] what was right, items in the same
    order; records [items]: whose each is, None: each is one of its own. Without `right` only seeds count."""
    each = np.asarray(one, float) - np.asarray(other, float)
    mean, seeds = float(each.mean()), len(each)
    if seeds < 2 or not math.isfinite(mean):
        return Difference(mean)
    by_seeds, by_items, clusters = float(each.std(ddof=1)) / seeds**0.5, 0.0, 2
    if right is not None:
        by_items, clusters = _over_items((right[0].astype(float) - right[1]).mean(0), records)

    def half(level: float) -> float:
        return math.hypot(*special.stdtrit([seeds - 1, clusters - 1], level / 2) * [by_seeds, by_items])

    p = float(abs(mean) < 1e-12)
    if math.hypot(by_seeds, by_items) > 1e-12 and not p:  # else all seeds and items say the same
        p = _level(lambda level: half(level) - abs(mean))
    wide = half(LEVEL)
    return Difference(mean, mean - wide, mean + wide, p, by_seeds, by_items if right is not None else None)


def _level(too_wide) -> float:
    """-> the level whose interval just reaches 0."""
    low = -600.0  # e to the power of it, which is 0 to all that read it
    if too_wide(math.exp(low)) <= 0:
        return 0.0
    return math.exp(optimize.brentq(lambda log: too_wide(math.exp(log)), low, 0.0, xtol=1e-10))


def _over_items(differences: np.ndarray, records: np.ndarray | None) -> tuple[float, int]:
    """differences [items] -> (standard error of their mean, number of clusters, 2 or more)."""
    index = np.arange(len(differences)) if records is None else np.unique(records, return_inverse=True)[1]
    clusters, n = int(index.max()) + 1, len(differences)
    if clusters < 2:
        return 0.0, 2
    residual = np.bincount(index, differences) - differences.mean() * np.bincount(index)
    return float((residual**2).sum() * clusters / (clusters - 1)) ** 0.5 / n, clusters


def verdict(found: Difference, least_is_best: bool = False) -> str:
    """-> BETTER, WORSE or NEITHER, by whether the interval leaves out 0."""
    if not math.isfinite(found.mean):
        return LOST
    if found.p is None:
        return ALONE
    if found.low <= 0 <= found.high:
        return NEITHER
    return BETTER if (found.mean > 0) != least_is_best else WORSE


def holm(p: Sequence[float | None]) -> list[bool]:
    """-> which of several tests stand at 5 % for all of them together (Holm 1979)."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    out = [False] * len(p)
    for rank, (value, i) in enumerate(known):
        if value > LEVEL / (len(known) - rank):
            break
        out[i] = True
    return out
