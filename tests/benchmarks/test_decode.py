"""The table of make bench-decode, from rounds that are written down here."""

import pytest

from benchmarks import decode


def _result(seconds: dict[str, float], cores: float = 2.0) -> dict:
    rounds = {rows: {name: [(n * s, n * s * cores) for n in (1, 2, 3)] for name, s in seconds.items()}
              for rows in decode.BATCHES}  # fmt: skip
    tokens = {rows: {name: [[1, 2, 3, 4]] * rows for name in seconds} for rows in decode.BATCHES}
    tokens[8][decode.INT8][0] = [1, 9, 3, 4]
    return {"facts": {name: {"bytes": 498e6} for name in seconds}, "rounds": rounds, "tokens": tokens, "new": 4}


def test_ratios_are_of_a_round():
    seconds = {decode.HF: 4.0, decode.OURS: 2.0, decode.INT8: 1.0, decode.W8A8: 0.8, decode.MEMORY: 0.1}
    result = _result(seconds)
    _, ours, int8, _ = decode.table(result, 8)
    assert ours["times_theirs"] == 2 and int8["times_theirs"] == 4 and int8["times_float32"] == 2
    assert ours["tokens_per_second"] == 8 * 4 / 4.0 and ours["ms_a_step"] == 1000
    assert int8["same_tokens"] == pytest.approx(1 - 0.75 / 8), "what stands behind the first other token does not count"
    read = decode.bytes_read(498e6, 8, 4)
    assert ours["share_of_memory"] == pytest.approx(read / 1.0 / (decode.READ / 0.2))
    text = "\n".join(decode.lines(result))
    assert "- batch 8: float32 2.00 x HF (bar 1.8); int8 2.00 x our float32 (bar 1), 4.00 x HF (aim 3); w8a8" in text
    assert "NOT VALID" not in text


def test_a_busy_machine_is_told():
    seconds = dict.fromkeys(decode.CONTESTANTS, 1.0)
    assert "NOT VALID: other load on this machine (`sum` got 1.20" in "\n".join(decode.lines(_result(seconds, 1.2)))


def test_memory_that_somebody_else_used_is_told():
    result = _result(dict.fromkeys(decode.CONTESTANTS, 1.0))
    assert not decode.busy(result)
    result["rounds"][1][decode.MEMORY] = [(1.0, 2.0), (2.5, 5.0), (2.5, 5.0)]
    assert "NOT VALID: at batch 1 the memory was somebody else's (`sum` took 1.00 to 2.50 s)" in decode.busy(result)


def test_bytes_of_a_step():
    assert decode.bytes_read(497_759_232, 1, 0) == (124_439_808 - 1024 * 768) * 4 + 12 * 2 * 768 * 4 * 32
