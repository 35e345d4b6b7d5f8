"""What the engine is asked and what it tells: the contract between HTTP and decoding."""

import dataclasses
from collections.abc import Callable

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import constrain, prompts, sample

MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt; n answers are n requests with seeds seed, seed + 1, ..."""

    prompt: chat.Document
    read: prompts.Read | None = None
    max_new_tokens: int = 64
    sampling: sample.Sampling = sample.Sampling()  # noqa: RUF009, frozen
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # of each token, beside so many of the most probable ones, at most MOST_LOGPROBS
    grammar: constrain.Grammar | None = None
    user: str = ""  # whose turn it is in the queue: a key's name, or an address
    seconds: float | None = None  # it is cut ("timeout") when it has taken so long, the queue included


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of an answer. Its texts joined are the whole answer's text; so are its tokens."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of the tokens
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each token: the most probable ones, (token, logprob)
    # With log-probabilities: (token, logprob, top) of the end token, which is none of the answer's; () or one.
    end: tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...] = ()
    finish: str | None = None  # of the last Delta: stop | length | forbidden | unreadable | cancelled | timeout | error
    cached: int = 0  # of the first Delta: the prompt's positions that the prefix cache had
    error: str = ""  # with finish "error": what to say


Tell = Callable[[Delta], None]  # called on the engine's thread: it must return at once


class Busy(config.InputError):
    """The queue is full, or the engine is closing: try again after `seconds`."""

    def __init__(self, text: str, seconds: float):
        super().__init__(text)
        self.seconds = seconds
