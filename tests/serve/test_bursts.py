"""Several tokens at a time: the bits are those of single steps, and nobody need look at a token between them."""

import dataclasses

import numpy as np
import pytest

from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.generate import constrain, decode, sample
from gpt4v_jax.model import attention
from gpt4v_jax.serve import engine as engine_lib
from gpt4v_jax.serve import rows as rows_lib
from gpt4v_jax.serve import slots as slots_lib
from gpt4v_jax.serve.engine import Engine
from gpt4v_jax.serve.requests import Request
from tests import tiny
from tests.generate.test_decode import LETTERS, ask, make
from tests.serve.test_engine import Asked, Said, together
from tests.serve.test_rows import seat

SLOTS = 3
LAWS = [decode.GREEDY, rows_lib.DRAWN, sample.Sampling(0.7, top_k=9, top_p=0.8)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(slots_lib, "PAGE", 8)
    monkeypatch.setattr(rows_lib, "LEAST", 2)
    monkeypatch.setattr(attention, "LARGE", 1)
    monkeypatch.setattr(engine_lib, "LONGEST_BURST", 1e9)


@pytest.fixture(scope="module")
def trained():
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    return dataclasses.replace(make(context=64, size=0), tokenizer=tokenizer_lib.Tokenizer(letters, ("x",)))


@pytest.fixture
def engine(trained):
    found = Engine(trained, SLOTS)
    found._rows.bursts, found._pace = True, 0.01
    yield found
    found.close(0)


@pytest.fixture
def bursts(monkeypatch) -> list[tuple[int, int, int]]:
    """-> of each burst: how many rows somebody had, how many tokens were asked for and drawn."""
    kept, whole = [], rows_lib.Rows.burst

    def burst(self, rules, limit):
        tokens = whole(self, rules, limit)
        kept.append((len(self.live), limit, tokens.shape[1]))
        assert [s.length for s in self.seats] == self.state.cache.cursor.tolist()
        return tokens

    monkeypatch.setattr(rows_lib.Rows, "burst", burst)
    return kept


def requests(trained, n: int = 20, **more) -> list[Request]:
    return [Request(ask(trained, "ab" * (i + 1)), None, n + 7 * i, LAWS[i % 3], seed=i, **more) for i in range(5)]


def alone(trained, r: Request) -> tuple[str, tuple, str]:
    found = decode.generate(trained, [r.prompt], None, r.max_new_tokens, r.sampling, [r.seed])[0]
    return found.text, found.tokens, found.finish


def of(said: Said) -> tuple[str, tuple, str]:
    return said.text, said.tokens, said.finish


@pytest.mark.parametrize("law", LAWS[:2], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", tiny.fusions("concat", "cross_attention"))
def test_a_burst_has_the_bits_of_steps(name, law):
    """Of rows that go on to another page within it."""

    def found(at_once: int):
        rows, told = rows_lib.Rows(make(context=64, **tiny.FUSIONS[name]), SLOTS), []
        for i in range(SLOTS):
            seat(rows, i, 5 + i, i)
        rules = slots_lib.rules_of([law] * SLOTS, 64)
        for _ in range(12 // at_once):
            rows.prepare(at_once)
            told.append(rows.burst(rules, at_once) if at_once > 1 else np.asarray(rows.step(rules).tokens)[:, None])
        assert [len(s.pages) for s in rows.seats] == [-(-s.length // 8) for s in rows.seats]
        return np.concatenate(told, axis=1).tolist(), np.asarray(rows.state.hidden).tobytes()

    assert found(6) == found(4) == found(1)


def test_answers_are_those_of_steps(trained, engine, bursts):
    asked = requests(trained)
    assert [of(s) for s in together(engine, asked)] == [alone(trained, r) for r in asked]
    assert max(drawn for *_, drawn in bursts) > 1 and {rows for rows, *_ in bursts} == {SLOTS}  # all are taken
    assert engine.counts["steps_total"] < sum(r.max_new_tokens for r in asked)
    assert engine.counts["length"] + engine.counts["stop"] == len(asked)  # each has ended once


def test_an_end_token_ends_the_burst(trained, engine, bursts):
    """The row is free at once, and what others draw after it is not lost."""
    asked = [Request(ask(trained, "abc"), None, 40, rows_lib.DRAWN, seed=seed) for seed in range(12)]
    expected = [alone(trained, r) for r in asked]
    assert [of(s) for s in together(engine, asked)] == expected
    assert "stop" in {finish for *_, finish in expected}
    assert any(drawn < asked_for for _, asked_for, drawn in bursts)


@pytest.mark.parametrize("more", [
    dict(stop=("zz",)), dict(logprobs=2), dict(sampling=sample.Sampling(1.0, min_p=0.1)),
    dict(grammar=constrain.regex("[a-c]+")),
], ids=["a stop string", "log-probabilities", "another law", "a grammar"])  # fmt: skip
def test_somebody_looks_at_every_token_of(trained, engine, bursts, more):
    """... whom another row must not hurry past it."""
    watched = Request(ask(trained, "ab"), None, **{"max_new_tokens": 40, **more})
    together(engine, [watched, *(Request(ask(trained, "abc"), None, 12) for _ in range(SLOTS - 1))])
    assert not bursts


def test_one_row_that_is_free_ends_bursts(trained, engine, bursts):
    together(engine, requests(trained)[: SLOTS - 1])
    assert not bursts


def test_bursts_are_short_where_steps_are_slow(trained, engine, bursts, monkeypatch):
    """Steps of 10 s, whatever else has been quick: so long takes a burst, never a step that the device computes on."""
    clock, whole = [0.0], rows_lib.Rows.burst

    def slow(self, rules, limit):
        tokens = whole(self, rules, limit)
        clock[0] += 10 * tokens.shape[1]
        return tokens

    monkeypatch.setattr(rows_lib.Rows, "burst", slow)
    monkeypatch.setattr(engine_lib.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(engine_lib, "LONGEST_BURST", 35.0)
    engine._pace = engine_lib.LONGEST_BURST
    together(engine, requests(trained))
    first, *later = [limit for _, limit, _ in bursts]
    assert first == 1 and max(later) == 3


def test_who_leaves_goes_after_the_burst(trained, engine, bursts):
    *others, last = [Asked(engine, r, hold=i == SLOTS - 1) for i, r in enumerate(requests(trained, 40)[:SLOTS])]
    assert last.told.wait(60)
    last.ticket.cancel()
    last.go.set()
    found = last.said()
    assert found.finish == "cancelled" and len(found.tokens) == bursts[0][2] > 1
    assert {o.said().finish for o in others} <= {"length", "stop"}


@pytest.mark.parametrize("differs", ["nothing", "hidden", "cache"])
def test_bursts_of_other_bits_are_left_out(trained, monkeypatch, differs):
    whole = slots_lib.burst

    def burst(*args):
        tokens, n, state = whole(*args)
        found = {"hidden": state.replace(hidden=np.nextafter(state.hidden, 9)), "nothing": state,
                 "cache": state.replace(cache=state.cache.replace(k=tuple(np.nextafter(k, 9) for k in state.cache.k)))}
        return tokens, n, found[differs]

    monkeypatch.setattr(slots_lib, "burst", burst)
    rows = rows_lib.Rows(trained, SLOTS)
    assert not rows.bursts
    rows.find_sizes()
    assert rows.bursts == (differs == "nothing")
