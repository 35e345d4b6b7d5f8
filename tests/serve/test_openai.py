"""The unmodified `openai` client against a server on this machine: the engine itself, and one that waits."""

import base64
import contextlib
import socket
import threading

import numpy as np
import openai
import pytest
import uvicorn

from gpt4v_jax.generate import decode, prompts, sample
from gpt4v_jax.serve import protocol
from gpt4v_jax.serve.engine import Engine
from tests.data.test_sound import encoded, wave
from tests.serve import fake

KEY = "k" * 16


@contextlib.contextmanager
def served(engine, **settings):
    """-> the address of a server in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = protocol.HttpServer(fake.app(engine, **settings), "127.0.0.1", 0, 64)
        # Not HttpServer's own run: it takes the main thread's signals.
        thread = threading.Thread(target=uvicorn.Server.run, args=(server, [listening]))
        thread.start()
        try:
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client():
    engine = Engine(fake.trained(), slots=4)
    settings = {"moderation": fake.words()}
    with served(engine, keys=(("me", KEY),), **settings) as address:
        yield openai.OpenAI(base_url=address + "/v1", api_key=KEY, max_retries=0)
    engine.close(0)


def ask(client, text="hi", **more):
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **more)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_about_a_picture_is_generate_s(client):
    """Streamed, whole, and by decode.generate: the same answer; usage adds up."""
    trained, picture = fake.trained(), fake.png(3)
    body = {"model": "tiny", "messages": [fake.shown("what?", picture)], "seed": 5, "max_tokens": 8, "n": 2}
    whole = client.chat.completions.create(**body)
    media, read = prompts.attach(trained.layout, [("image", picture)])
    asked = prompts.prompt(trained, "what?", media)
    expected = decode.generate(trained, [asked], read, 8, sample.Sampling(1.0), [5], num_return_sequences=2)
    assert [choice.message.content for choice in whole.choices] == [answer.text for answer in expected]
    assert [choice.finish_reason for choice in whole.choices] == [answer.finish for answer in expected]
    usage = whole.usage
    assert usage.prompt_tokens == len(asked) and usage.completion_tokens == sum(len(a.tokens) for a in expected)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    joined, last = ["", ""], None
    for last in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            joined[choice.index] += choice.delta.content or ""
    assert joined == [answer.text for answer in expected]
    assert last.usage.completion_tokens == usage.completion_tokens and last.usage.prompt_tokens == len(asked)


def test_a_completion(client):
    """Echoed, with log-probabilities that do not depend on how many are asked for."""
    body = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**body).choices[0]
    whole = client.completions.create(**body, echo=True, logprobs=3).choices[0]
    assert whole.text == "hello" + plain.text and whole.logprobs.token_logprobs[0] is None
    assert len(whole.logprobs.tokens) == len(whole.logprobs.text_offset) == len(whole.logprobs.token_logprobs)
    best = [max(top.values()) for top in whole.logprobs.top_logprobs[5:]]
    np.testing.assert_allclose(best, whole.logprobs.token_logprobs[5:])  # greedy
    parts = client.completions.create(**body, echo=True, logprobs=3, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.text
    scored = client.completions.create(**body | {"max_tokens": 0}, echo=True, logprobs=1).choices[0].logprobs
    np.testing.assert_allclose(scored.token_logprobs[1:], whole.logprobs.token_logprobs[1:5], rtol=1e-5)
    alone = client.completions.create(**body, echo=True, logprobs=0).choices[0].logprobs  # no others beside it
    np.testing.assert_allclose(alone.token_logprobs[1:], whole.logprobs.token_logprobs[1:], rtol=1e-5)
    assert all(list(top) == [token] for token, top in zip(alone.tokens[1:], alone.top_logprobs[1:], strict=True))


def test_constrained(client):
    """A regular expression that makes others backtrack, and a schema by the client's own helper."""
    said = ask(client, max_tokens=5, extra_body={"guided_regex": "(a+)+$"}).choices[0].message.content
    assert said == "a" * len(said) and said
    assert ask(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content in ("yes", "no")
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                                      "additionalProperties": False}}  # fmt: skip
    said = ask(client, response_format={"type": "json_schema", "json_schema": schema}).choices[0]
    assert said.message.content.replace(" ", "").replace("\n", "") in ('{"a":1}', '{"a":2}')
    with pytest.raises(openai.BadRequestError, match="guided|regex"):
        ask(client, extra_body={"guided_regex": "(a"})


def test_embeddings(client):
    """The client asks for base64 by itself."""
    one, two = (item.embedding for item in client.embeddings.create(model="tiny", input=["hi", "there"]).data)
    floats = client.embeddings.create(model="tiny", input=["hi", "there"], encoding_format="float")
    np.testing.assert_allclose([one, two], [item.embedding for item in floats.data], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm([one, two], axis=1), 1, rtol=1e-5)


def test_a_transcription(client):
    sound = ("a.wav", encoded(wave(seconds=0.05)))
    assert isinstance(client.audio.transcriptions.create(model="tiny", file=sound).text, str)
    as_part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound[1]).decode(), "format": "wav"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [as_part]}], "max_tokens": 3}
    assert client.chat.completions.create(**body).usage.completion_tokens <= 3


def test_moderations(client):
    assert client.moderations.create(input="badword").results[0].flagged
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "badword")
    assert error.value.code == "content_filter"


def test_errors_are_the_client_s(client):
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="other"))
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "x" * 200)
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        ask(client, extra_body={"temprature": 1})
    assert ask(client, max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(stream):
    engine = fake.FakeEngine(fake.trained().tokenizer)
    engine.hold, engine.begun = threading.Event(), threading.Event()
    with served(engine) as address, socket.create_connection(address.removeprefix("http://").split(":")) as wire:
        body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": %s}' % str(stream).lower().encode()
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        if stream:
            wire.recv(10)
        engine.begun.wait()
        wire.close()
        assert engine.tickets[0].gone.wait(10)
