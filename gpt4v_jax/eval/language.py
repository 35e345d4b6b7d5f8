"""The loss over a whole split."""

import copy

import numpy as np

from gpt4v_jax.data import sources
from gpt4v_jax.eval import common


def answers(subject: common.Subject) -> common.Result:
    """Nats a token of all answers and captions, in documents as they are trained."""
    nats, tokens, _ = common.score(subject, subject.source)
    return common.Result({"loss": nats.sum() / max(tokens.sum(), 1), "tokens": tokens.sum()})


def denoised(subject: common.Subject, kind: str) -> common.Result:
    """Loss and accuracy on what the objective `kind` takes from each document; what it takes is the same each time."""
    source, run = copy.copy(subject.source), subject.run
    source.task = sources.task_of(kind, run.objective, run.data, subject.tokenizer, subject.layout, seed=None)
    number, nats, hit = (list(column) for column in zip(*common.positions(subject, source), strict=True))
    records, right = np.repeat(number, [len(x) for x in hit]), np.concatenate(hit)
    metrics = {"loss": np.concatenate(nats).mean(), "accuracy": right.mean(), "tokens": len(right)}
    counts = {kind: (int(right.sum()), len(right))}
    return common.Result(metrics | common.by_record(right, records), counts)


def windows(subject: common.Subject) -> common.Result:
    """Mean nats a token over all non-overlapping windows of the context's length; none is sampled.

    Also nats a character of the text as it was, which tokenizers that lose nothing can be compared by; and all nats
    over those characters alone that are no white space, where line ends are the data set's, not the author's.
    Intervals are of windows drawn with replacement.
    """
    nats, tokens, _ = common.score(subject, subject.source)
    text = subject.source.trained_text()
    letters = sum(not character.isspace() for character in text)
    low, high = common.bootstrap(lambda at: nats[at].sum(), len(nats))
    metrics = {"tokens": tokens.sum(), "characters": len(text)}
    for name, count in (("loss", tokens.sum()), ("loss_a_character", len(text)), ("loss_a_letter", letters)):
        each = (nats.sum(), low, high) / np.maximum(count, 1)
        metrics |= dict(zip((name, f"{name}/low", f"{name}/high"), each, strict=True))
    return common.Result(metrics)
