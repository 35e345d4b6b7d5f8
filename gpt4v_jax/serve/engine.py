"""Continuous batching: requests share the rows of one static cache, each for as long as it lasts."""

import queue
import threading

from gpt4v_jax.generate import decode
from gpt4v_jax.serve.requests import Busy, Delta, Request, Tell
from gpt4v_jax.training.workdir import Trained


class Ticket:
    """A request in the engine."""

    def __init__(self, request: Request, tell: Tell):
        self.request, self.tell, self.gone = request, tell, threading.Event()

    def cancel(self) -> None:
        """Frees its slot at the next token. The last Delta says "cancelled"."""
        self.gone.set()


class Engine:
    """One thread that owns the model. Thread-safe."""

    def __init__(self, trained: Trained, slots: int = 8, queued: int = 64):
        """slots: requests decoded at a time; queued: requests that may wait. Both 1 or more."""
        self.trained = trained
        self._waiting: queue.Queue[Ticket | None] = queue.Queue(queued)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, tell: Tell) -> Ticket:
        """Queues a request; `tell` gets its Deltas, the last one has `finish`. Raises InputError for a prompt that the
        model cannot read, Busy where too many wait."""
        ticket = Ticket(request, tell)
        try:
            self._waiting.put_nowait(ticket)
        except queue.Full:
            raise Busy("too many requests wait: try again later", 1.0) from None
        return ticket

    def stats(self) -> dict[str, float]:
        """-> what /metrics tells: running, waiting, slots and the like."""
        return {"waiting": self._waiting.qsize()}

    def close(self, seconds: float = 10.0) -> None:
        """Takes no more, ends what runs (at the latest after `seconds`), and returns."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:  # a stand-in, one request at a time
        while (ticket := self._waiting.get()) is not None:
            r = ticket.request
            answer = decode.generate(self.trained, [r.prompt], r.read, r.max_new_tokens, r.sampling, [r.seed], r.stop,
                                     grammar=r.grammar, logprobs=r.logprobs)[0]  # fmt: skip
            ticket.tell(Delta(answer.text, answer.tokens, answer.logprobs, answer.top, answer.finish))
