"""Statistics against closed forms and cases whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from experiments import compare


def test_interval_of_known_numbers():
    mean, low, high = compare.over_seeds([0.5, 0.6, 0.7])
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom, from any table
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert compare.over_seeds([0.5]) == (0.5, None, None)


def test_without_items_it_is_the_paired_t_test():
    one, other = [0.61, 0.66, 0.64, 0.7], [0.55, 0.64, 0.6, 0.61]
    found, known = compare.difference(one, other), stats.ttest_rel(one, other)
    assert found.p == pytest.approx(known.pvalue) and found.items is None
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


def test_equal_seeds_leave_the_test_of_items():
    """Where seeds agree only items vary: the one-sample t-test of the items' differences, or of the records'."""
    rng = np.random.default_rng(0)
    one, other = (np.repeat(rng.random((1, 60)) < share, 3, axis=0) for share in (0.7, 0.4))
    found = compare.difference(one.mean(1), other.mean(1), (one, other))
    known = stats.ttest_1samp(one[0].astype(float) - other[0], 0)
    assert found.seeds == pytest.approx(0, abs=1e-12)
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))
    records = np.repeat(np.arange(20), 3)
    clustered = compare.difference(one.mean(1), other.mean(1), (one, other), records)
    by_record = (one[0].astype(float) - other[0]).reshape(20, 3).mean(1)
    known = stats.ttest_1samp(by_record, 0)
    assert clustered.p == pytest.approx(known.pvalue)
    whole = compare.difference(one.mean(1), other.mean(1), (one, other), np.zeros(60, int))
    assert whole.items == 0, "of one record alone nothing is known"


def test_seeds_and_items_make_one_interval():
    """Half of it is the root of the sum of the squares of the halves, and p is the level at which it reaches 0."""
    rng = np.random.default_rng(0)
    right = rng.random((2, 3, 400)) < np.array([0.6, 0.5])[:, None, None] + rng.normal(0, 0.02, (2, 3, 1))
    one, other = right.mean(-1)
    found = compare.difference(one, other, tuple(right))
    halves = found.seeds * stats.t.isf(0.025, 2), found.items * stats.t.isf(0.025, 399)
    assert found.high - found.mean == pytest.approx(np.hypot(*halves))
    at_p = found.seeds * stats.t.isf(found.p / 2, 2), found.items * stats.t.isf(found.p / 2, 399)
    assert np.hypot(*at_p) == pytest.approx(abs(found.mean)) and 0 < found.p < 1


def test_verdicts():
    right = np.random.default_rng(0).random((3, 50)) < 0.5
    same = compare.difference(right.mean(1), right.mean(1), (right, right))
    assert (same.mean, same.p) == (0, 1) and compare.verdict(same) == compare.NEITHER
    assert compare.verdict(compare.difference([0.5], [0.9])) == compare.ALONE
    all_right, none = np.ones((3, 50), bool), np.zeros((3, 50), bool)
    sure = compare.difference(all_right.mean(1), none.mean(1), (all_right, none))
    assert sure.low == sure.high == 1 and compare.verdict(sure) == compare.BETTER
    assert compare.verdict(sure, least_is_best=True) == compare.WORSE
    noisy = compare.difference([0.5, 0.6, 0.7], [0.45, 0.62, 0.6])
    assert noisy.low < 0 < noisy.high and compare.verdict(noisy) == compare.NEITHER


def test_holm():
    # of three: 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.06 > 0.05
    assert compare.holm([0.06, 0.01, 0.02]) == [False, True, True]
    assert compare.holm([0.02, 0.03, 0.03]) == [False, False, False], "the first that falls stops the others"
    assert compare.holm([None, 0.01]) == [False, True]


@pytest.mark.parametrize("spread, power", [(0.0, 0.8), (0.1, 0.8), (1.0, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread, power):
    """Variants that are the same in truth: records, items, seeds and what is left vary. At least 95 % - 3.3 (3 sigma);
    they err to the wide side, and yet a variant that is better by a good deal is called so."""
    rng, runs, seeds, records, each = np.random.default_rng(1), 400, 3, 60, 5
    held = called = 0
    for _ in range(runs):
        shared = np.repeat(rng.normal(0, 1, records), each) + rng.normal(0, 1, records * each)

        def variant(gain=0.0, shared=shared):
            taste = np.repeat(rng.normal(0, 0.6, records), each) + rng.normal(0, 0.6, records * each)
            left = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.6, (seeds, records * each))
            return shared + taste + left + gain > 0

        one, other, better = variant(), variant(), variant(0.8)
        whose = np.repeat(np.arange(records), each)
        same, ahead = (compare.difference(x.mean(1), other.mean(1), (x, other), whose) for x in (one, better))
        held += same.low <= 0 <= same.high
        called += compare.verdict(ahead) == compare.BETTER
    assert held / runs >= 0.917 and called / runs >= power


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.08])
def test_equal_variants_have_no_star(spread):
    """In 5 % of sweeps at most, also where seeds vary more than items and sometimes agree by chance. 400 sweeps of six
    equal variants; of 5 % 8.3 % are 3 sigma above."""
    rng, variants, seeds, items, starred = np.random.default_rng(3), 6, 3, 1000, 0
    for _ in range(400):
        share = 0.5 + rng.normal(0, spread, (variants, seeds, 1))
        right = rng.random((variants, 1, items)) < share  # every seed of a variant meets an item alike
        values = right.mean(-1)
        pairs = [compare.difference(values[i], values[j], (right[i], right[j])) for i in range(6) for j in range(i)]
        starred += any(compare.holm([pair.p for pair in pairs]))
    assert starred / 400 <= 0.083


def test_what_is_not_finite_is_not_judged():
    """Of NaN every comparison is false: neither better nor worse, whatever is best, and it stands among no others."""
    for lost in (float("nan"), float("inf")):
        found = compare.difference([0.5, lost, 0.5], [0.4, 0.4, 0.4])
        assert found.p is found.low is None
        assert {compare.verdict(found), compare.verdict(found, least_is_best=True)} == {compare.LOST}
        assert compare.holm([found.p, 0.001]) == [False, True]
        assert compare.over_seeds([0.5, lost]).low is None
