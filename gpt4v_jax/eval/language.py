"""Text: the loss over a whole split."""

from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.eval import common


def windows(subject: common.Subject) -> common.Result:
    """Mean nats a token over all non-overlapping windows of the context's length; none is sampled."""
    if not isinstance(subject.source, sources.Windows):
        raise config.InputError(f"the data set {subject.run.data.name} is no plain text: use the evaluator 'questions'")
    nats, tokens, _ = common.score(subject, subject.source)
    return common.Result({"loss": nats.sum() / tokens.sum(), "tokens": tokens.sum()})
