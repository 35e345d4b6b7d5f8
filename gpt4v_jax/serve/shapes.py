"""OpenAI's shapes of tokens, log-probabilities and usage."""

import codecs
import functools
import weakref
from collections.abc import Sequence
from typing import Any

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.generate import spelling

LEAST = -9999.0  # a log-probability of nothing: JSON has no infinity

Top = Sequence[tuple[int, float]]


class Names:
    """What tokens are called: their text, "bytes:\\xe2\\x80" where they are a part of a character, a special token's
    name."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        try:
            self._bytes = spelling.token_bytes(tokenizer)
        except config.InputError:  # WordPiece's tokens have no bytes of their own
            self._bytes = [tokenizer.decode([id]).encode() for id in range(tokenizer.vocab)]

    def bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""

    @functools.lru_cache(maxsize=4096)  # noqa: B019, one for each tokenizer
    def text(self, token: int) -> str:
        found = self.bytes(token)
        if not found:  # of a model whose vocabulary is larger than its tokenizer's some have no name
            return self._tokenizer.token(token) or f"token:{token}"
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in found)


_names: weakref.WeakKeyDictionary[Tokenizer, Names] = weakref.WeakKeyDictionary()


def names_of(tokenizer: Tokenizer) -> Names:
    if tokenizer not in _names:
        _names[tokenizer] = Names(tokenizer)
    return _names[tokenizer]


def chat_logprobs(names: Names, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[Top]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names.text(token), "logprob": max(logprob, LEAST), "bytes": list(names.bytes(token)) or None}

    content = [
        one(token, logprob) | {"top_logprobs": [one(*pair) for pair in best]}
        for token, logprob, best in zip(tokens, logprobs, top, strict=True)
    ]
    return {"content": content, "refusal": None}


class Place:
    """Where the next token of a text begins, in characters; a character of several tokens is whole with the last one,
    be that told later."""

    def __init__(self):
        self._read, self._at = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def behind(self, token: bytes) -> int:
        """-> where this token begins."""
        begins, self._at = self._at, self._at + len(self._read.decode(token))
        return begins


def legacy_logprobs(names: Names, tokens: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top | None],
                    place: Place) -> dict[str, Any]:  # fmt: skip
    """-> the shape of /v1/completions. place: of the first token; it goes on to that behind the last one. Beside the
    best tokens stands the one that was chosen, so there may be one more. The first token of a prompt has neither:
    None."""
    offsets, best = [], []
    for token, logprob, pairs in zip(tokens, logprobs, top, strict=True):
        offsets.append(place.behind(names.bytes(token)))
        if logprob is None:
            best.append(None)
            continue
        shown: dict[str, float] = {}
        for other, value in [*(pairs or ()), (token, logprob)]:  # the first of two that are called the same is the best
            shown.setdefault(names.text(other), max(value, LEAST))
        best.append(shown)
    return {
        "tokens": [names.text(token) for token in tokens],
        "token_logprobs": [None if value is None else max(value, LEAST) for value in logprobs],
        "top_logprobs": best,
        "text_offset": offsets,
    }


def usage(prompts: Sequence[chat.Document], completion: int, cached: int) -> dict[str, Any]:
    """prompts: each once, however many answers it has; positions, media included."""
    asked = sum(len(p) + len(p.source) for p in prompts)
    return {
        "prompt_tokens": asked, "completion_tokens": completion, "total_tokens": asked + completion,
        "prompt_tokens_details": {"cached_tokens": min(cached, asked)},
    }  # fmt: skip
