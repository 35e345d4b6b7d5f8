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
    assert found.p == pytest.approx(known.pvalue) and found.freedom == 3 and found.items is None
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


def test_equal_seeds_leave_the_test_of_items():
    """Where seeds agree only items vary: the one-sample t-test of the items' differences, or of the records'."""
    rng = np.random.default_rng(0)
    one, other = (np.repeat(rng.random((1, 60)) < share, 3, axis=0) for share in (0.7, 0.4))
    found = compare.difference(one.mean(1), other.mean(1), (one, other))
    known = stats.ttest_1samp(one[0].astype(float) - other[0], 0)
    assert found.seeds == pytest.approx(0, abs=1e-12)
    assert (found.p, found.freedom) == pytest.approx((known.pvalue, 59))
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))
    records = np.repeat(np.arange(20), 3)
    clustered = compare.difference(one.mean(1), other.mean(1), (one, other), records)
    by_record = (one[0].astype(float) - other[0]).reshape(20, 3).mean(1)
    known = stats.ttest_1samp(by_record, 0)
    assert (clustered.p, clustered.freedom) == pytest.approx((known.pvalue, 19))
    whole = compare.difference(one.mean(1), other.mean(1), (one, other), np.zeros(60, int))
    assert whole.items == 0, "of one record alone nothing is known"


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


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(spread):
    """Variants that are the same in truth: records, items, seeds and what is left vary. 95 % +- 3.3 are 3 sigma."""
    rng, runs, seeds, records, each = np.random.default_rng(1), 400, 3, 60, 5
    held = 0
    for _ in range(runs):
        shared = np.repeat(rng.normal(0, 1, records), each) + rng.normal(0, 1, records * each)

        def variant(shared=shared):
            taste = np.repeat(rng.normal(0, 0.6, records), each) + rng.normal(0, 0.6, records * each)
            return shared + taste + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.6, (seeds, records * each)) > 0

        one, other = variant(), variant()
        whose = np.repeat(np.arange(records), each)
        found = compare.difference(one.mean(1), other.mean(1), (one, other), whose)
        held += found.low <= 0 <= found.high
    assert 0.917 <= held / runs <= 0.99


def test_what_is_not_finite_is_not_judged():
    """Of NaN every comparison is false: neither better nor worse, whatever is best, and it stands among no others."""
    for lost in (float("nan"), float("inf")):
        found = compare.difference([0.5, lost, 0.5], [0.4, 0.4, 0.4])
        assert found.p is found.low is None
        assert {compare.verdict(found), compare.verdict(found, least_is_best=True)} == {compare.LOST}
        assert compare.holm([found.p, 0.001]) == [False, True]
        assert compare.over_seeds([0.5, lost]).low is None
