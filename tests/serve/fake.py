"""A random model of bytes, an engine that says what a test tells it to, and a server around both."""

import base64
import dataclasses
import functools
import io
import json
import threading

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.serve import api, guards, moderation
from gpt4v_jax.serve.requests import Delta, Request
from gpt4v_jax.serve.server import Settings
from gpt4v_jax.training.workdir import Trained
from tests import tiny

CONTEXT = 128
SAYS = "red 7"


class Ticket:
    def __init__(self):
        self.gone = threading.Event()

    def cancel(self) -> None:
        self.gone.set()


class FakeEngine:
    """Says `says`, a byte's token a Delta, with its character if it is the last one of it, at most the request's room,
    cut at its stop strings.

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
        told = {"cached": 3}
        spelt = [(char, self.tokenizer.encode(char)) for char in said]
        for char, token in [(char * (i == len(ids) - 1), id) for char, ids in spelt for i, id in enumerate(ids)]:
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
        return {"running": 1.0, "steps_total": 4.0}


def scored(trained, document, read, most: int):
    """What generate.score tells of a prompt, without a model."""
    others = document.tokens.tolist()[1:]
    return (None, *[-2.0] * len(others)), ((), *[((t + 1, -1.0), (t, -2.0))[:most] for t in others])


def words() -> moderation.Moderation:
    """Refuses the word "badword"."""
    row = moderation.WordList("rude", ("badword",))
    return moderation.Moderation([(row, moderation.Words(row, row.entries))], [])


@functools.cache
def trained(chats: bool = True, context: int = CONTEXT, **model) -> Trained:
    """A random model of bytes that reads pictures, clips and sounds."""
    tokenizer = tokenizer_lib.train("byte", [], 0)
    made = dataclasses.replace(tiny.make_config(context=context, media=True, **model), vocab=tokenizer.vocab)
    module, params = tiny.make_model(made)
    run = config.Config(model=made, data=dataclasses.replace(tiny.DATA, name="tiny"))
    layout = batch_lib.layout(made, run.data)
    mesh = sharding.make_mesh(config.Mesh())
    return Trained(run, layout, tokenizer, mesh, module, params, 7, () if chats else ("tiny",))


def app(engine=None, model: Trained | None = None, **settings):
    model, guard = model or trained(), settings.pop("guard", None) or guards.Guard(guards.Limits())
    return api.create(model, engine or FakeEngine(model.tokenizer), Settings("tiny", guard, **settings))


def client(engine=None, model: Trained | None = None, **settings) -> TestClient:
    return TestClient(app(engine, model, **settings), raise_server_exceptions=False)


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(text: str, *pictures: bytes) -> dict:
    """-> the user's message."""
    parts = [{"type": "image_url", "image_url": {"url": uri(data)}} for data in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def say(text: str = "hi", **more) -> dict:
    """-> a chat completion's body."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]} | more


def events(text: str) -> list:
    """-> the JSON of each event of a stream; "[DONE]" last."""
    lines = text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    found = [line.removeprefix("data: ") for line in lines]
    return [*map(json.loads, found[:-1]), found[-1]]
