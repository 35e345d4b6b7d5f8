"""Texts -> unit vectors: the mean of the last hidden states, or what training with pairs has made for it."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode, prompts
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained

ROWS = 8  # at a time; fewer are filled up to a power of two, so that few shapes are compiled


def document(trained: Trained, ids: Sequence[int]) -> chat.Document:
    """-> a text's tokens as the model reads what it is to embed: laid as a pair's text where it was trained with pairs
    (model.embed), else as they are. Raises InputError for what does not fit into the context."""
    layout = trained.layout
    if trained.run.model.embed:
        made = chat.document([chat.Piece("assistant", tuple(ids))], trained.tokenizer.special, layout)
    else:
        made = prompts.plain(ids)
    if not ids:
        raise config.InputError("there is no token to embed: give a text")
    if len(made) > layout.context:
        raise config.InputError(f"the text has {len(made)} positions, the model's context is {layout.context}: "
                                "shorten it")  # fmt: skip
    return dataclasses.replace(made, weight=np.zeros_like(made.weight),
                               ar=np.zeros_like(made.ar) if layout.prefix == "all" else made.ar)


def embed(trained: Trained, documents: Sequence[chat.Document]) -> np.ndarray:
    """-> [n,E] float32, of length 1; E is model.embed, or the model's width. documents: by `document`.

    Texts of like lengths share a batch; a vector depends on its neighbours only by rounding.
    """
    found: dict[int, np.ndarray] = {}
    for part in parts(documents):
        width = min(decode.rounded(len(documents[part[-1]]), decode.BUCKET), trained.layout.context)
        source = min(trained.layout.source, 1)  # an encoder reads something, be it padding
        layout = dataclasses.replace(trained.layout, context=width, source=source, items=(0, 0, 0), patches=(0, 0, 0),
                                     pairs=0)  # fmt: skip
        rows = [packing.fill([documents[i]], None, layout) for i in part]
        rows += [packing.fill([], None, layout)] * (2 ** (len(part) - 1).bit_length() - len(part))
        with jax.set_mesh(trained.mesh):  # which each thread has to say for itself
            vectors = _vectors(trained.model.clone(layout=layout), trained.params, packing.stack(rows))
        found |= zip(part, np.asarray(vectors), strict=False)  # without the rows that fill up
    return np.stack([found[i] for i in range(len(documents))])


def parts(documents: Sequence[chat.Document]) -> list[list[int]]:
    """-> the places of those that share a batch, by their lengths."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    return [order[first : first + ROWS] for first in range(0, len(order), ROWS)]


@functools.partial(jax.jit, static_argnames="model")
def _vectors(model: GPT4V, params, batch: batch_lib.Batch):
    """-> [B,E] float32."""
    hidden, _, _ = model.apply({"params": params}, batch)
    real_BT = batch.document > 0
    if model.config.embed:
        last = jnp.maximum(real_BT.sum(axis=1, keepdims=True) - 1, 0)
        pair = batch_lib.Pair(last, last, last)
        return model.apply({"params": params}, hidden, pair, method="embeddings")[1][:, 0]
    mean = jnp.where(real_BT[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=1)  # the length is divided out
    return mean * jax.lax.rsqrt(jnp.square(mean).sum(axis=-1, keepdims=True) + 1e-12)
