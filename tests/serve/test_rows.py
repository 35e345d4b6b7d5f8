"""Rows and pages: whose they are, that neither their number nor their place changes a bit, and what is left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax.generate import decode, prompts
from gpt4v_jax.model import attention
from gpt4v_jax.serve import prefix
from gpt4v_jax.serve import rows as rows_lib
from gpt4v_jax.serve import slots as slots_lib
from tests import tiny
from tests.generate.test_decode import make

DRAWN = rows_lib.DRAWN


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(slots_lib, "PAGE", 8)
    monkeypatch.setattr(rows_lib, "LEAST", 2)
    monkeypatch.setattr(attention, "LARGE", 1)


@pytest.fixture(scope="module")
def trained():
    return make(context=64)


def seat(rows, who, length, seed=0, more=0):
    """A request whose prompt has so many tokens, of its own."""
    document = prompts.plain(np.random.default_rng(seed).integers(3, 20, length).tolist())
    *_, (hidden, cache, _) = prefix.filled(rows.trained, document, None, 128, prefix.Prefixes(0))
    rows.seat(who, document, hidden, cache, seed, more)


def step(rows, law=DRAWN) -> dict:
    """-> the token of each who has a row."""
    rows.prepare()
    told = rows.step(slots_lib.rules_of([law] * len(rows.seats), 64))
    return {who: int(told.tokens[i]) for i, who in enumerate(rows.who) if who is not None}


def held(rows) -> list[int]:
    return sorted(page for seat in rows.seats if seat for page in seat.pages)


def test_a_row_has_as_many_pages_as_it_is_long(trained):
    rows = rows_lib.Rows(trained, 3)
    seat(rows, "a", 7)
    seat(rows, "b", 8)  # full: the next token needs a page
    assert [len(s.pages) for s in rows.seats if s] == [1, 2] and len(set(held(rows))) == 3
    step(rows)
    step(rows)
    assert [(s.length, len(s.pages)) for s in rows.seats if s] == [(9, 2), (10, 2)] and len(set(held(rows))) == 4
    rows.leave(rows.who.index("a"))
    seat(rows, "c", 20, 1)
    assert len(set(held(rows))) == 5 and sorted(rows.live) == ["b", "c"]
    assert rows.pages in rows.page_sizes and rows.page_sizes[-1] == 3 * 8


def test_neither_place_nor_company_changes_a_token(trained):
    """Of "b": alone; between rows that come, grow and leave, so that its pages move."""

    def said(company: bool) -> list[int]:
        rows, tokens, moves = rows_lib.Rows(trained, 4), [], []
        move = rows._move
        rows._move = lambda *to: (moves.append(to), move(*to))
        if company:
            seat(rows, "a", 30, 1)
        seat(rows, "b", 5, 2)
        for i in range(30):
            if company and i in (3, 6):
                seat(rows, i, 40 + i, i)
            if company and i in (8, 9, 10):
                rows.leave(rows.who.index({8: "a", 9: 3, 10: 6}[i]))
            tokens.append(step(rows)["b"])
        if company:
            assert len({to[1] for to in moves}) > 2 and moves[-1][1] < max(to[1] for to in moves)  # and shrank
        return tokens

    assert said(True) == said(False)


def test_a_page_is_left_as_if_nobody_had_had_it(trained, monkeypatch):
    """Also where NaN was in it."""
    monkeypatch.setattr(rows_lib, "COPY", 1000)  # none is moved
    rows = rows_lib.Rows(trained, 2)
    seat(rows, "a", 30, 1)
    seat(rows, "b", 7, 2)
    first = step(rows)["b"]
    pool = {name: jax.tree.map(lambda x: x.at[np.array(rows.seats[0].pages)].set(
        jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 1), getattr(rows.state.cache, name))
        for name in attention.IN_SLOTS}  # fmt: skip
    rows.state = rows.state.replace(cache=rows.state.cache.replace(**pool))
    rows.leave(0)
    mine = set(rows.seats[1].pages)
    tokens = [first, *(step(rows)["b"] for _ in range(20))]
    assert set(rows.seats[1].pages) - mine  # it has got some of them
    alone = rows_lib.Rows(trained, 2)
    seat(alone, "b", 7, 2)
    assert tokens == [step(alone)["b"] for _ in range(21)]


@pytest.mark.parametrize("whose", ["somebody's", "nobody's", "nobody's, and the first row is NaN, too"])
def test_nan_stays_where_it_is(trained, whose):
    """In the last page, which stands in for those that shorter rows do not have."""
    rows, alone = rows_lib.Rows(trained, 3), rows_lib.Rows(trained, 3)
    rows.sizes = alone.sizes = [3]
    for name, length in (("a", 3), ("b", 5), ("c", 21)):
        seat(rows, name, length, length)
    seat(alone, "b", 5, 5)
    of = {seat.who: seat for seat in rows.seats}
    if whose == "somebody's":
        of["c"].pages.append(rows.pages - 1)
        of["c"].length = 25
    assert (rows.pages - 1 in held(rows)) == (whose == "somebody's") and rows.who[0] == "a"
    state = rows.state
    pool = {name: jax.tree.map(lambda x: x.at[-1].set(jnp.nan), getattr(state.cache, name)) for name in ("k", "v")}
    hidden = state.hidden.at[0].set(jnp.nan) if whose.endswith("too") else state.hidden
    marked = state.cache.document.at[-1].set(1)
    rows.state = state.replace(hidden=hidden, cache=state.cache.replace(document=marked, **pool))
    assert [step(rows)["b"] for _ in range(2)] == [step(alone)["b"] for _ in range(2)]
    assert np.isfinite(rows.state.hidden[1]).all()


@pytest.mark.parametrize("name", tiny.fusions("concat", "cross_attention"))
def test_numbers_of_rows_that_are_found_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(rows_lib, "FEWEST", 2)
    trained = make(context=64, **tiny.FUSIONS[name])
    found = rows_lib.Rows(trained, 8)
    found.find_sizes()
    assert found.sizes[-1] == 8
    bits = []
    for size in found.sizes:
        rows = rows_lib.Rows(trained, 8)
        rows.sizes = [size, 8]
        seat(rows, "a", 5, 1)
        seat(rows, "b", 9, 2)
        tokens = [step(rows) for _ in range(6)]
        assert len(rows.seats) == size
        bits.append((tokens, np.asarray(rows.state.hidden[:2]).tobytes()))
    assert all(one == bits[0] for one in bits)


def test_sizes_are_those_that_were_the_same(trained, monkeypatch):
    """What gives one other bit is left out: a number of rows, be it among one number of pages, or a number of pages."""
    monkeypatch.setattr(rows_lib, "FEWEST", 2)
    tried = rows_lib.Rows._tried

    def sizes(*others):
        def changed(self, state, rows, pages):
            told, other = tried(self, state, rows, pages), {rows, (rows, pages)} & set(others)
            return [np.nextafter(x, 9) if x.dtype == np.float32 else x for x in told] if other else told

        monkeypatch.setattr(rows_lib.Rows, "_tried", changed)
        rows = rows_lib.Rows(trained, 8)
        rows.find_sizes()
        return rows.sizes, rows.page_sizes

    rows, pages = sizes()
    assert rows == [2, 4, 8] and pages == [2, 4, 6, 8, 16, 32, 64]
    assert sizes(4) == sizes((4, 16)) == ([2, 8], pages)
    assert sizes((8, 16)) == (rows, [2, 4, 6, 8, 32, 64])
    assert sizes((8, 64)) == ([8], [64])
    monkeypatch.setattr(rows_lib, "FEWEST", 4)
    assert sizes() == ([4, 8], pages)


def test_few_rows_are_stepped_while_few_are_in_use(trained, monkeypatch):
    """As many as wait are counted at once; fewer when those that go on have read enough in vain."""
    monkeypatch.setattr(rows_lib, "COPY", 20)
    rows = rows_lib.Rows(trained, 8)
    rows.sizes = [2, 4, 8]
    seat(rows, "a", 5, 1)
    assert len(rows.seats) == 2
    seat(rows, "b", 5, 2)
    seat(rows, "c", 5, 3, more=4)
    assert len(rows.seats) == 8
    seat(rows, "d", 5, 4)
    for row in range(1, 4):
        rows.leave(row)
    steps = 0
    while len(rows.seats) == 8:
        step(rows)
        steps += 1
    assert len(rows.seats) == 2 and rows.live == ["a"] and 1 < steps < 10


def test_bursts_shrink_as_steps_do(trained, monkeypatch):
    """After as many tokens, but for a burst."""
    monkeypatch.setattr(rows_lib, "COPY", 30)

    def shrunk(at_once: int) -> int:
        rows = rows_lib.Rows(trained, 2)
        rows.sizes = [2]
        seat(rows, "a", 50, 1)
        seat(rows, "b", 3, 2)
        rows.leave(0)
        had = rows.pages
        for n in range(0, 64, at_once):
            rows.prepare(at_once)
            if rows.pages < had:
                return n
            rows._grow(at_once)

    assert shrunk(1) > 8 and abs(shrunk(4) - shrunk(1)) <= 4


def test_decode_and_pages_say_the_same(trained):
    """Over several pages, for every law's token: decode.generate reads one cache from its beginning to its end."""
    rows = rows_lib.Rows(trained, 2)
    document = prompts.plain([5, 9, 7])
    *_, (hidden, cache, _) = prefix.filled(trained, document, None, 128, prefix.Prefixes(0))
    rows.seat("a", document, hidden, cache, 3)
    tokens = [step(rows)["a"] for _ in range(40)]
    assert decode.generate(trained, [document], None, 40, DRAWN, [3])[0].tokens == tuple(tokens)
