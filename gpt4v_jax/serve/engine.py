"""Continuous batching (Yu et al. 2022, Orca): requests share the rows of one cache, each for as long as it lasts.

One thread owns the device. Each turn of it reads one chunk of the next prompt, and draws a token for every row in use,
or several (`_at_once`). An answer does not depend, to the bit, on who else is there. Nor may one user's prompts hold up
the others' answers for long: SHARE.
"""

import collections
import concurrent.futures
import itertools
import logging
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import constrain, decode, prompts
from gpt4v_jax.model import attention
from gpt4v_jax.serve import prefix
from gpt4v_jax.serve import rows as rows_lib
from gpt4v_jax.serve import slots as slots_lib
from gpt4v_jax.serve.requests import MOST_LOGPROBS, Busy, Delta, Request, Tell
from gpt4v_jax.training.workdir import Trained

SHARE = 0.25  # of the time may go to chunks of one user's prompts, while others' rows go on and nobody else waits
LONGEST_BURST = 0.25  # seconds, about: who leaves has a row for so long
LONGEST_PAUSE = 8.0  # seconds: of a chunk that takes more than a quarter of it most have been compiled

log = logging.getLogger(__name__)


class Ticket:
    """A request in the engine, and what is known of its answer."""

    def __init__(self, request: Request, tell: Tell, room: int, matcher: constrain.Matcher | None, bursts: bool, wake):
        self.request, self.tell, self.room, self.matcher, self._wake = request, tell, room, matcher, wake
        self.bursts = bursts  # whether nobody need look at a token before the next one is drawn
        self.began = time.monotonic()
        self.gone = False
        self.tokens: list[int] = []  # of the answer
        self.sent = 0  # characters that were told
        self.cached = 0

    def cancel(self) -> None:
        """Ends it and frees its row before more is drawn, that is after a step, or a burst; the last Delta says
        "cancelled". From any thread, at any time."""
        self.gone = True
        self._wake()

    def over(self, now: float) -> str | None:
        """-> Delta.finish of a request that must not go on."""
        if self.gone:
            return "cancelled"
        late = self.request.seconds is not None and now - self.began > self.request.seconds
        return "timeout" if late else None


class Engine:
    """Thread-safe. Answers are those of decode.generate with the same seeds."""

    def __init__(self, trained: Trained, slots: int = 8, queued: int = 64, prefix_bytes: int = 512 << 20):
        """slots: requests decoded at a time; queued: requests that may wait; prefix_bytes: what is remembered of
        prompts. Raises InputError for a model that generates no text."""
        config.at_least(1, slots=slots, queued=queued)
        if not trained.run.model.causal:
            raise config.InputError("this model's stream is bidirectional: it fills in masked tokens, nothing more")
        self.trained, self.slots, self.queued = trained, slots, queued
        # A chunk is padded by less than BUCKET. Whole blocks: attention would else copy all of a cache to make it so.
        self.longest = decode.rounded(trained.layout.context + decode.BUCKET, attention.BLOCK)
        self.prefixes = prefix.Prefixes(prefix_bytes)
        self.counts = collections.Counter()  # of what has ended, by finish; tokens; prompt_tokens; steps; chunks
        self._waiting: dict[str, collections.deque[Ticket]] = {}  # by user, whose turn it is first
        self._rows = rows_lib.Rows(trained, slots)
        self._filling: tuple[Ticket, Iterator] | None = None
        self._pause = "", 0.0  # whose chunk was read last, and until when the next one of the same user waits
        self._pace = LONGEST_BURST  # seconds a token that the last burst took
        self._lock = threading.Condition()
        self._closing: float | None = None  # when what runs is cut
        self._rules_of, self._rules = None, {}
        self._old: attention.Cache | None = None  # which the last prompt was read into
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from other threads

    def submit(self, request: Request, tell: Tell) -> Ticket:
        """Queues a request -> its Ticket; `tell` gets its Deltas, the last one has `finish`.

        Raises InputError for what the model cannot read or its vocabulary does not have, Busy where too many wait.
        """
        decode.check(self.trained, [request.prompt])
        config.at_least(0, max_new_tokens=request.max_new_tokens)
        if request.sampling.guidance_scale != 1:
            raise config.InputError("guidance_scale needs a second prompt, which a request has not: leave it out")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise config.InputError(f"logprobs={request.logprobs} must be from 0 to {MOST_LOGPROBS}")
        laws = slots_lib.rules_of([request.sampling], self.trained.run.model.vocab)
        room = min(request.max_new_tokens, self.trained.layout.context - len(request.prompt))
        matcher = None
        if request.grammar:
            matcher = decode.matcher(self.trained, request.prompt, request.grammar)
        watched = matcher or request.stop or request.logprobs is not None
        bursts = not watched and laws.keys() <= set(slots_lib.DRAWS)
        with self._lock:
            if self._closing is not None:
                raise Busy("the server is closing: try again later", 5.0)
            if self.waiting >= self.queued:
                raise Busy(f"{self.waiting} requests wait already: try again later", self._patience())
            ticket = Ticket(request, tell, room, matcher, bursts, self._wake)
            self._waiting.setdefault(request.user, collections.deque()).append(ticket)
            self._lock.notify()
        return ticket

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        return len(self._rows.live) + (self._filling is not None)

    def stats(self) -> dict[str, float]:
        """-> what is to be watched: gauges by name, and counts that only grow, which end in _total."""
        ended = {f"finish_{name}_total": n for name, n in self.counts.items() if not name.endswith("_total")}
        counts = {name: n for name, n in self.counts.items() if name.endswith("_total")}
        gauges = {"waiting": self.waiting, "running": self.running, "slots": self.slots}
        of = self.prefixes
        known = {"prefix_bytes": of.bytes, "prefix_positions_total": of.asked, "prefix_hits_total": of.hits}
        return gauges | known | counts | ended

    def close(self, seconds: float = 10.0) -> None:
        """Takes no more requests, ends those that wait, lets those that run go on for so long, and returns."""
        with self._lock:
            self._closing = time.monotonic() + seconds
            self._lock.notify()
        self._thread.join(seconds + 5)

    def warm(self) -> Iterator[str]:
        """Compiles what texts will need, before there are requests: yields what it compiles. Left are small programs:
        other laws of choosing, pages that grow or shrink by several sizes at once; and what media and sources need."""
        for name, length in (("short prompts", 1), ("long prompts", self.trained.layout.context - 1)):
            yield name
            for sampling in (decode.GREEDY, rows_lib.DRAWN):  # the second time the prompt is remembered
                over = threading.Event()
                self.submit(Request(prompts.plain([0] * length), None, 1, sampling),
                            lambda delta, over=over: delta.finish and over.set())  # fmt: skip
                over.wait()
        with concurrent.futures.ThreadPoolExecutor(1, initializer=self._enter) as thread:
            yield "fewer rows"
            thread.submit(self._rows.find_sizes).result()
            for name, work in self._rows.compile(self._old):
                yield name
                thread.submit(work).result()

    # ---- the thread

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def _patience(self) -> float:
        """-> seconds after which there may be room."""
        return min(1.0 + self.waiting / self.slots, 30.0)

    def _run(self) -> None:
        self._enter()
        while True:
            with self._lock:
                while self._closing is None and not (self._waiting or self._filling or self._rows.live):
                    self._lock.wait()
                if self._closing is not None:
                    self._drop_waiting("cancelled")
                    if time.monotonic() > self._closing or not (self._filling or self._rows.live):
                        break
            try:
                self._turn()
            except Exception:  # what one request has done must not end the others' for good
                log.exception("the engine's turn failed: all that ran is ended")
                self._end_all("error", "the server failed; try again")
        self._end_all("cancelled")

    def _enter(self) -> None:
        if self.trained.mesh is not None:
            jax.set_mesh(self.trained.mesh)  # a thread has its own

    def _turn(self) -> None:
        now = time.monotonic()
        self._end_overdue(now)
        if self._filling is None and len(self._rows.live) < self.slots:
            self._begin_next()
        if self._filling is not None and not self._paced():
            self._fill()
        if self._rows.live:
            self._step()

    def _end_overdue(self, now: float) -> None:
        for row, ticket in enumerate(self._rows.who):
            if ticket and (why := ticket.over(now)):
                self._rows.leave(row)
                self._end(ticket, why)
        if self._filling and (why := self._filling[0].over(now)):
            ticket, self._filling = self._filling[0], None
            self._end(ticket, why)
        with self._lock:
            over = [t for queue in self._waiting.values() for t in queue if t.over(now)]
            self._waiting = {user: left for user, queue in self._waiting.items()
                             if (left := collections.deque(t for t in queue if t not in over))}  # fmt: skip
        for ticket in over:
            self._end(ticket, ticket.over(now))

    def _begin_next(self) -> None:
        """Users take turns, each user's requests in their order."""
        with self._lock:
            if not self._waiting:
                return
            user = next(iter(self._waiting))
            queue = self._waiting.pop(user)
            ticket = queue.popleft()
            if queue:
                self._waiting[user] = queue  # behind the others
        r = ticket.request
        self.counts["prompt_tokens_total"] += len(r.prompt) + len(r.prompt.source)
        self._filling = ticket, iter(())  # so that it is ended, too, if this fails
        finish, error = self._over_at_once(ticket)
        if finish:
            self._filling = None
            return self._end(ticket, finish, error)
        old, self._old = self._old, None
        self._filling = ticket, prefix.filled(self.trained, r.prompt, r.read, self.longest, self.prefixes, old)

    def _over_at_once(self, ticket: Ticket) -> tuple[str, str]:
        """-> (how it ends before its first token, or "", an error)."""
        if not ticket.room:
            return "length", ""
        error = self._grammar_error(ticket)
        if error:
            return "error", error
        return "stop" if ticket.matcher and not ticket.matcher.allowed().any() else "", ""

    @staticmethod
    def _grammar_error(ticket: Ticket, token: int | None = None) -> str:
        """Has the grammar of a request follow `token` -> what is wrong with it: one request's must end no other's."""
        try:
            if ticket.matcher:
                if token is not None:
                    ticket.matcher.advance(token)
                ticket.matcher.allowed()  # is remembered
        except (config.InputError, ValueError) as error:
            return str(error)
        return ""

    def _paced(self) -> bool:
        """Whether the next chunk must wait, so that who asks much does not halve the speed of who has asked before."""
        user, (last, until) = self._filling[0].request.user, self._pause
        if user != last or time.monotonic() >= until:
            return False
        with self._lock:
            others_wait = any(other != user for other in self._waiting)
        return not others_wait and any(t.request.user != user for t in self._rows.live)

    def _fill(self) -> None:
        ticket, chunks = self._filling
        user = ticket.request.user
        others = any(t.request.user != user for t in self._rows.live)
        if others:
            jax.block_until_ready(self._rows.state.cache.cursor)  # their step is none of this chunk's time
        began = time.monotonic()
        try:
            hidden, cache, ticket.cached = next(chunks)
        except (config.InputError, BadMedium) as error:
            self._filling = None
            return self._end(ticket, "unreadable" if isinstance(error, BadMedium) else "error", str(error))
        self.counts["chunks_total"] += ticket.cached < len(ticket.request.prompt)
        if others:
            jax.block_until_ready(cache.cursor)
            self._pause = user, began + min((time.monotonic() - began) / SHARE, LONGEST_PAUSE)
        if hidden is not None:
            r, more = ticket.request, self.waiting
            self._rows.seat(ticket, r.prompt, hidden, cache, r.seed, min(more, self.slots - len(self._rows.live) - 1))
            self._filling, self._old = None, cache

    def _step(self) -> None:
        """The next token of every row, after which the device goes on while texts are looked at here; or a burst."""
        burst, vocab = self._at_once(), self.trained.run.model.vocab
        self._rows.prepare(max(burst, 1))
        live, rows = self._rows.live, self._rows.who
        samplings = tuple(t.request.sampling if t else decode.GREEDY for t in rows)
        if samplings != self._rules_of:
            self._rules_of, self._rules = samplings, slots_lib.rules_of(samplings, vocab)
        if burst:
            began = time.monotonic()
            told = decode.Told(self._rows.burst(self._rules, burst))
            self._pace = (time.monotonic() - began) / told.tokens.shape[1]
        else:
            allowed = None
            if any(t.matcher for t in live):
                allowed = constrain.masks([t.matcher if t else None for t in rows], vocab)
            most = MOST_LOGPROBS if any(t.request.logprobs is not None for t in live) else None
            told = jax.tree.map(np.asarray, self._rows.step(self._rules, allowed, most))
            told = told.replace(tokens=told.tokens[:, None])
        self.counts["steps_total"] += told.tokens.shape[1]
        for row, ticket in enumerate(rows):
            if ticket and self._told(ticket, told, row):
                self._rows.leave(row)

    def _at_once(self) -> int:
        """-> how many tokens a burst is to draw of each row, 0: none, but a step. Bursts are for when every row is
        taken: nobody can come in before one of them ends, and then it does."""
        live = self._rows.live
        if not self._rows.bursts or len(live) < self.slots or not all(t.bursts for t in live):
            return 0
        left = min(t.room - len(t.tokens) for t in live)
        return max(1, min(left, rows_lib.BURST, int(LONGEST_BURST / max(self._pace, 1e-6))))

    def _told(self, ticket: Ticket, told: decode.Told, row: int) -> bool:
        """Tells what is new of an answer -> whether it has ended."""
        r, before, complete = ticket.request, len(ticket.tokens), False
        ticket.tokens += told.tokens[row].tolist()
        token = ticket.tokens[-1]
        if ticket.matcher and token >= 0:
            if error := self._grammar_error(ticket, token):
                self._end(ticket, "error", error)
                return True
            complete = ticket.matcher.finished
        text, n, finish = decode.ended(self.trained, r.prompt, ticket.tokens, ticket.room, r.stop, complete)
        safe = text if finish else text[: len(text) - _unsure(text, r.stop)]
        new, ticket.sent = safe[ticket.sent :], max(ticket.sent, len(safe))
        more, said = {}, ticket.tokens[before:n]  # not an end token
        if said:
            more["tokens"] = tuple(said)
            self.counts["tokens_total"] += len(said)
        if r.logprobs is not None and token >= 0:
            best, logprob = (slice(row, row + 1), slice(r.logprobs)), float(told.logprobs[row])
            top = decode.pairs(told.top[best], told.top_logprobs[best])
            more |= {"logprobs": (logprob,), "top": top} if said else {"end": ((token, logprob, *top),)}
        if new or more or finish:
            self._tell(ticket, Delta(new, finish=finish, cached=ticket.cached, **more))
        if finish:
            self.counts[finish] += 1
        return finish is not None

    # ---- ends

    def _end(self, ticket: Ticket, finish: str, error: str = "") -> None:
        self.counts[finish] += 1
        self._tell(ticket, Delta(finish=finish, error=error, cached=ticket.cached))

    def _tell(self, ticket: Ticket, delta: Delta) -> None:
        try:
            ticket.tell(delta)
        except Exception:  # who asked is gone
            log.exception("nobody takes an answer: it is cancelled")
            ticket.gone = True

    def _drop_waiting(self, finish: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for ticket in itertools.chain.from_iterable(waiting.values()):
            self._end(ticket, finish)

    def _end_all(self, finish: str, error: str = "") -> None:
        running = self._rows.live + ([self._filling[0]] if self._filling else [])
        self._rows.clear()
        self._filling = None
        for ticket in running:
            self._end(ticket, finish, error)


def _unsure(text: str, stop: tuple[str, ...]) -> int:
    """-> how many of a text's last characters may yet change, or begin a stop string."""
    broken = len(text) - len(text.rstrip("\ufffd"))  # bytes of a character that is not complete
    begun = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(broken, max(begun, default=0))
