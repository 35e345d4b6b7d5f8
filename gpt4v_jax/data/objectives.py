"""What a document teaches: its next token, tokens that were masked, spans that were taken away, what follows a prefix.

What is drawn for a document is a function of (seed, epoch, its number). docs/objectives.md has the keys.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data.chat import Document, shifted
from gpt4v_jax.data.tokenizer import MASK, Tokenizer


def longest(data: config.Data, context: int) -> int:
    """-> tokens of a window of text."""
    return min(data.window or context, context)


def special_tokens(data: config.Data, objective: config.Objective, context: int) -> tuple[str, ...]:
    """-> the special tokens that a run's objectives need beside those of every tokenizer."""
    out = (MASK,) if "masked" in data.kinds else ()
    return out + (("<end>", *_sentinels(longest(data, context), objective)) if "span" in data.kinds else ())


def _sentinels(n: int, objective: config.Objective) -> list[str]:
    return [f"<extra_id_{k}>" for k in range(_spans(n, objective)[1])]  # T5's names


def check(kinds: Iterable[str], layout: batch_lib.Layout) -> None:
    """Raises InputError where the model cannot learn by such an objective, or would learn by none of them."""
    for kind in kinds:
        if layout.prefix == "all" and kind != "masked":
            raise config.InputError(f"data.objective={kind!r} needs a causal stream, and model.causal=False: set "
                                    "data.objective='masked', or model.causal=True")
        if kind == "span" and not layout.source:
            raise config.InputError("data.objective='span' needs an encoder: set model.source and cross blocks, "
                                    "or model.fusion.kind='encoder_decoder'")
    if layout.source and layout.place != "source" and "span" not in kinds:  # where media go there, so do all prompts
        raise config.InputError("model.source reads the text that data.objective='span' makes, and no data set has "
                                "it: set it, or model.source=None")


class Task:
    """One objective with what it needs to change documents. kind "next_token" leaves them as they are."""

    def __init__(self, kind: str = "next_token", objective: config.Objective = config.Objective(),  # noqa: B008, frozen
                 tokenizer: Tokenizer | None = None, seed: int | None = None, longest: int = 0):  # fmt: skip
        """longest: tokens of the longest document, of "span". seed None: for evaluation, as with seed 0."""
        self.kind, self.answers_only, self._objective, self._seed = kind, objective.answers_only, objective, seed or 0
        self.pairs = objective.contrastive > 0
        if kind == "masked":
            self._mask, self._words = tokenizer.mask, tokenizer.words()
            _demand(self._mask, kind, MASK)
        if kind == "span":
            names = _sentinels(longest, objective)
            self._sentinels, self._end = [tokenizer.id(name) for name in names], tokenizer.special.get("<end>")
            for id, name in zip((*self._sentinels, self._end), (*names, "<end>"), strict=True):
                _demand(id, kind, name)

    def lengths(self, n: int) -> tuple[int, int]:
        """-> (positions, positions of the source) of a document that had n."""
        if self.kind != "span":
            return n, 0
        taken, spans = _spans(n, self._objective)
        return taken + spans + 1, n - taken + spans

    def __call__(self, document: Document, epoch: int, i: int) -> Document:
        """Document i of the epoch as this objective has it."""
        if self.kind == "next_token":
            return document
        rng = np.random.default_rng((self._seed, epoch, i, 4))
        if self.kind == "prefix":
            return prefix(document, rng)
        if self.kind == "masked":
            return masked(document, rng, self._objective.masked, self._mask, self._words)
        return span(document, rng, self._objective, self._sentinels, self._end)


def _demand(id: int | None, kind: str, name: str) -> None:
    if id is None:
        raise config.InputError(f"data.objective={kind!r} needs the token {name}, which this tokenizer has not: it is "
                                "there where a run is trained with this objective from the start")


def masked(document: Document, rng, share: float, mask: int, words: np.ndarray) -> Document:
    """The masked language model of BERT (Devlin et al. 2019, sec. 3.1): of the tokens to be learnt `share` are chosen,
    at least one; 80 % of these become `mask`, 10 % one of `words`, 10 % stay. Every position sees the whole document;
    the target is the token at the position itself, and only the chosen ones are trained."""
    tokens = document.tokens.copy()
    can = np.flatnonzero(document.trained & np.isin(tokens, words))
    chosen = rng.permutation(can)[: max(round(share * len(can)), 1)]
    way = rng.random(len(chosen))
    tokens[chosen] = np.select([way < 0.8, way < 0.9], [mask, rng.choice(words, len(chosen))], tokens[chosen])
    weight = np.zeros(len(tokens), np.float32)
    weight[chosen] = 1
    return dataclasses.replace(
        document, tokens=tokens, target=document.tokens, weight=weight, ar=np.zeros(len(tokens), bool), shifted=False
    )


def prefix(document: Document, rng) -> Document:
    """The prefix language model (Raffel et al. 2020, sec. 3.2.2): what lies before a place drawn evenly is one block
    and only read, what follows is causal and learnt."""
    if len(document) < 2:
        raise config.InputError("data.objective='prefix' in windows of 1 token: raise data.window or model.context")
    cut = int(rng.integers(1, len(document)))
    ar, weight = document.ar.copy(), document.weight.copy()
    ar[1:cut], weight[: cut - 1] = False, 0
    return dataclasses.replace(document, ar=ar, weight=weight)


def span(document: Document, rng, objective: config.Objective, sentinels: list[int], end: int) -> Document:
    """Span corruption (Raffel et al. 2020, sec. 3.1.4): each span of the text becomes a sentinel in the source, and the
    stream is a sentinel and its span, one after the other, then `end`. The text begins with a token that stays and ends
    with a span, and within that every way to cut it is as likely as any other, as in T5's code."""
    taken, spans = _spans(len(document), objective)
    stay, gone = _parts(rng, len(document) - taken, spans), _parts(rng, taken, spans)
    at, source, stream = 0, [], []
    for sentinel, kept, lost in zip(sentinels, stay, gone, strict=False):
        source += [*document.tokens[at : at + kept], sentinel]
        stream += [sentinel, *document.tokens[at + kept : at + kept + lost]]
        at += kept + lost
    ones = np.ones(len(stream) + 1, bool)
    made = shifted(np.array([*stream, end], np.int32), ones, ones)
    return dataclasses.replace(made, source=tuple(map(int, source)))


def _spans(n: int, objective: config.Objective) -> tuple[int, int]:
    """-> (tokens that are taken from a text of n, in how many spans), both at least 1."""
    if n < 2:
        raise config.InputError(f"data.objective='span' in windows of {n} tokens: raise data.window or model.context")
    taken = min(max(round(n * objective.masked), 1), n - 1)
    return taken, min(max(round(taken / objective.span), 1), n - taken)


def _parts(rng, n: int, parts: int) -> np.ndarray:
    """-> n as a sum of so many numbers, each at least 1; every such sum is as likely as any other."""
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, n])
