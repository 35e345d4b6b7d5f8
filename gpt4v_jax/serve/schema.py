"""What a body may say: each field's kind and limits, and the dataclass that comes of it. Nothing is converted: n="3" is
an error, and so is a field that nobody knows."""

import dataclasses
import functools
import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import constrain, prompts, sample
from gpt4v_jax.serve.errors import ApiError, shown
from gpt4v_jax.serve.requests import MOST_LOGPROBS, Request

MOST_ANSWERS = 16  # n
MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, characters of one
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where nobody says it, as OpenAI has it

Kind = Callable[[str, Any], Any]  # (name, value) -> the value; raises ApiError


# ---- kinds of values


def bad(name: str, value: Any, what: str, code: str | None = "invalid_value") -> ApiError:
    return ApiError(f"{name}={shown(value)} must be {what}", name, code)


def whole(low: int, high: int) -> Kind:
    def check(name, value):
        if type(value) is not int or not low <= value <= high:
            raise bad(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    def check(name, value):
        if type(value) not in (int, float) or not low <= value <= high or abs(value) > 1e300:  # also NaN
            bounds = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
            raise bad(name, value, bounds)
        return float(value)

    return check


def flag(name, value):
    if type(value) is not bool:
        raise bad(name, value, "true or false")
    return value


def text(name, value):
    if not isinstance(value, str):
        raise bad(name, value, "a text")
    return value


def one_of(*known: Any) -> Kind:
    def check(name, value):
        if not any(type(value) is type(k) and value == k for k in known):
            raise bad(name, value, f"one of {', '.join(json.dumps(k) for k in known)}")
        return value

    return check


def anything(name, value):
    return value


def section(**kinds: Kind) -> Kind:
    return lambda name, value: read(value, kinds, name)


def stops(name, value):
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise bad(name, value, "a text or a list of texts")
    if len(values) > MOST_STOPS:
        raise ApiError(f"{name} has {len(values)} texts: give at most {MOST_STOPS}", name, "invalid_value")
    for v in values:
        if not 0 < len(v) <= LONGEST_STOP:
            raise ApiError(f"a text of {name} has {len(v)} characters: each must have 1 to {LONGEST_STOP}", name,
                           "invalid_value")  # fmt: skip
    return tuple(values)


def biases(name, value):
    if not isinstance(value, dict):
        raise bad(name, value, 'an object such as {"50": -100}')
    found = []
    for key, added in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ApiError(f"{name} has the key {shown(key)}: keys are token ids", name, "invalid_value")
        found.append((int(key), number(-100, 100)(f"{name}[{key}]", added)))
    return tuple(found)


# ---- the fields of a body

SAMPLING: dict[str, Kind] = {  # by Sampling's names; its own limits hold, too
    "temperature": number(0, 2), "top_p": number(0, 1), "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2), "logit_bias": biases, "top_k": whole(-1, 2**31 - 1), "min_p": number(0, 1),
    "typical_p": number(0, 1), "epsilon_cutoff": number(0, 1), "eta_cutoff": number(0, 1),
    "repetition_penalty": number(0, 1e4), "no_repeat_ngram_size": whole(0, 2**31 - 1),
}  # fmt: skip
NAME: dict[str, Kind] = {"model": text, "engine": text}  # the newer name, and the older
BOTH: dict[str, Kind] = NAME | SAMPLING | {
    "stream": flag, "n": whole(1, MOST_ANSWERS), "stop": stops,
    "stream_options": section(include_usage=flag, include_obfuscation=flag), "seed": whole(-(2**63), 2**63 - 1),
    "min_tokens": whole(0, 2**31 - 1), "guided_regex": anything, "guided_choice": anything, "guided_json": anything,
    "structured_outputs": section(regex=anything, choice=anything, json=anything),
    "response_format": section(type=one_of("text", "json_object", "json_schema"), json_schema=section(
        name=text, description=text, strict=flag, schema=anything)),
}  # fmt: skip
CHAT: dict[str, Kind] = BOTH | {
    "messages": anything, "max_tokens": whole(1, 2**31 - 1), "max_completion_tokens": whole(1, 2**31 - 1),
    "logprobs": flag, "top_logprobs": whole(0, MOST_LOGPROBS), "modalities": anything,
}  # fmt: skip
COMPLETION: dict[str, Kind] = BOTH | {
    "prompt": anything, "max_tokens": whole(0, 2**31 - 1), "echo": flag, "logprobs": whole(0, MOST_LOGPROBS),
    "best_of": whole(1, MOST_ANSWERS),
}  # fmt: skip
EMBEDDING: dict[str, Kind] = NAME | {"input": anything, "encoding_format": one_of("float", "base64")}
TOKENIZE: dict[str, Kind] = NAME | {"prompt": text, "messages": anything, "add_special_tokens": flag,
                                    "add_generation_prompt": one_of(True), "return_token_strs": flag}  # fmt: skip
DETOKENIZE: dict[str, Kind] = NAME | {"tokens": anything}
MODERATION: dict[str, Kind] = NAME | {"input": anything}
LOOK: dict[str, Kind] = NAME | {"messages": anything, "answer": anything, "token": whole(0, 2**31 - 1),
                                "picture": whole(0, 2**31 - 1)}  # fmt: skip

# OpenAI's fields that mean nothing here, and change no answer.
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "prediction", "reasoning_effort", "verbosity")  # fmt: skip
NO_TOOLS = "this model calls no tools and no functions: leave it out"
NO_TEMPLATE = "turns are laid as the model was trained, and no other way: leave it out"
REFUSED = {
    "tools": NO_TOOLS, "tool_choice": NO_TOOLS, "functions": NO_TOOLS, "function_call": NO_TOOLS,
    "web_search_options": NO_TOOLS, "chat_template": NO_TEMPLATE, "chat_template_kwargs": NO_TEMPLATE,
    "audio": "this model answers in text alone: leave it out",
    "suffix": "this model does not fill in the middle: leave it out",
    "dimensions": "the vectors of this model have one length: leave it out",
}


def read(body: Any, kinds: Mapping[str, Kind], path: str = "") -> dict[str, Any]:
    """-> what is given, checked; null is as if it were not there. Raises ApiError, with the name of the field."""
    if not isinstance(body, dict):
        raise ApiError(f"{path or 'the body'} must be a JSON object", path or None, "invalid_type")
    found = {}
    for key, value in body.items():
        name = f"{path}.{key}" if path else key
        if value is None or not path and key in IGNORED and key not in kinds:
            continue
        if key in kinds:
            found[key] = kinds[key](name, value)
        elif not path and key in REFUSED:
            raise ApiError(f"{name}: {REFUSED[key]}", name, "unsupported_parameter")
        else:
            known = config.nearest(key, kinds) if len(key) < 100 else ""
            raise ApiError(f"unknown field {shown(name)}{known}", name[:100], "unknown_parameter")
    return found


# ---- what both completions are asked for


@dataclasses.dataclass(frozen=True)
class Asked:
    """All but the prompt."""

    sampling: sample.Sampling
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None  # None: the room that is left
    logprobs: int | None = None
    echo: bool = False
    grammar: constrain.Grammar | None = None
    stream: bool = False
    include_usage: bool = False


def asked(given: dict[str, Any], vocab: int) -> Asked:
    """given: by `read` of CHAT or COMPLETION. vocab: the model's tokens."""
    for token, _ in given.get("logit_bias", ()):
        if token >= vocab:
            raise ApiError(f"logit_bias names the token {token}: the vocabulary has 0 to {vocab - 1}", "logit_bias",
                           "invalid_value")  # fmt: skip
    if given.get("modalities", ["text"]) != ["text"]:
        raise bad("modalities", given["modalities"], '["text"]: this model answers in text alone')
    if given.get("best_of", 1) not in (1, given.get("n", 1)):
        raise bad("best_of", given["best_of"], "n or left out: answers are not ranked")
    if "stream_options" in given and not given.get("stream"):
        raise ApiError("stream_options says something of a stream: set stream to true", "stream_options",
                       "invalid_value")
    chats = "messages" in given
    limit = given.get("max_completion_tokens", given.get("max_tokens", None if chats else COMPLETION_TOKENS))
    echo = given.get("echo", False)
    if limit == 0 and not echo:
        raise ApiError("max_tokens=0 says nothing without echo: it must be 1 or more", "max_tokens", "invalid_value")
    if limit is not None and given.get("min_tokens", 0) > limit:
        raise bad("min_tokens", given["min_tokens"], f"at most max_tokens={limit}")
    return Asked(
        _sampling(given), given.get("n", 1), given.get("seed", secrets.randbits(31)), given.get("stop", ()), limit,
        _logprobs(given, chats), echo, grammar(given), given.get("stream", False),
        given.get("stream_options", {}).get("include_usage", False),
    )  # fmt: skip


def _sampling(given: dict[str, Any]) -> sample.Sampling:
    values = {name: given[name] for name in SAMPLING if name in given}
    values["top_k"] = max(values.get("top_k", 0), 0)  # vLLM's -1: all
    try:
        return sample.Sampling(**{"temperature": 1.0} | values, min_new_tokens=given.get("min_tokens", 0))
    except config.InputError as error:
        name = next((name for name in SAMPLING if str(error).startswith(name)), None)
        raise ApiError(str(error), name, "invalid_value") from None


def _logprobs(given: dict[str, Any], chats: bool) -> int | None:
    if not chats:
        return given.get("logprobs")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs=true", "top_logprobs", "invalid_value")
    return given.get("top_logprobs", 0) if given.get("logprobs") else None


def grammar(given: dict[str, Any]) -> constrain.Grammar | None:
    """-> of response_format, vLLM's guided_... or structured_outputs; one of them may be there."""
    makers = {"regex": constrain.regex, "choice": constrain.choices, "json": _schema}
    found = [(f"guided_{kind}", make, given[f"guided_{kind}"]) for kind, make in makers.items()
             if f"guided_{kind}" in given]  # fmt: skip
    found += [(f"structured_outputs.{kind}", makers[kind], value)
              for kind, value in given.get("structured_outputs", {}).items()]  # fmt: skip
    form = given.get("response_format", {})
    if form.get("type") == "json_object":
        found.append(("response_format", lambda _: constrain.json_object(), None))
    elif form.get("type") == "json_schema":
        if "schema" not in form.get("json_schema", {}):
            raise ApiError("response_format.json_schema.schema is missing", "response_format", "invalid_value")
        found.append(("response_format.json_schema.schema", _schema, form["json_schema"]["schema"]))
    elif "response_format" in given and ("type" not in form or "json_schema" in form):
        raise ApiError("response_format.type must say text, json_object or json_schema", "response_format")
    if len(found) > 1:
        raise ApiError(f"{found[0][0]} and {found[1][0]} do not go together: give one of them", found[1][0])
    for name, make, value in found:
        with naming(name):
            return make(value)
    return None


def _schema(value: Any) -> constrain.Grammar:
    if isinstance(value, str):  # vLLM takes its text, too
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise config.InputError("the schema's text is no JSON") from None
    return constrain.json_schema(value)


class naming:
    """with naming("prompt"): what is wrong with the input is said to be wrong with this field."""

    def __init__(self, name: str, code: str | None = "invalid_value"):
        self.name, self.code = name, code

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if type(error) is config.InputError:
            raise ApiError(f"{self.name}: {error}", self.name, self.code) from None
        if isinstance(error, BadMedium):
            raise ApiError(f"{self.name}: a medium cannot be used: {error}", self.name, "invalid_medium") from None


def requests(wish: Asked, prompt: chat.Document, read: prompts.Read | None, context: int, field: str = "prompt",
             **more: Any) -> list[Request]:  # fmt: skip
    """-> the n Requests of a prompt, which came by `field`; more: Request's other fields. Raises ApiError where it
    leaves no room."""
    room = context - len(prompt)
    make = functools.partial(ApiError, field=field, code="context_length_exceeded")
    if room < 1:
        raise make(f"the prompt has {len(prompt)} positions (media included), the model's context is {context}: "
                   f"shorten it to at most {context - 1}")
    if wish.max_tokens is not None and wish.max_tokens > room:
        raise make(f"the prompt has {len(prompt)} positions (media included), {len(prompt) + wish.max_tokens} with "
                   f"max_tokens={wish.max_tokens}: the model's context is {context}")
    limit = room if wish.max_tokens is None else wish.max_tokens
    one = Request(prompt, read, limit, wish.sampling, wish.seed, wish.stop, wish.logprobs, wish.grammar, **more)
    return [dataclasses.replace(one, seed=wish.seed + i) for i in range(wish.n)]
