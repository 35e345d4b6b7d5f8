"""What a model makes of a prompt's own tokens: the log-probability of each, beside the most probable ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained


def prompt(trained: Trained, document: chat.Document, read: prompts_lib.Read | None, most: int):
    """-> (the log-probability of each of the prompt's tokens, in nats; of each the `most` most probable tokens, as
    Answer.top). The first token has None and nothing: nothing is before it."""
    n = len(document)
    layout = dataclasses.replace(
        trained.layout, context=decode.rounded(n, decode.BUCKET), **decode.budgets([document], trained.layout)
    )
    batch = packing.stack([packing.fill([document], read, layout)])
    with jax.set_mesh(trained.mesh):  # which each thread has to say for itself
        nats, top, best = _scored(trained.model.clone(layout=layout), trained.params, batch, most)
    return (None, *nats[: n - 1].tolist()), ((), *decode.pairs(top[: n - 1], best[: n - 1]))


@functools.partial(jax.jit, static_argnames=("model", "most"))
def _scored(model: GPT4V, params, batch: batch_lib.Batch, most: int):
    """-> log-probabilities of each next token [T], the most probable ones [T,k], theirs [T,k]."""
    hidden = model.apply({"params": params}, batch)[0][0]

    def piece(args):
        hidden_nD, token_n = args
        nats = jax.nn.log_softmax(model.apply({"params": params}, hidden_nD, method="logits"), axis=-1)
        best, which = jax.lax.top_k(nats, min(most, nats.shape[1]))
        return jnp.take_along_axis(nats, token_n[:, None], axis=1)[:, 0], which, best

    # In pieces: the logits of all positions would be the largest array of the whole server.
    following = jnp.roll(batch.tokens[0], -1).reshape(-1, decode.BUCKET)
    pieces = (hidden.reshape(-1, decode.BUCKET, hidden.shape[1]), following)
    # Sizes and no -1: where no others are asked for (most=0), theirs are empty.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), jax.lax.map(piece, pieces))
