"""An engine that says what a test tells it to, token by token, from a thread of its own; and a server around it."""

import threading

from fastapi.testclient import TestClient

from gpt4v_jax.serve import api
from gpt4v_jax.serve.__main__ import Inline
from gpt4v_jax.serve.requests import Delta, Request
from gpt4v_jax.serve.server import Settings

SAYS = "red 7"


class Ticket:
    def __init__(self):
        self.gone = threading.Event()

    def cancel(self) -> None:
        self.gone.set()


class FakeEngine:
    """Says `says`, a character a Delta with its byte's token, at most the request's room, cut at its stop strings.

    hold: an event that each answer waits for before its last Delta, or its cancellation. error: raised by submit.
    """

    def __init__(self, tokenizer, says: str = SAYS):
        self.tokenizer, self.says, self.error, self.finish = tokenizer, says, None, None
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self.hold = self.begun = None

    def submit(self, request: Request, tell) -> Ticket:
        if self.error:
            raise self.error
        self.requests.append(request)
        self.tickets.append(ticket := Ticket())
        threading.Thread(target=self._run, args=(request, tell, ticket), daemon=True).start()
        return ticket

    def _run(self, request: Request, tell, ticket: Ticket) -> None:
        finish, said = self.finish or "stop", self.says
        for stop in request.stop:
            said = said.partition(stop)[0]
        if len(said) > request.max_new_tokens:
            said, finish = said[: request.max_new_tokens], "length"
        prompt = request.prompt.tokens.tolist() if request.echo else []
        told = {} if request.logprobs is None or not prompt else {
            "prompt_logprobs": (None, *[-2.0] * (len(prompt) - 1)),
            "prompt_top": ((), *[((t, -2.0),) for t in prompt[1:]]),
        }  # fmt: skip
        told["cached"] = 3
        for char in said:
            (token,) = self.tokenizer.encode(char)
            if request.logprobs is not None:
                others = tuple((token + k, -0.5 - k) for k in range(request.logprobs))
                told |= {"logprobs": (-0.5,), "top": (others,)}
            tell(Delta(char, (token,), **told))
            told = {}
        if self.begun:
            self.begun.set()
        while self.hold and not self.hold.wait(0.01) and not ticket.gone.is_set():
            pass
        tell(Delta(finish="cancelled" if ticket.gone.is_set() else finish, error="the reason", **told))

    def stats(self) -> dict[str, float]:
        return {"running": 1.0}


class Filter:
    """Refuses the word "badword"; a text's last word is not settled before a blank."""

    thresholds = {"rude": 1.0}

    def words(self, text: str, where: str) -> str | None:
        return self.check(text[: settled(text)], where)

    def check(self, text: str, where: str) -> str | None:
        return "rude" if "badword" in text else None

    def scores(self, text: str) -> dict[str, float]:
        return {"rude": float(self.check(text, "request") is not None)}


def settled(text: str) -> int:
    return text.rfind(" ") + 1


def client(trained, engine, **settings) -> TestClient:
    app = api.create(trained, engine, Settings("tiny", Inline(), **settings))
    return TestClient(app, raise_server_exceptions=False)
