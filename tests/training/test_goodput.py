"""Every second of a run belongs to one kind of work."""

import json

import pytest

from gpt4v_jax.training import goodput


@pytest.fixture
def now(monkeypatch):
    """A clock that stands until it is moved: now[0] += seconds."""
    time = [100.0]
    monkeypatch.setattr(goodput.time, "time", lambda: time[0])
    return time


def test_seconds_go_to_the_innermost(now, tmp_path):
    clock = goodput.Clock(tmp_path, 0, 90.0)
    now[0] += 1
    with clock.spent("step"):
        now[0] += 5
        with clock.spent("input"):
            now[0] += 2
        now[0] += 1
        with pytest.raises(ValueError), clock.spent("evaluation"):
            now[0] += 4
            raise ValueError
        now[0] += 3
    now[0] += 7
    expected = {"setup": 18, "compile": 0, "input": 2, "step": 9, "checkpoint": 0, "evaluation": 4}
    assert clock.total() == now[0] - 90 == sum(expected.values()) and clock.busy() == 11
    assert clock.seconds == expected
    assert clock.summary(5).startswith("goodput     27.3% of 33.0 s went into steps (setup 18.0 s, ")


def test_the_processes_of_a_run_stand_beside_each_other(now, tmp_path):
    """Ten steps, of which five are done again; five; another start from 5 that is no use; ten more. A second each."""
    for start, last in [(0, 10), (5, 10), (5, 10), (10, 20)]:
        clock = goodput.Clock(tmp_path, start, now[0])
        now[0] += 1
        with clock.spent("step"):
            now[0] += last - start
        clock.write(last)
        if start == 10:
            assert "in all 4 processes of the run 58.8% of 34.0 s" in clock.summary(last), "5 + 0 + 5 + 10"
    found = json.loads((tmp_path / "goodput.json").read_text())
    assert [(p["start"], p["step"], p["seconds"]["step"]) for p in found] == [(0, 10, 10), (5, 10, 5), (5, 10, 5),
                                                                              (10, 20, 10)]  # fmt: skip


def test_a_run_that_starts_anew_forgets_the_others(now, tmp_path):
    goodput.Clock(tmp_path, 0, 0.0).write(5)
    goodput.Clock(tmp_path, 0, 0.0).write(7)
    assert [p["step"] for p in json.loads((tmp_path / "goodput.json").read_text())] == [7]
