"""The endpoints, and what a server answers that is asked for nonsense."""

import base64
import json

import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.generate import embed, score
from gpt4v_jax.serve import server, wire
from gpt4v_jax.serve.requests import Busy
from tests.data.test_sound import encoded, wave
from tests.serve import fake

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LONG = "x" * (server.LEAST_TEXT + 1)  # characters, of which no tokens are made


@pytest.fixture(scope="module")
def client():
    with fake.client(max_body=3_000_000, queued=20) as client:
        yield client


def failed(response, status: int, code: str | None = None) -> dict:
    """-> the error of a response, which is one, in OpenAI's shape, and tells nothing of the machine."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and isinstance(error["message"], str)
    assert "Traceback" not in response.text and "/home" not in response.text and " at 0x" not in response.text
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error") and code in (None, error["code"])
    return error


def test_models(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["modalities"] == ["text", "image", "video", "audio"] and card["chats"]
    assert card["max_model_len"] == fake.CONTEXT and client.get("/v1/models/tiny").json() == card
    failed(client.get("/v1/models/other"), 404, "model_not_found")


def test_a_chat_completion(client):
    body = client.post(CHAT, json=fake.say()).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == fake.SAYS and choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant" and body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9,
                             "prompt_tokens_details": {"cached_tokens": 3}}  # fmt: skip


def test_what_is_asked_reaches_the_engine():
    engine = fake.FakeEngine(fake.trained().tokenizer)
    with fake.client(engine, seconds=9.0) as client:
        said = fake.shown("what?", fake.png())
        body = client.post(CHAT, json={"engine": "tiny", "messages": [said], "temperature": 0.5, "n": 2, "seed": 3,
                                       "stop": ["7", "d"], "max_tokens": 30}).json()  # fmt: skip
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["message"]["content"] == "re"
    one, two = engine.requests
    assert (one.seed, two.seed, one.stop, one.max_new_tokens) == (3, 4, ("7", "d"), 30)
    assert one.sampling.temperature == 0.5 and one.seconds == 9.0 and one.user == "testclient"
    assert len(one.prompt) == 2 + 4 + 5 == body["usage"]["prompt_tokens"] and one.prompt.media and one.read
    assert body["usage"]["completion_tokens"] == 4


def test_a_chat_s_logprobs(client):
    body = client.post(CHAT, json=fake.say(logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == fake.SAYS
    assert content[0] == {"token": "r", "logprob": -0.5, "bytes": [114], "top_logprobs": [
        {"token": "r", "logprob": -0.5, "bytes": [114]}, {"token": "s", "logprob": -1.5, "bytes": [115]}]}  # fmt: skip


def test_completions_of_many_prompts(client):
    """Texts and token ids, n of each, in their order."""
    ids = fake.trained().tokenizer.encode("hi")
    for prompt, count in (("hi", 1), (["hi", "ho ho"], 2), (ids, 1), ([ids, [*ids, 50, 9]], 2)):
        body = client.post(COMPLETION, json={"prompt": prompt, "n": 2}).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
        assert {choice["text"] for choice in body["choices"]} == {fake.SAYS}
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 20
    assert body["object"] == "text_completion"


def test_echo_scores_the_prompt(client, monkeypatch):
    """A character of two bytes is two tokens, which begin at the same place; max_tokens=0 says nothing more."""
    monkeypatch.setattr(score, "prompt", fake.scored)
    for more, said in (({"max_tokens": 0}, ""), ({}, fake.SAYS)):
        (choice,) = client.post(COMPLETION, json={"prompt": "éh", "echo": True, "logprobs": 1} | more).json()["choices"]
        told = choice["logprobs"]
        assert choice["text"] == "éh" + said
        assert told["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "h", *said]
        assert told["token_logprobs"] == [None, -2.0, -2.0, *[-0.5] * len(said)]
        assert told["top_logprobs"][:2] == [None, {"bytes:\\xaa": -1.0, "bytes:\\xa9": -2.0}]
        assert told["text_offset"] == [0, 0, 1, *range(2, 2 + len(said))]
        assert choice["finish_reason"] == ("stop" if said else "length")


def test_a_prompt_is_scored_once_and_only_for_logprobs(client, monkeypatch):
    seen = []
    monkeypatch.setattr(score, "prompt", lambda *asked: seen.append(asked[1]) or fake.scored(*asked))
    body = {"prompt": ["éh", "x"], "echo": True, "n": 2}
    assert [choice["text"] for choice in client.post(COMPLETION, json=body).json()["choices"]] == [
        text + fake.SAYS for text in ("éh", "éh", "x", "x")]  # fmt: skip
    assert not seen
    choices = client.post(COMPLETION, json=body | {"logprobs": 1}).json()["choices"]
    assert len(seen) == 2 and [len(choice["logprobs"]["tokens"]) for choice in choices] == [8, 8, 6, 6]
    with fake.client(queued=4, seconds=0.0) as late:
        failed(late.post(COMPLETION, json=body | {"logprobs": 1}), 503, "timeout")


def test_a_chosen_token_is_among_the_top(client):
    (choice,) = client.post(COMPLETION, json={"prompt": "x", "logprobs": 0}).json()["choices"]
    assert choice["logprobs"]["top_logprobs"][0] == {"r": -0.5}


def test_embeddings(client):
    """Of texts, of token ids and as base64: the same vectors of length 1, which are those of embed."""
    trained = fake.trained()
    texts = ["hi", "something longer"]
    ids = [trained.tokenizer.encode(text) for text in texts]
    expected = embed.embed(trained, [embed.document(trained, one) for one in ids])
    for value, form in ((texts, None), (ids, "float"), (texts, "base64")):
        body = client.post("/v1/embeddings", json={"input": value, "encoding_format": form}).json()
        vectors = [one["embedding"] for one in body["data"]]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(vectors, expected, rtol=1e-6)
        assert [one["index"] for one in body["data"]] == [0, 1] and body["usage"] == {"prompt_tokens": 18,
                                                                                     "total_tokens": 18}  # fmt: skip
    assert len(client.post("/v1/embeddings", json={"input": "hi"}).json()["data"]) == 1


def test_transcriptions():
    engine = fake.FakeEngine(fake.trained().tokenizer)
    with fake.client(engine, transcribe="heard?") as client:
        sound = {"file": ("a.wav", encoded(wave(seconds=0.05)))}
        body = client.post("/v1/audio/transcriptions", files=sound, data={"model": "tiny"}).json()
        assert body["text"] == fake.SAYS and body["usage"]["output_tokens"] == 5
        more = {"response_format": "text", "prompt": "who?", "temperature": "0.5", "language": "en"}
        assert client.post("/v1/audio/transcriptions", files=sound, data=more).text == fake.SAYS + "\n"
        one, two = engine.requests
        decode = fake.trained().tokenizer.decode
        assert decode(one.prompt.tokens) == "heard?" and decode(two.prompt.tokens) == "who?"
        assert one.prompt.media[0][1].modality == "audio"
        assert (one.sampling.temperature, two.sampling.temperature) == (0.0, 0.5)
        for data, param in (({"response_format": "srt"}, "response_format"), ({"temperature": "x"}, "temperature"),
                            ({"stream": "true"}, "stream"), ({"propmt": "x"}, "propmt")):  # fmt: skip
            assert failed(client.post("/v1/audio/transcriptions", files=sound, data=data), 400)["param"] == param
        failed(client.post("/v1/audio/transcriptions", files={"file": b"no sound"}), 400, "invalid_medium")
        failed(client.post("/v1/audio/transcriptions", files={"other": b"x"}), 400)
        failed(client.post("/v1/audio/transcriptions", json={}), 415)
        failed(client.post("/v1/audio/transcriptions", content=b"x",
                           headers={"content-type": "multipart/form-data"}), 400)  # fmt: skip
        for name in ("model", "engine"):
            failed(client.post("/v1/audio/transcriptions", files=sound, data={name: "x"}), 404)
        failed(client.post("/v1/audio/transcriptions", files=sound, data={"prompt": "x" * 70_000}), 400)
        for charset in ("punycode", '"idna"', "UTF-7"):
            failed(client.post("/v1/audio/transcriptions", content=b"--x--", headers={
                "content-type": f"multipart/form-data; boundary=x; charset={charset}"}), 415)  # fmt: skip


def test_tokens(client):
    """In vLLM's shapes; a conversation's are those of its prompt."""
    tokenizer = fake.trained().tokenizer
    body = client.post("/tokenize", json={"prompt": "h<end>", "return_token_strs": True}).json()
    assert body == {"count": 6, "max_model_len": fake.CONTEXT, "tokens": tokenizer.encode("h<end>"),
                    "token_strs": list("h<end>")}  # fmt: skip
    assert client.post("/detokenize", json={"model": "tiny", "tokens": body["tokens"]}).json() == {"prompt": "h<end>"}
    said = {"messages": [{"role": "user", "content": "hi"}], "return_token_strs": True}
    assert client.post("/tokenize", json=said).json()["token_strs"] == ["<user>", "h", "i", "<assistant>"]
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<end>" and info["model_max_length"] == fake.CONTEXT and info["tokenizer_class"]
    failed(client.post("/tokenize", json={}), 400)
    failed(client.post("/detokenize", json={"tokens": [263]}), 400)
    failed(client.post("/detokenize", json={"tokens": [-1]}), 400)
    failed(client.post("/detokenize", json={"tokens": "a"}), 400)


def test_plain_text_models_have_no_turns():
    with fake.client(model=fake.trained(False)) as client:
        assert not client.get("/v1/models").json()["data"][0]["chats"]
        assert "plain text" in failed(client.post(CHAT, json=fake.say()), 400)["message"]
        assert client.post(COMPLETION, json={"prompt": "hi"}).json()["choices"][0]["text"] == fake.SAYS


def raw(body: bytes, kind: str = "application/json"):
    return {"content": body, "headers": {"content-type": kind}}


def test_an_error_names_the_medium_that_is_meant(client):
    asked = {"messages": [fake.shown("x", fake.png(), b"no picture")]}
    error = failed(client.post(CHAT, json=asked), 400, "invalid_medium")
    assert error["param"] == "messages[0].content[1]" and error["message"].startswith(error["param"])
    assert failed(client.post("/v1/audio/transcriptions", files={"file": b"no sound"}), 400)["param"] == "file"


@pytest.mark.parametrize("path, sent, status, code", [
    (CHAT, raw(b"{"), 400, "invalid_json"), (CHAT, raw(b"[]"), 400, "invalid_type"),
    (CHAT, raw(b""), 400, "invalid_json"),
    (CHAT, raw(b"\xff\xfe"), 400, "invalid_json"), (CHAT, raw(b"3"), 400, "invalid_type"),
    (CHAT, raw(b'{"temperature": NaN}'), 400, "invalid_json"), (CHAT, raw(b'{"top_p": 1e999}'), 400, "invalid_value"),
    (CHAT, raw(b"[" * 100_000), 400, "invalid_json"), (CHAT, raw(b'{"a":' * 100_000), 400, "invalid_json"),
    (CHAT, raw(b'{"n": ' + b"9" * 10_000 + b"}"), 400, "invalid_json"),
    (CHAT, raw(b"{}", "text/plain"), 415, "content_type"), (CHAT, {"content": b"{}"}, 415, "content_type"),
    (CHAT, raw(b" " * 3_000_001), 413, "body_too_large"),
    (CHAT, raw(b"[" + b"1," * 1_000_001 + b"1]"), 413, "body_too_large"),
    (CHAT, raw(b"[" + b"[],{}," * 50_000 + b"1]"), 413, "body_too_large"),
    (CHAT, raw('{"a": "é"}'.encode("utf-16")), 400, "invalid_json"),
    (CHAT, raw(iter([b"x" * 1_000_000] * 9)), 413, "body_too_large"),
    (CHAT, {"json": fake.say(model="other")}, 404, "model_not_found"),
    (CHAT, {"json": fake.say(model="\ud800")}, 404, "model_not_found"),
    *((path, {"json": {"engine": "other"}}, 404, "model_not_found") for path in (
        CHAT, COMPLETION, "/v1/embeddings", "/tokenize", "/detokenize", "/look")),
    (CHAT, {"json": {"messages": []}}, 400, "invalid_value"), (CHAT, {"json": {}}, 400, "invalid_value"),
    (CHAT, {"json": fake.say("x" * 200)}, 400, "context_length_exceeded"),
    *((path, {"json": given}, 400, "context_length_exceeded") for path, given in (
        (COMPLETION, {"prompt": ["a", LONG]}), ("/v1/embeddings", {"input": ["a", LONG]}), (CHAT, fake.say(LONG)),
        ("/tokenize", {"prompt": LONG}), ("/tokenize", fake.say(LONG)),
    )),
    (CHAT, {"json": fake.say(max_tokens=125)}, 400, "context_length_exceeded"),
    (CHAT, {"json": fake.say("\ud800")}, 400, None),
    (CHAT, {"json": {"messages": [{"role": "assistant", "content": "x"}]}}, 400, None),
    (CHAT, {"json": {"messages": [fake.shown("x", b"no picture")]}}, 400, "invalid_medium"),
    (CHAT, {"json": {"messages": [fake.shown("x", fake.png()[:60])]}}, 400, "invalid_medium"),
    (CHAT, {"json": {"messages": [fake.shown("x", *[fake.png()] * 17)]}}, 400, "too_many_media"),
    (CHAT, {"json": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]}]}}, 400, "invalid_medium"),
    (CHAT, {"json": {"messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "%%", "format": "wav"}}]}]}}, 400, "invalid_medium"),
    (CHAT, {"json": fake.say(stop=["x"] * 1000)}, 400, "invalid_value"),
    (CHAT, {"json": fake.say(chat_template="{{ messages }}")}, 400, "unsupported_parameter"),
    (COMPLETION, {"json": {}}, 400, "invalid_value"), (COMPLETION, {"json": {"prompt": ""}}, 400, "invalid_value"),
    (COMPLETION, {"json": {"prompt": []}}, 400, "invalid_value"), (COMPLETION, {"json": {"prompt": [[]]}}, 400, None),
    (COMPLETION, {"json": {"prompt": [1.5]}}, 400, None), (COMPLETION, {"json": {"prompt": [True]}}, 400, None),
    (COMPLETION, {"json": {"prompt": ["x", 3]}}, 400, None), (COMPLETION, {"json": {"prompt": [263]}}, 400, None),
    (COMPLETION, {"json": {"prompt": [-1]}}, 400, None), (COMPLETION, {"json": {"prompt": [10**30]}}, 400, None),
    (COMPLETION, {"json": {"prompt": [4]}}, 400, None),  # <image>
    (COMPLETION, {"json": {"prompt": ["x"] * 11, "n": 2}}, 400, "too_many_prompts"),
    (COMPLETION, {"json": {"prompt": "x", "suffix": "y"}}, 400, "unsupported_parameter"),
    (COMPLETION, {"json": {"prompt": "x" * 120, "max_tokens": 9}}, 400, "context_length_exceeded"),
    ("/v1/embeddings", {"json": {"input": "x", "dimensions": 3}}, 400, "unsupported_parameter"),
    ("/v1/embeddings", {"json": {"input": ""}}, 400, None),
    ("/v1/embeddings", {"json": {"input": "x" * 129}}, 400, None),
    ("/v1/embeddings", {"json": {"input": "x", "encoding_format": "int8"}}, 400, None),
    ("/v1/embeddings", {"json": {"input": [300]}}, 400, None), ("/v1/embeddings", {"json": {}}, 400, None),
    ("/v1/moderations", {"json": {"input": "x"}}, 404, None), ("/nowhere", {"json": {}}, 404, None),
    ("/v1/models", {"json": {}}, 405, None), ("/metrics", {"json": {}}, 405, None),
])  # fmt: skip
def test_bad_requests(client, path, sent, status, code):
    """Each is answered with what is wrong; the server goes on."""
    if "json" in sent:  # httpx would not write half a surrogate pair
        sent = raw(json.dumps(sent["json"]).encode())
    failed(client.post(path, **sent), status, code)
    assert client.post(CHAT, json=fake.say()).status_code == 200


@pytest.mark.parametrize("text", [
    '[1, 2, [3, {"a": [], "b": {}}]]', r'["a,[{", "\"", ",", "\\", ",\\\"[,", {",": "{"}]', '"a,[{"', "1",
])  # fmt: skip
def test_values_are_counted_before_a_body_is_parsed(text):
    """Of n values n - 1 have a comma before them, but for the first of each list and object."""
    def count(value) -> tuple[int, int]:
        if not isinstance(value, list | dict):
            return 0, 0
        within = [count(one) for one in (value.values() if isinstance(value, dict) else value)]
        commas, opened = map(sum, zip(*within, strict=True)) if within else (0, 0)
        return commas + max(len(value) - 1, 0), opened + 1

    assert wire.counted(text.encode()) == count(json.loads(text))


def test_marks_within_a_text_are_no_values(client):
    said = fake.say(metadata={"a": ',[{"\\' * 200_000})
    assert client.post(CHAT, json=said).status_code == 200
    ids = client.post("/detokenize", json={"tokens": fake.trained().tokenizer.encode("x") * 500_000})
    assert ids.json()["prompt"] == "x" * 500_000


def test_more_answers_than_may_wait():
    """Would be refused for ever: that is no 429."""
    with fake.client(queued=3) as client:
        error = failed(client.post(CHAT, json=fake.say(n=4)), 400, "invalid_value")
        assert error["param"] == "n" and "n=4 must be at most 3" in error["message"]
        assert client.post(CHAT, json=fake.say(n=3)).status_code == 200


@pytest.mark.parametrize("error, status, header", [
    (Busy("too many requests wait", 2.4), 429, "2"), (config.InputError("no such thing"), 400, None),
    (ZeroDivisionError("a secret"), 500, None),
])  # fmt: skip
def test_what_the_engine_refuses(error, status, header):
    engine = fake.FakeEngine(fake.trained().tokenizer)
    engine.error = error
    with fake.client(engine) as client:
        for stream in (False, True):
            response = client.post(CHAT, json=fake.say(stream=stream))
            failed(response, status)
            assert response.headers.get("retry-after") == header and "secret" not in response.text


def test_metrics_count_what_was_answered():
    with fake.client() as client:
        client.post(CHAT, json=fake.say())
        client.post(CHAT, json=fake.say(stream=True)).read()
        client.post(COMPLETION, json={})
        client.get("/somewhere/else")
        text = client.get("/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['gpt4v_requests_total{path="/v1/chat/completions",status="200"}'] == "2.0"
    assert lines['gpt4v_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert lines['gpt4v_requests_total{path="other",status="404"}'] == "1.0"
    assert lines["gpt4v_prompt_tokens_total"] == "8.0" and lines["gpt4v_completion_tokens_total"] == "10.0"
    assert lines["gpt4v_cached_prompt_tokens_total"] == "6.0" and lines["gpt4v_first_token_seconds_count"] == "2.0"
    assert lines["gpt4v_engine_running"] == "1.0" and lines["gpt4v_engine_steps_total"] == "4.0"
