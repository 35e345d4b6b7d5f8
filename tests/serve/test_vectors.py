"""Embeddings wait for each other, and for nobody else; how many may wait, and how long."""

import threading

import numpy as np
import pytest

from gpt4v_jax.generate import embed
from tests.serve import fake
from tests.serve.test_follow import Wire, call

EMBEDDINGS = "/v1/embeddings"


class Held:
    """What computes vectors, and waits for `go` before each."""

    def __init__(self):
        self.texts, self.begun, self.go = [], threading.Event(), threading.Event()

    def __call__(self, trained, documents):
        self.texts.append(len(documents))
        self.begun.set()
        assert self.go.wait(10)
        return np.ones((len(documents), 2), np.float32)


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(embed, "embed", found := Held())
    yield found
    found.go.set()


def test_only_so_many_wait(held):
    """Chats go on meanwhile, though the server has one thread for them."""
    with fake.client(queued=1, threads=1) as client:
        first = threading.Thread(target=client.post, args=(EMBEDDINGS,), kwargs={"json": {"input": "hi"}})
        first.start()
        held.begun.wait()
        second = client.post(EMBEDDINGS, json={"input": "hi"})
        chat = client.post("/v1/chat/completions", json=fake.say())
        held.go.set()
        first.join()
        assert client.post(EMBEDDINGS, json={"input": "hi"}).status_code == 200
    assert second.status_code == 429 and second.headers["retry-after"] == "2"
    assert second.json()["error"]["code"] == "rate_limit_exceeded" and chat.status_code == 200


def test_what_takes_too_long_ends(held):
    """And gives its place in the queue back."""
    with fake.client(queued=1, seconds=0.0) as client:
        for _ in range(2):
            response = client.post(EMBEDDINGS, json={"input": "hi"})
            assert response.status_code == 503 and response.headers["retry-after"] == "30"
            assert response.json()["error"]["code"] == "timeout" and "longer than 0 s" in response.text


def test_who_hangs_up_ends_it_with_the_next_texts(held):
    app = fake.app(queued=1)
    call(app, wire := Wire({"input": ["a"] * (embed.ROWS + 1)}, held.begun), EMBEDDINGS)
    assert held.texts == [embed.ROWS] and not wire.sent and not app.state.server.computing
