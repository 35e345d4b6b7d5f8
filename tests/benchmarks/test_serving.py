"""The page of continuous batching: what it says of numbers that are made up."""

from benchmarks import serving


def test_lengths_are_the_same_in_every_run_and_ragged():
    assert serving.lengths(48) == serving.lengths(48) == serving.lengths(96)[:48]
    assert min(serving.lengths(96)) == 4 and len(set(serving.lengths(96))) > 40
    assert set(serving.prompt_lengths(9, False)) == {serving.PROMPT}
    ragged = serving.prompt_lengths(96, True)
    assert 4 <= min(ragged) < max(ragged) <= 4 * serving.PROMPT and ragged != serving.lengths(96)


def test_ratios_are_of_the_same_round():
    found = {"whole batches": [(100, 1.0), (100, 2.0), (100, 4.0)], "padded": [(100, 4.0)] * 3,
             "continuous": [(100, 2.0), (100, 2.0), (100, 4.0)]}  # fmt: skip
    text = serving.report("of a kind", found, 48, False)
    assert "## Of a kind" in text and "48 requests" in text and "prompts of 32 to 32 tokens" in text
    assert "| whole batches | 50 (25 - 100) | 1.00 of it |" in text  # 0.5, 1 and 1
    assert "| padded | 25 (25 - 25) | 2.00 of it |" in text
