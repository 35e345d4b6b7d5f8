"""Text: the loss over a whole split."""

from gpt4v_jax.eval import common


def windows(subject: common.Subject) -> common.Result:
    """Mean nats a token over all non-overlapping windows of the context's length, and nats a character of the text;
    none is sampled."""
    nats, tokens, _ = common.score(subject, subject.source)
    characters = len(subject.tokenizer.decode(subject.source.trained_ids())) or 1
    loss, each = nats.sum() / tokens.sum(), nats.sum() / characters
    return common.Result({"loss": loss, "loss_a_character": each, "tokens": tokens.sum(), "characters": characters})
