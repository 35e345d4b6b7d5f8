"""Nothing is left in the engine when nobody listens any more."""

import asyncio
import json
import threading

import pytest

from gpt4v_jax.serve import stream as stream_lib
from gpt4v_jax.serve.requests import Busy
from tests.serve import fake

CHAT = "/v1/chat/completions"


class Wire:
    """An ASGI connection: the body comes, then the client hangs up when `hang_up` is set."""

    def __init__(self, body: dict, hang_up: threading.Event):
        self.body, self.hang_up, self.sent = json.dumps(body).encode(), hang_up, []

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.to_thread(self.hang_up.wait)
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


def call(app, wire: Wire, path: str = CHAT) -> None:
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "http_version": "1.1",
             "scheme": "http", "server": ("test", 80), "root_path": "", "asgi": {"spec_version": "2.3"}}  # fmt: skip
    asyncio.run(app(scope, wire.receive, wire.send))


@pytest.fixture
def engine():
    """Its answers wait for ever before their last word."""
    engine = fake.FakeEngine(fake.trained().tokenizer)
    engine.hold, engine.begun = threading.Event(), threading.Event()
    return engine


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_cancels(engine, stream, caplog):
    app = fake.app(engine)
    wire = Wire(fake.say(n=2, stream=stream), engine.begun)
    with caplog.at_level("INFO"):
        call(app, wire)
    app.state.server._pool.shutdown()  # the thread that submits them may still be at it
    assert len(engine.tickets) == 2 and all(ticket.gone.is_set() for ticket in engine.tickets)
    assert not app.state.server.following
    assert (f"POST {CHAT} {200 if wire.sent else 499} " in caplog.text) and bool(wire.sent) <= stream


def test_a_queue_that_has_no_room_for_all_takes_none(engine):
    submit = engine.submit

    def second_is_too_many(request, tell):
        if engine.tickets:
            raise Busy("too many", 1.0)
        return submit(request, tell)

    engine.submit = second_is_too_many
    with fake.client(engine) as client:
        assert client.post(CHAT, json=fake.say(n=2)).status_code == 429
    assert engine.tickets[0].gone.is_set()


def test_a_client_that_reads_nothing_is_left(engine, monkeypatch):
    monkeypatch.setattr(stream_lib, "READ_SECONDS", 0.0)
    over = threading.Event()

    class Deaf(Wire):
        async def send(self, message):
            await super().send(message)
            if message["type"] == "http.response.body":
                over.set()  # the thread that waits for it can end
                await asyncio.Event().wait()

        async def receive(self):
            message = await super().receive()
            return message if message["type"] == "http.request" else await asyncio.Event().wait()

    call(fake.app(engine), wire := Deaf(fake.say(stream=True), over))
    assert engine.tickets[0].gone.is_set() and len(wire.sent) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_closes_cuts_its_answers(engine, stream):
    app, over = fake.app(engine), threading.Event()

    class Patient(Wire):
        async def send(self, message):
            await super().send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                over.set()  # the thread that waits for it can end

    def cut():
        engine.begun.wait()
        app.state.server.cut()

    closer = threading.Thread(target=cut)
    closer.start()
    call(app, wire := Patient(fake.say(stream=stream), over))
    closer.join()
    text = b"".join(message.get("body", b"") for message in wire.sent).decode()
    assert wire.sent[0]["status"] == (200 if stream else 503) and "the server is closing" in text
    assert engine.tickets[0].gone.is_set() and app.state.server.closing
