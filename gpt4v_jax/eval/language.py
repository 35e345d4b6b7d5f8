"""Text: the loss over a whole split."""

from gpt4v_jax.eval import common


def windows(subject: common.Subject) -> common.Result:
    """Mean nats a token over all non-overlapping windows of the context's length; none is sampled."""
    nats, tokens, _ = common.score(subject, subject.source)
    return common.Result({"loss": nats.sum() / tokens.sum(), "tokens": tokens.sum()})
