"""Bodies: what is refused, by which name, and what becomes of what is not."""

import dataclasses
import json

import pytest

from gpt4v_jax.generate import prompts, sample
from gpt4v_jax.serve import schema
from gpt4v_jax.serve.errors import ApiError

VOCAB = 263
DEEP = {"type": "object"}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def asked(kinds=schema.CHAT, **fields) -> schema.Asked:
    first = {"messages": []} if kinds is schema.CHAT else {"prompt": "x"}
    return schema.asked(schema.read(first | fields, kinds), VOCAB)


@pytest.mark.parametrize("fields, param", [
    ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 10**9}, "n"), ({"n": "3"}, "n"), ({"n": 2.0}, "n"), ({"n": True}, "n"),
    ({"n": 17}, "n"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1e9}, "max_tokens"), ({"max_completion_tokens": "5"}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": 1e-9}, "temperature"), ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 2}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"), ({"typical_p": 0}, "typical_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"presence_penalty": float("inf")}, "presence_penalty"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"seed": 0.5}, "seed"), ({"seed": 2**70}, "seed"), ({"stream": 1}, "stream"), ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
    ({"logprobs": 3}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"263": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"5": "1"}}, "logit_bias[5]"), ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ["x"] * 1000}, "stop"), ({"stop": ""}, "stop"), ({"stop": ["a", ""]}, "stop"), ({"stop": [1]}, "stop"),
    ({"stop": "x" * 2**20}, "stop"), ({"modalities": ["text", "audio"]}, "modalities"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "maxLenght": 3}}}},
     "response_format.json_schema.schema"),
    ({"guided_json": DEEP}, "guided_json"), ({"guided_json": "{"}, "guided_json"), ({"guided_json": 3}, "guided_json"),
    ({"guided_json": "[" * 100_000}, "guided_json"), ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"), ({"guided_choice": [""]}, "guided_choice"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.json"),
    ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{}]}, "tools"), ({"functions": []}, "functions"), ({"tool_choice": "auto"}, "tool_choice"),
    ({"chat_template": "{{x}}"}, "chat_template"), ({"audio": {}}, "audio"),
])  # fmt: skip
def test_refused(fields, param):
    with pytest.raises(ApiError) as error:
        asked(**fields)
    assert error.value.field == param and error.value.status == 400
    assert param in error.value.message
    json.dumps(error.value.body, allow_nan=False)


@pytest.mark.parametrize("fields, param", [
    ({"max_tokens": 0}, "max_tokens"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"echo": 1}, "echo"), ({"messages": []}, "messages"),
])  # fmt: skip
def test_refused_of_completions(fields, param):
    with pytest.raises(ApiError) as error:
        asked(schema.COMPLETION, **fields)
    assert error.value.field == param


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ApiError, match="unknown field 'temprature' .did you mean 'temperature'"):
        asked(temprature=1)
    with pytest.raises(ApiError, match="unknown field"):
        asked(**{"x" * 100_000: 1})


def test_what_means_nothing_here_is_ignored_and_null_is_not_there():
    plain = asked(seed=1)
    assert asked(seed=1, user="me", store=True, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
                 n=None, tools=None, stop=None, temprature=None) == plain  # fmt: skip


def test_the_defaults_are_openai_s():
    assert asked(seed=3) == schema.Asked(sample.Sampling(1.0), seed=3)
    assert asked(schema.COMPLETION, seed=3).max_tokens == 16
    assert asked().seed != asked().seed


def test_all_reaches_the_sampling():
    values = {"temperature": 0.5, "top_p": 0.9, "frequency_penalty": -1.0, "presence_penalty": 2.0, "top_k": 4,
              "min_p": 0.1, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "repetition_penalty": 1.2,
              "no_repeat_ngram_size": 3}  # fmt: skip
    made = asked(**values, logit_bias={"5": -100, "7": 1}, min_tokens=2, max_tokens=9, n=2, seed=4, stop="x",
                 logprobs=True, top_logprobs=3)  # fmt: skip
    given = dataclasses.asdict(made.sampling)
    assert {name: given[name] for name in values} == values
    assert made.sampling.logit_bias == ((5, -100.0), (7, 1.0)) and made.sampling.min_new_tokens == 2
    assert (made.n, made.seed, made.stop, made.logprobs, made.max_tokens) == (2, 4, ("x",), 3, 9)
    assert asked(top_k=-1).sampling.top_k == 0
    assert asked(logprobs=True).logprobs == 0 and asked(logprobs=False).logprobs is None
    assert asked(max_tokens=3, max_completion_tokens=4).max_tokens == 4


@pytest.mark.parametrize("fields, kind", [
    ({"guided_regex": "(a+)+$"}, "regex"), ({"guided_choice": ["yes", "no"]}, "choices"),
    ({"guided_json": {"type": "string"}}, "schema"), ({"guided_json": '{"type": "string"}'}, "schema"),
    ({"structured_outputs": {"regex": "a*b"}}, "regex"), ({"structured_outputs": {"choice": ["a"]}}, "choices"),
    ({"response_format": {"type": "json_object"}}, "schema"), ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {
        "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}}}}, "schema"),
])  # fmt: skip
def test_grammars(fields, kind):
    made = asked(**fields).grammar
    assert (made and made.kind) == kind


def test_requests_fit_into_the_context():
    """n answers have seeds of their own; the room is what is left."""
    wish, prompt = asked(n=3, seed=5), prompts.plain([10] * 20)
    made = schema.requests(wish, prompt, None, 32, user="me", seconds=2.0)
    assert [r.seed for r in made] == [5, 6, 7] and {r.max_new_tokens for r in made} == {12}
    assert made[0].user == "me" and made[0].seconds == 2.0 and made[0].prompt is prompt
    assert schema.requests(asked(max_tokens=12), prompt, None, 32)[0].max_new_tokens == 12
    for fields, numbers in (({"max_tokens": 13}, ("20", "13", "33", "32")), ({}, ("32", "31"))):
        with pytest.raises(ApiError) as error:
            schema.requests(asked(**fields), prompts.plain([10] * (20 if fields else 32)), None, 32, "messages")
        assert error.value.code == "context_length_exceeded" and error.value.field == "messages"
        assert all(number in error.value.message for number in numbers)
