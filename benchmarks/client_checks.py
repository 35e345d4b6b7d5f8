"""What a client of OpenAI's endpoints asks of a live server, and what the answers must be: by the openai Python client.

client_checks.mjs has the same checks, by openai's node client, under the same names. benchmarks.clients runs both.
"""

import concurrent.futures
import io
import json
import re
import traceback
import wave
from collections.abc import Callable

import openai

from benchmarks.bad_kinds import gif, picture, uri

NAME, KEY = "it", "clients!" * 2
QUEUED = 4  # requests that may wait at the server: a few clients fill its queue


# ---- what is sent


def sound() -> bytes:
    with wave.open(file := io.BytesIO(), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000))  # half a second of silence
    return file.getvalue()


def media() -> list[dict]:
    """-> a picture, a clip and a sound as the parts of a message."""
    heard = uri(sound(), "audio/wav")
    return [{"type": "image_url", "image_url": {"url": uri(picture(64))}},
            {"type": "video_url", "video_url": {"url": uri(gif(8), "image/gif")}},
            {"type": "input_audio", "input_audio": {"data": heard.partition(",")[2], "format": "wav"}}]  # fmt: skip


# ---- the checks; `it` is the client


def ask(it, content="hi", **more):
    """A chat, always of the same answer."""
    messages = [{"role": "user", "content": content}]
    more = {"model": NAME, "temperature": 0, "max_tokens": 12} | more
    return it.chat.completions.create(messages=messages, **more)


def said(answer) -> str:
    return answer.choices[0].message.content


def go_on(it, prompt="the red", **more):
    return it.completions.create(**{"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 12} | more)


def root(it):
    """-> the same client, for what does not stand below /v1."""
    return it.with_options(base_url=str(it.base_url).removesuffix("/v1/"))


def ids_of(it, text: str) -> list[int]:
    return root(it).post("/tokenize", body={"prompt": text}, cast_to=object)["tokens"]


def refused(kind: type, code: str | None, param: str | None, call: Callable, *arguments, **more):
    """-> the client's error, which must be of this kind and have OpenAI's body."""
    try:
        call(*arguments, **more)
    except kind as error:
        assert (error.code, error.param) == (code, param), f"code {error.code}, param {error.param}"
        assert error.body["message"] and error.body["type"] == error.type, error.body
        return error
    raise AssertionError(f"no {kind.__name__}")


def models(it):
    assert [model.id for model in it.models.list()] == [NAME] and it.models.retrieve(NAME).id == NAME
    refused(openai.NotFoundError, "model_not_found", "model", it.models.retrieve, "other")


def sees(it):
    """Each medium takes positions, and all of them stand beside each other."""
    text, plain = {"type": "text", "text": "what?"}, ask(it, "what?").usage.prompt_tokens
    taken = [ask(it, [part, text]).usage.prompt_tokens - plain for part in media()]
    assert min(taken) > 0 and ask(it, [*media(), text]).usage.prompt_tokens - plain == sum(taken), taken


def streams(it):
    for more in ({}, {"temperature": 1, "seed": 5, "n": 2, "max_tokens": 40}):
        joined: dict[int, str] = {}
        for chunk in ask(it, stream=True, **more):
            for choice in chunk.choices:
                joined[choice.index] = joined.get(choice.index, "") + (choice.delta.content or "")
        assert joined == {choice.index: choice.message.content for choice in ask(it, **more).choices}, joined
    whole = go_on(it).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in go_on(it, stream=True)) == whole


def usage(it):
    *parts, last = ask(it, stream=True, stream_options={"include_usage": True})
    assert not last.choices and not any(part.usage for part in parts)
    asked = ask(it).usage.prompt_tokens
    for n, used in ((1, last.usage), (3, ask(it, n=3, extra_body={"min_tokens": 12}).usage)):
        told = used.prompt_tokens, used.completion_tokens, used.total_tokens
        assert told == (asked, n * 12, asked + n * 12), used


def seeds(it):
    texts = [choice.message.content for choice in ask(it, n=3, temperature=1, seed=7).choices]
    assert texts == [said(ask(it, temperature=1, seed=7 + i)) for i in range(3)] and len(set(texts)) == 3, texts


def stops(it):
    whole = said(ask(it))
    stop = re.search("[ -~]{2}", whole[1:])[0]
    answer = ask(it, stop=[stop, "never"])
    assert said(answer) == whole.partition(stop)[0] and answer.choices[0].finish_reason == "stop", said(answer)
    assert ask(it).choices[0].finish_reason == "length"


def biased(it):
    (a,) = ids_of(it, "a")
    assert said(ask(it, logit_bias={str(a): 100}, max_tokens=5)) == "aaaaa"
    answer = ask(it, logit_bias={str(a): -100}, max_tokens=100, temperature=2, logprobs=True)
    assert "a" not in [token.token for token in answer.choices[0].logprobs.content]


def penalised(it):
    """A token that a bias has always chosen is chosen once."""
    (a,) = ids_of(it, "a")
    forced = {"logit_bias": {str(a): 1.5}, "max_tokens": 5}
    assert said(ask(it, **forced)) == "aaaaa"
    for law in ("frequency_penalty", "presence_penalty"):
        text = said(ask(it, **forced, **{law: 2}))
        assert text.startswith("a") and not text.startswith("aa"), (law, text)
        assert said(ask(it, **forced, **{law: -2})) == "aaaaa", law


def logprobs(it):
    for token in ask(it, logprobs=True, top_logprobs=3).choices[0].logprobs.content:
        best = token.top_logprobs
        assert len(best) == 3 and (token.token, token.logprob) == (best[0].token, best[0].logprob), token
        assert best[0].logprob >= best[1].logprob >= best[2].logprob
    found = go_on(it, logprobs=3).choices[0].logprobs
    assert found.token_logprobs == [max(top.values()) for top in found.top_logprobs]
    assert len(found.tokens) == len(found.text_offset) == 12


def formats(it):
    answers = [ask(it, seed=seed, temperature=1, max_tokens=100, response_format={"type": "json_object"})
               for seed in range(4)]  # fmt: skip
    done = [said(answer) for answer in answers if answer.choices[0].finish_reason == "stop"]
    assert done and all(isinstance(json.loads(text), dict) for text in done), [said(answer) for answer in answers]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    text = said(ask(it, max_tokens=100, response_format=form))
    assert json.loads(text) in ({"a": 1}, {"a": 2}), text


def engine(it):
    assert said(ask(it, extra_body={"model": None, "engine": NAME})) == said(ask(it))
    refused(openai.NotFoundError, "model_not_found", "model", ask, it, extra_body={"model": None, "engine": "other"})


def prompts(it):
    texts = ["the red", "what is"]
    ids = [ids_of(it, text) for text in texts]
    alone = [go_on(it, text).choices[0].text for text in texts]
    assert go_on(it, ids[0]).choices[0].text == alone[0]
    for prompt in (texts, ids):
        assert [(c.index, c.text) for c in go_on(it, prompt).choices] == list(enumerate(alone)), prompt


def echo(it):
    whole = go_on(it, echo=True, logprobs=1).choices[0]
    count = len(ids_of(it, "the red"))
    assert whole.text == "the red" + go_on(it).choices[0].text
    assert whole.logprobs.token_logprobs[0] is None and len(whole.logprobs.tokens) == count + 12
    scored = go_on(it, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.text == "the red" and scored.logprobs.token_logprobs == whole.logprobs.token_logprobs[:count]
    bare = go_on(it, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    assert [len(top) for top in bare.top_logprobs[1:]] == [1] * (count - 1), bare


def embeddings(it):
    texts, forms = ["hi", "the red"], ({"encoding_format": "float"}, {})  # without, the client asks for base64
    floats, decoded = ([item.embedding for item in it.embeddings.create(model=NAME, input=texts, **form).data]
                       for form in forms)  # fmt: skip
    assert floats == decoded and len(floats) == 2
    assert all(abs(sum(value * value for value in vector) - 1) < 1e-5 for vector in floats)


def transcriptions(it):
    heard = it.audio.transcriptions.create(model=NAME, file=("a.wav", sound()))
    asked = ask(it, [media()[2], {"type": "text", "text": "what is said?"}], max_tokens=None)
    assert heard.text == said(asked) and heard.usage.input_tokens == asked.usage.prompt_tokens, heard.text[:40]


def moderations(it):
    bad, good = it.moderations.create(input=["a badword", "a good word"]).results
    assert bad.flagged and not good.flagged
    refused(openai.BadRequestError, "content_filter", "messages", ask, it, "badword")


def tokens(it):
    other = root(it)
    found = other.post("/tokenize", body={"prompt": "the red", "return_token_strs": True}, cast_to=object)
    assert found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == "the red", found
    assert other.post("/detokenize", body={"tokens": found["tokens"]}, cast_to=object)["prompt"] == "the red"
    info = other.get("/tokenizer_info", cast_to=object)
    assert info["eos_token"] == "<end>" and info["model_max_length"] == found["max_model_len"], info


def health(it):
    assert root(it).get("/health", cast_to=object) == {"status": "ok"}

    def counted() -> float:
        text = root(it).get("/metrics", cast_to=str)
        return float(re.search(r"^gpt4v_completion_tokens_total (\S+)", text, re.M)[1])

    before = counted()
    ask(it, extra_body={"min_tokens": 12})
    assert counted() == before + 12


def errors(it):
    bad, nothing = openai.BadRequestError, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    error = refused(bad, "unknown_parameter", "temprature", ask, it, extra_body={"temprature": 1})
    assert "did you mean 'temperature'" in error.message, error.message
    refused(bad, "context_length_exceeded", "messages", ask, it, "red " * 3000)
    refused(bad, "invalid_value", "n", ask, it, n="3")
    refused(bad, "unsupported_parameter", "tools", ask, it, tools=[])
    refused(bad, "invalid_medium", "messages[0].content[0]", ask, it, [nothing])
    refused(openai.AuthenticationError, "invalid_api_key", None, ask, it.with_options(api_key="other" * 4))
    refused(openai.NotFoundError, "model_not_found", "model", ask, it, model="other")


def crowd(it):
    """Four may wait; of 16 at once they are answered, and others are told to come later."""
    def one(_):
        try:
            return ask(it, max_tokens=100).usage.total_tokens > 0
        except openai.RateLimitError as error:
            return error.code == "rate_limit_exceeded" and int(error.response.headers["retry-after"]) > 0 and "later"

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(16)))
    assert all(found) and found.count(True) >= QUEUED and "later" in found, found


CHECKS = {
    "models: list, retrieve, another one": models,
    "chat about a picture (data: URI), a clip, a sound, all three": sees,
    "stream = whole, of chats, of two answers, of completions": streams,
    "usage adds up; include_usage: in the last chunk alone": usage,
    "n, seed: answer i is that of the seed + i": seeds,
    "stop": stops,
    "logit_bias: 100, -100": biased,
    "frequency_penalty, presence_penalty": penalised,
    "logprobs: the greedy token's is the first of top_logprobs, the same float": logprobs,
    "response_format: json_object, json_schema": formats,
    "engine in place of model": engine,
    "completions: a text, a list, token ids, lists of them": prompts,
    "echo, with logprobs, also alone": echo,
    "embeddings: float = base64, length 1": embeddings,
    "transcriptions: a chat's answer about the sound": transcriptions,
    "moderations, and a chat that is refused": moderations,
    "tokenize, detokenize, tokenizer_info": tokens,
    "health, metrics": health,
    "errors 400 (field, context, type, tools, medium), 401, 404": errors,
    "errors 429: 16 at once, Retry-After": crowd,
}


def by_python(it) -> dict[str, str]:
    """-> check -> "yes", or "no: " and why."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check(it)
            found[name] = "yes"
        except Exception as error:  # whatever it is: the page tells it
            ours = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
            found[name] = f"no: {type(error).__name__} {error} in {ours[-1]}"
        print(f"openai python  {name}: {found[name]}", flush=True)
    return found
