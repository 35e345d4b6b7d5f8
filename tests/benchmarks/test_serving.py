"""The page of continuous batching: what it says of numbers that are made up."""

from benchmarks import serving


def test_lengths_are_ragged_and_the_same_in_every_run():
    found = serving.lengths(48)
    assert found == serving.lengths(48) == serving.lengths(144)[:48]
    assert min(found) == 4 and max(found) <= serving.MOST and len(set(found)) > 30


def test_ratios_are_of_the_same_round():
    found = {"whole batches": [(100, 7, 1.0), (100, 7, 2.0), (100, 7, 4.0)], "padded": [(100, 9, 4.0)] * 3,
             "continuous": [(100, 8, 2.0), (100, 8, 2.0), (100, 8, 4.0)]}  # fmt: skip
    text = serving.report(found, 48)
    assert text.startswith("48 requests in 8 rows") and "3 rounds" in text
    assert "| whole batches | 7 | 50 (25 - 100) | 1.00 of it |" in text  # 0.5, 1 and 1
    assert "| padded | 9 | 25 (25 - 25) | 2.00 of it |" in text
