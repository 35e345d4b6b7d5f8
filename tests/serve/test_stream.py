"""Streams: their chunks, joined, are the whole answer; what fails on the way says so in the stream."""

import types

import pytest

from gpt4v_jax.generate import prompts, score
from gpt4v_jax.serve import stream
from gpt4v_jax.serve.follow import Whole
from tests.serve import fake

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def engine():
    return fake.FakeEngine(fake.trained().tokenizer)


def streamed(engine, path: str, body: dict, **settings) -> list:
    with fake.client(engine, **settings) as client:
        response = client.post(path, json=body | {"stream": True})
    assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return fake.events(response.text)


def whole(engine, path: str, body: dict) -> dict:
    with fake.client(engine) as client:
        return client.post(path, json=body).json()


def test_a_chat_joined_is_the_whole_answer(engine):
    body = fake.say(n=2, logprobs=True, top_logprobs=1, seed=1)
    *chunks, done = streamed(engine, CHAT, body)
    assert done == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]
    expected = whole(engine, CHAT, body)["choices"]
    for k in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == k]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {}
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert "".join(c["delta"].get("content", "") for c in mine) == expected[k]["message"]["content"]
        logprobs = [one for c in mine if c["logprobs"] for one in c["logprobs"]["content"]]
        assert logprobs == expected[k]["logprobs"]["content"]


def test_a_completion_joined_is_the_whole_answer(engine, monkeypatch):
    monkeypatch.setattr(score, "prompt", fake.scored)
    body = {"prompt": ["éh", "x"], "echo": True, "logprobs": 1, "seed": 1}
    *chunks, _ = streamed(engine, COMPLETION, body)
    expected = whole(engine, COMPLETION, body)["choices"]
    for k in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == k]
        assert "".join(c["text"] for c in mine) == expected[k]["text"] and mine[-1]["finish_reason"] == "stop"
        for name, values in expected[k]["logprobs"].items():
            assert [value for c in mine for value in c["logprobs"][name]] == values


def test_offsets_wait_for_whole_characters(engine):
    """Each of a character's tokens begins where it does, and so does what is behind it."""
    engine.says = "aé€b"
    body = {"prompt": "x", "logprobs": 0}
    *chunks, _ = streamed(engine, COMPLETION, body)
    (choice,) = whole(engine, COMPLETION, body)["choices"]
    joined = [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert joined == choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3]


def test_usage_comes_last_where_it_is_asked_for(engine):
    body = fake.say(n=2)
    *chunks, last, _ = streamed(engine, CHAT, body | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == whole(engine, CHAT, body)["usage"]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14,
                             "prompt_tokens_details": {"cached_tokens": 3}}  # fmt: skip


def test_of_several_answers_one_has_read_the_prompt():
    """Then it was not remembered, though the others found it there."""
    asked = [stream.Prompt(prompts.plain([5] * n)) for n in (4, 6)]
    form = types.SimpleNamespace(wish=types.SimpleNamespace(n=2), prompts=asked)
    wholes = [Whole(tokens=[1], cached=cached) for cached in (0, 4, 6, 6)]
    usage = stream.Form.usage(form, wholes)
    assert usage["prompt_tokens"] == 10 and usage["prompt_tokens_details"] == {"cached_tokens": 6}


@pytest.mark.parametrize("finish, reason, note", [
    ("stop", "stop", None), ("length", "length", None), ("forbidden", "stop", None), ("timeout", "length", "timeout"),
])  # fmt: skip
def test_what_ends_an_answer(engine, finish, reason, note):
    engine.finish = finish
    *_, last, _ = streamed(engine, CHAT, fake.say())
    (choice,) = whole(engine, CHAT, fake.say())["choices"]
    for ended in (choice, last["choices"][0]):
        assert ended["finish_reason"] == reason and ended.get("stop_reason") == note


@pytest.mark.parametrize("finish, status, said", [
    ("unreadable", 400, "cannot be read"), ("error", 500, "its log"), ("cancelled", 503, "closing"),
])  # fmt: skip
def test_an_answer_that_fails(engine, finish, status, said):
    """At once: by its status. On the way: in the stream, and without what the engine says of itself."""
    engine.finish = finish
    *_, error, done = streamed(engine, CHAT, fake.say())
    assert said in error["error"]["message"] and done == "[DONE]" and "the reason" not in str(error)
    with fake.client(engine) as client:
        assert client.post(CHAT, json=fake.say()).status_code == status
        engine.says = ""
        assert client.post(CHAT, json=fake.say(stream=True)).status_code == status


@pytest.mark.parametrize("says", ["so badword it is", "so badword"])
def test_a_refused_answer_keeps_what_was_looked_at(engine, says):
    """Nothing of the last word goes out before it has ended, be it with the answer."""
    engine.says = says
    settings = {"moderation": fake.words()}
    *chunks, last, _ = streamed(engine, CHAT, fake.say(), **settings)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "so "
    assert last["choices"][0]["finish_reason"] == "content_filter"
    with fake.client(engine, **settings) as client:
        (choice,) = client.post(CHAT, json=fake.say(logprobs=True)).json()["choices"]
        assert choice["message"]["content"] == "" and choice["finish_reason"] == "content_filter"
        assert choice["logprobs"]["content"] == []
        assert 'gpt4v_refused_total{category="rude",where="answer"} 1.0' in client.get("/metrics").text
        engine.says = "so good"
        assert client.post(CHAT, json=fake.say()).json()["choices"][0]["message"]["content"] == "so good"
    assert engine.tickets[0].gone.is_set() and engine.tickets[1].gone.is_set()


def test_a_refused_request_does_not_reach_the_engine(engine, caplog):
    with fake.client(engine, moderation=fake.words()) as client, caplog.at_level("INFO"):
        parts = [{"type": "text", "text": text} for text in ("a bad", "word")]
        said = [{"role": "system", "content": "be bad"}, {"role": "user", "content": "word"}]
        lines = [{"type": "text", "text": text} for text in ("fine", "badword", "fine")]  # read as finebadwordfine
        for path, body in ((CHAT, fake.say("a badword")), (COMPLETION, {"prompt": ["fine", "badword"]}),
                           (CHAT, fake.say(parts)), (CHAT, {"messages": said}), (CHAT, fake.say(lines))):  # fmt: skip
            error = client.post(path, json=body)
            assert error.status_code == 400 and error.json()["error"]["code"] == "content_filter"
        for many in (["x"] * 257, ["x" * 70_000]):
            assert client.post("/v1/moderations", json={"input": many}).status_code == 400
        body = client.post("/v1/moderations", json={"input": ["fine", "badword"]}).json()
    assert [result["flagged"] for result in body["results"]] == [False, True]
    assert body["results"][1]["category_scores"] == {"rude": 1.0}
    assert not engine.requests and "badword" not in caplog.text
