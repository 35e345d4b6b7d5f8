"""Text: the loss over a whole split."""

from gpt4v_jax.eval import common


def windows(subject: common.Subject) -> common.Result:
    """Mean nats a token over all non-overlapping windows of the context's length; none is sampled.

    Also nats a character, which tokenizers can be compared by; and all nats over those characters alone that are no
    white space, where line ends are the data set's, not the author's.
    """
    nats, tokens, _ = common.score(subject, subject.source)
    text = subject.tokenizer.decode(subject.source.trained_ids())
    letters = sum(not character.isspace() for character in text)
    total = nats.sum()
    each = {"loss_a_character": total / max(len(text), 1), "loss_a_letter": total / max(letters, 1)}
    return common.Result({"loss": total / tokens.sum(), **each, "tokens": tokens.sum(), "characters": len(text)})
