"""Who has which row and which pages of serve.slots, and how many of both a step has."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.model import attention
from gpt4v_jax.serve import slots
from gpt4v_jax.serve.requests import MOST_LOGPROBS
from gpt4v_jax.training.workdir import Trained

LEAST = 8  # pages; twice, three times, four times, eight times as many ... where rows need them
FEWEST = 4  # rows of a step: on a CPU two take as long
ROW = 4  # pages that a step reads in the time that one row more takes it, roughly
COPY = 6  # and in the time that one page takes to be moved
DRAWN = sample.Sampling(1.0)
LAWS = decode.GREEDY, DRAWN  # of which `compile` makes programs; others are made when they are asked for
BURST = 8  # tokens of each row at a time, at most


@dataclasses.dataclass
class Seat:
    """A row that somebody has."""

    who: Any
    length: int  # slots in use
    pages: list[int]


class Rows:
    """At most `most` rows, of one model. Once there are requests it belongs to one thread."""

    def __init__(self, trained: Trained, most: int):
        self.trained, self.most = trained, most
        self.blocks = -(-trained.layout.context // slots.PAGE)  # pages of the longest row
        # Numbers of rows and of pages, few, for each pair is a program; find_sizes finds which give the same bits.
        self.sizes, self.page_sizes = [most], self._page_sizes()
        self.bursts = False  # whether they give the bits of steps: find_sizes finds that, too
        self.clear()

    def clear(self) -> None:
        self.seats: list[Seat | None] = []
        self.state: slots.State | None = None
        self._vain = 0  # pages that steps have read and need not have

    @property
    def who(self) -> list:
        """-> who has each row, or None."""
        return [seat and seat.who for seat in self.seats]

    @property
    def live(self) -> list:
        """-> who has a row."""
        return [seat.who for seat in self.seats if seat]

    @property
    def pages(self) -> int:
        return self.state.cache.document.shape[0] if self.state else 0

    @property
    def memory(self) -> int:
        return self.state.cache.memory_parts[0].shape[1] if self.state else 0

    def _page_sizes(self) -> list[int]:
        """-> numbers of pages; of so few scores that XLA might make something else of them (attention.LARGE) none but
        the largest."""
        most, heads = self.most * self.blocks, self.trained.model.config.decoder.heads
        times = itertools.chain((1, 2, 3), (2**k for k in itertools.count(2)))
        sizes = itertools.takewhile(lambda n: n < most, (LEAST * n for n in times))
        return [*(n for n in sizes if n * heads * slots.PAGE >= attention.LARGE), most]

    def _enough(self, rows: int) -> list[int]:
        """-> the numbers of pages that so many rows may have."""
        most = next(n for n in self.page_sizes if n >= rows * self.blocks)
        return [n for n in self.page_sizes if n <= most]

    def leave(self, row: int) -> None:
        self.seats[row] = None

    def seat(self, who, prompt: chat.Document, hidden, cache: attention.Cache, seed: int, more: int = 0) -> None:
        """Gives a row to a request whose prompt is read, as prefix.filled does. more: how many come behind it."""
        need = len(prompt) // slots.PAGE + 1  # with a slot for the next token
        self._fit(1 + more, need + more, _memory(cache))
        row, given = self.seats.index(None), self._unused()[:need]
        self.seats[row] = Seat(who, len(prompt), given)
        tokens = np.zeros(self.state.past.tokens.shape[1], np.int32)
        tokens[: len(prompt)] = prompt.tokens
        key = jax.random.key(seed % 2**32)
        self.state = slots.admit(self.state, row, _listed(given, self.blocks), hidden, cache, tokens, len(prompt), key)

    def prepare(self, tokens: int = 1) -> None:
        """Makes room for so many tokens in every row, at most BURST. It may change which rows there are."""
        full = [s for s in self.seats if s and (s.length + tokens - 1) // slots.PAGE >= len(s.pages)]
        self._fit(0, len(full), steps=tokens)
        given = self._unused()[: len(full)]
        for seat, page in zip(full, given, strict=True):
            seat.pages.append(page)
        if given:
            self.state = slots.cleared(self.state, _listed(given, self.most))

    def step(self, rules: sample.Rules, allowed=None, logprobs: int | None = None) -> decode.Told:
        """-> the next token of each row; the device computes on. rules, allowed: of the rows that `prepare` left."""
        model, params = self.trained.model, self.trained.params
        told = slots.choose(model, params, self.state, rules, allowed, self.trained.tokenizer.ends, logprobs)
        self.state = slots.advance(model, params, self.state, told.tokens, self._table())
        self._grow(1)
        return told

    def burst(self, rules: sample.Rules, limit: int) -> np.ndarray:
        """-> tokens [R,n] that as many steps would tell: `limit` of each row, fewer where one of them ends a row. The
        host need not look at each, which on a CPU it would do on the cores that compute."""
        assert limit <= BURST <= slots.PAGE, "a burst has one page more of each row"
        model, params, ends = self.trained.model, self.trained.params, self.trained.tokenizer.ends
        tokens, n, self.state = slots.burst(model, params, self.state, rules, ends, self._table(), limit, BURST)
        tokens = np.asarray(tokens)[:, : int(n)]
        self._grow(int(n))
        return tokens

    def _table(self) -> np.ndarray:
        return np.stack([_listed(seat.pages if seat else [], self.blocks) for seat in self.seats])

    def _grow(self, tokens: int) -> None:
        for seat in self.seats:
            if seat:
                seat.length += tokens

    def _unused(self) -> list[int]:
        used = {page for seat in self.seats if seat for page in seat.pages}
        return [page for page in range(self.pages) if page not in used]

    def _fit(self, more_rows: int, more_pages: int, memory: int | None = None, steps: int = 1) -> None:
        """Grows at once where it must; shrinks when steps have read in vain for as long as it takes to move the rest.

        memory: of who comes; None: nobody does, and so many steps follow.
        """
        seats, had = [seat for seat in self.seats if seat], (len(self.seats), self.pages, self.memory)
        need = sum(len(seat.pages) for seat in seats) + more_pages
        pages = next(n for n in self.page_sizes if n >= need)
        rows = next((n for n in self.sizes if n >= len(seats) + more_rows), self.most)
        goal = rows, pages, max(memory or 0, self.memory if seats else 0)
        if seats:
            if (least := tuple(map(max, goal, had))) != had:
                goal = least
            elif memory is None:
                vain = ROW * (had[0] - rows) + had[1] - pages
                self._vain = self._vain + vain * steps if vain else 0
                if self._vain <= COPY * pages:
                    return
            else:
                return
        if goal != had:
            self._move(*goal)

    def _move(self, rows: int, pages: int, memory: int) -> None:
        if self.state is None:
            self.state = slots.empty(self.trained.model, rows, pages, self.trained.layout.context)
        kept = [(row, seat) for row, seat in enumerate(self.seats) if seat]
        of_rows = np.array([row for row, _ in kept] + [0] * (rows - len(kept)), np.int32)
        of_pages = _listed([page for _, seat in kept for page in seat.pages], pages)
        self.state = slots.moved(self.state, of_rows, of_pages, memory)
        numbers = itertools.count()
        for _, seat in kept:
            seat.pages = list(itertools.islice(numbers, len(seat.pages)))
        self.seats, self._vain = [seat for _, seat in kept] + [None] * (rows - len(kept)), 0

    # ---- before there are requests

    def find_sizes(self) -> None:
        """Finds `sizes` and `page_sizes`, on the machine that this is: XLA sums some numbers of rows or of pages in
        another order. What differs from all rows among most pages by one bit is left out; so are bursts."""
        noise = self._noise()
        whole = self._tried(noise, self.most, self.page_sizes[-1])

        def same(rows: int, pages: int) -> bool:
            told = self._tried(noise, rows, pages)
            return all(np.array_equal(x, y[: len(x)]) for x, y in zip(told, whole, strict=True))

        self.page_sizes = [n for n in self.page_sizes if same(self.most, n)]
        powers = [n for k in range(self.most.bit_length()) if FEWEST <= (n := 2**k) < self.most]
        self.sizes = [*(n for n in powers if all(same(n, pages) for pages in self._enough(n))), self.most]
        self.bursts = all(self._same_bursts(pages, law) for pages in self.page_sizes for law in LAWS)

    @property
    def _each(self) -> int:
        """-> the pages of each row of _noise."""
        return min(2, self.blocks)

    @property
    def _used(self) -> int:
        """-> the slots that each row of _noise has read into."""
        return (self._each - 1) * slots.PAGE + slots.PAGE // 2

    def _noise(self, seed: int = 0) -> slots.State:
        """-> a state of all rows that have read something, no matter what. Page n of row r is n * most + r."""
        model, drawn = self.trained.model, np.random.default_rng(seed)
        pages = next(n for n in self.page_sizes if n >= self._each * self.most)
        reads = model.config.decoder.count(*config.READS)
        state = slots.empty(model, self.most, pages, self.trained.layout.context)
        state = slots.moved(state, *_same(self.most, pages), attention.BLOCK if reads else 0)
        c = state.cache
        parts = (jnp.ones_like(c.memory_parts[0]), *c.memory_parts[1:])
        cache = c.replace(document=jnp.ones_like(c.document), cursor=c.cursor + self._used, memory_parts=parts)

        def noise(x):
            return jnp.asarray(drawn.standard_normal(x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(noise, state.replace(cache=cache))

    def _part(self, noise: slots.State, rows: int, pages: int) -> "Rows":
        """-> rows of _noise, as many as the pages are enough for."""
        held, part = min(rows, pages // self._each), Rows(self.trained, self.most)
        kept = _listed([n * self.most + row for row in range(held) for n in range(self._each)], pages)
        memory = noise.cache.memory_parts[0].shape[1]
        part.state = slots.moved(noise, np.arange(rows, dtype=np.int32), kept, memory)
        own = (list(range(row * self._each, (row + 1) * self._each)) for row in range(held))
        part.seats = [*(Seat(None, self._used, pages_of) for pages_of in own), *[None] * (rows - held)]
        return part

    def _tried(self, noise: slots.State, rows: int, pages: int) -> list[np.ndarray]:
        """-> what a _part tells of some steps, [n,...]; every other row is drawn."""
        part = self._part(noise, rows, pages)
        rules = slots.rules_of([DRAWN if row % 2 else decode.GREEDY for row in range(rows)], self._vocab)
        told = [part.step(rules, None, MOST_LOGPROBS) for _ in range(3)]
        return [np.asarray(x)[: len(part.live)] for x in jax.tree.leaves((told, part.state.hidden))]

    def _same_bursts(self, pages: int, law: sample.Sampling) -> bool:
        """-> whether a burst of three tokens tells and leaves what three steps do."""
        rules = slots.rules_of([law] * self.most, self._vocab)
        for seed in range(20):  # until no token ends a row, and the burst
            noise = self._noise(seed)
            part = self._part(noise, self.most, pages)
            tokens = part.burst(rules, 3)
            if tokens.shape[1] == 3:
                break
        else:
            return False
        found = jax.tree.map(np.asarray, (tokens, part.state.hidden, slots.in_pages(part.state.cache)))
        part = self._part(noise, self.most, pages)
        told = np.stack([part.step(rules).tokens for _ in range(3)], axis=1)
        expected = jax.tree.map(np.asarray, (told, part.state.hidden, slots.in_pages(part.state.cache)))
        return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))

    def compile(self, cache: attention.Cache) -> Iterator[tuple[str, Callable[[], None]]]:
        """-> what is to be compiled for each number of rows and of pages, and what compiles it. cache: that
        prefix.filled has given for a text."""
        for rows in self.sizes:
            for i, pages in enumerate(self._enough(rows)):
                beside = self.page_sizes[max(i - 1, 0) : i + 2]
                yield f"{rows} rows with {pages} pages", lambda of=(rows, pages, beside, cache): self._compile(*of)

    def _compile(self, rows: int, pages: int, beside: Sequence[int], cache: attention.Cache) -> None:
        model, tokens = self.trained.model, np.zeros(self.trained.layout.context, np.int32)
        hidden, memory = jnp.zeros((1, model.config.backbone.width)), _memory(cache)
        state = slots.moved(slots.empty(model, rows, pages, len(tokens)), *_same(rows, pages), memory)
        state = slots.admit(state, 0, _listed([0], self.blocks), hidden, cache, tokens, 1, jax.random.key(0))
        state = slots.cleared(state, _listed([0], self.most))
        for other, n in (*((other, pages) for other in self.sizes), *((rows, n) for n in beside)):
            jax.block_until_ready(slots.moved(state, np.zeros(other, np.int32), _listed([0], n), memory))
        one = Rows(self.trained, self.most)
        one.state, one.seats = state, [Seat(None, 1, [0]), *[None] * (rows - 1)]
        for rules in (slots.rules_of([law] * rows, self._vocab) for law in LAWS):
            one.step(rules)
            if self.bursts and rows == self.most:
                one.burst(rules, 1)
        jax.block_until_ready(one.state)

    @property
    def _vocab(self) -> int:
        return self.trained.run.model.vocab


def _memory(cache: attention.Cache) -> int:
    """-> slots for the memory that a prompt has left: few numbers, for each is a program."""
    read = cache.memory_parts[0].shape[1]
    return 1 << (read - 1).bit_length() if read else 0


def _same(rows: int, pages: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(rows, dtype=np.int32), np.arange(pages, dtype=np.int32)


def _listed(pages: Sequence[int], n: int) -> np.ndarray:
    """-> int32 [n], attention.NOBODY behind the pages."""
    return np.array([*pages, *[attention.NOBODY] * (n - len(pages))], np.int32)
