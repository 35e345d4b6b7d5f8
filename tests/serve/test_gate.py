"""Keys, limits, and the access log."""

import asyncio
import re
import threading

import pytest
from fastapi.testclient import TestClient

from gpt4v_jax.serve import gate
from gpt4v_jax.serve.requests import Busy
from tests.serve import fake
from tests.serve.test_follow import Wire, call

CHAT = "/v1/chat/completions"
KEYS = (("ada", "k" * 16), ("bob", "b" * 16))


@pytest.mark.parametrize("header, status", [
    ({}, 401), ({"Authorization": "Bearer x"}, 401), ({"Authorization": "k" * 16}, 401),
    ({"Authorization": "Basic " + "k" * 16}, 401), ({"Authorization": "Bearer "}, 401),
    ({"Authorization": b"Bearer \xff\xfe"}, 401), ({"Authorization": "Bearer " + "k" * 17}, 401),
    ({"Authorization": "Bearer " + "k" * 16}, 200), ({"authorization": "bearer " + "b" * 16}, 200),
])  # fmt: skip
def test_keys(header, status):
    engine = fake.FakeEngine(fake.trained().tokenizer)
    with fake.client(engine, keys=KEYS) as client:
        response = client.post(CHAT, json=fake.say(), headers=header)
        assert response.status_code == status
        assert client.get("/metrics", headers=header).status_code == status
        assert client.get("/health").status_code == 200
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key" and not engine.requests
    else:
        assert engine.requests[0].user in ("ada", "bob")


def test_all_keys_are_compared(monkeypatch):
    """Also behind the one that fits, so that time tells nothing."""
    seen = []
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: seen.append(b) or a == b)
    with fake.client(keys=KEYS) as client:
        client.get("/v1/models", headers={"Authorization": "Bearer " + "k" * 16})
    assert seen == [key.encode() for _, key in KEYS]


def test_too_many_at_a_time():
    engine = fake.FakeEngine(fake.trained().tokenizer)
    engine.hold, engine.begun = threading.Event(), threading.Event()
    with fake.client(engine, connections=1) as client:
        first = threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": fake.say()})
        first.start()
        engine.begun.wait()
        response = client.post(CHAT, json=fake.say())
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "overloaded" and client.get("/metrics").status_code == 200
        engine.hold.set()
        first.join()
        assert client.post(CHAT, json=fake.say()).status_code == 200


def test_bodies_share_a_budget(monkeypatch):
    """What a request holds is given back with its end, also when its client leaves, and when it was refused itself."""
    monkeypatch.setattr(gate, "BODIES", 3000)
    engine = fake.FakeEngine(fake.trained().tokenizer)
    engine.hold, engine.begun = threading.Event(), threading.Event()
    large = fake.say() | {"metadata": "x" * 2000}
    app = fake.app(engine, max_body=2500)
    for _ in range(2):
        call(app, Wire(large, engine.begun))
        assert engine.tickets.pop().gone.wait(10)
        engine.begun.clear()
    with TestClient(app) as client:
        first = threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": large})
        first.start()
        engine.begun.wait()
        engine.error = Busy("who comes to the engine", 2.0)
        refused = [client.post(CHAT, json=large) for _ in range(2)]
        small = client.post(CHAT, json=fake.say())
        engine.error = None
        engine.hold.set()
        first.join()
        assert client.post(CHAT, json=large).status_code == 200
    assert small.status_code == 429
    for response in refused:
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "overloaded" and response.headers["connection"] == "close"


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.0)

    class Silent(Wire):
        async def receive(self):
            await asyncio.Event().wait()

    call(fake.app(), wire := Silent({}, None))
    assert wire.sent[0]["status"] == 408 and (b"connection", b"close") in wire.sent[0]["headers"]


def test_the_log_has_a_line_and_no_content(caplog):
    with fake.client() as client, caplog.at_level("INFO"):
        client.post(CHAT + "?a=secret", json=fake.say("secret words"), headers={"Authorization": "Bearer secret"})
        client.get("/%0Aforged")
    lines = [record.getMessage() for record in caplog.records if record.name == "gpt4v_jax.access"]
    assert re.fullmatch(f"POST {CHAT} 200 \\d+ ms 14\\+5 tokens", lines[0])
    assert re.fullmatch(r"GET /%0Aforged 404 \d+ ms", lines[1])
    assert "secret" not in "".join(lines) and fake.SAYS not in "".join(lines)
