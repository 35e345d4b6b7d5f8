"""Attention maps, computed again from the q and k that the model returns under `capture`."""

import dataclasses
import functools
import math

import jax
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode
from gpt4v_jax.model import attention
from gpt4v_jax.training.workdir import Trained

RELATIVE = "this model's relative positions are a part of its attention that is not captured"


@functools.partial(jax.jit, static_argnames="model")
def _captured(model, params, batch):
    return model.apply({"params": params}, batch, capture=True)[2]


def over_picture(trained: Trained, document: chat.Document, read, query: int, number: int = 0) -> np.ndarray:
    """-> [layers, rows, columns]: how much position `query` of a document looks at each patch of a picture of it, the
    first, or the one of this `number`. Raises InputError where it has no such picture.

    Mean over heads of the layer's attention weights; a layer's map sums to the share that the picture gets. Layers are
    those where a picture's patches can be seen: all, or, where they are a memory or a source, those that read it. None
    where vectors have no place in the picture: those of a resampler.
    """
    layout = dataclasses.replace(trained.layout, **decode.budgets([document], trained.layout))
    pictures = [(at, medium) for at, medium in document.media if medium.modality == "image"]
    if not 0 <= number < len(pictures):
        raise config.InputError(f"picture {number} of {len(pictures)}: they are counted from 0")
    first, picture = pictures[number]
    _, rows, columns = layout.merged("image", layout.views("image", picture.shape)[0])  # the thumbnail, if tiled
    c = trained.run.model.decoder
    if layout.tokens:
        return np.zeros((0, rows, columns))
    if c.buckets and layout.place == "stream":
        raise config.InputError(RELATIVE)
    batch = packing.stack([packing.fill([document], read, layout)])
    out = _captured(trained.model.clone(layout=layout), trained.params, batch)
    step, index = np.cumsum(batch.ar, axis=1), np.cumsum(batch.document > 0, axis=1)
    sight = attention.Sight(batch.document, step, batch.document, step, index, index)
    within = "" if layout.place == "stream" else "cross/"
    if within:
        sight = out["memory"]
        if layout.place == "memory":  # where pictures come first, one after the other
            before = (view for _, medium in pictures[:number] for view in layout.views("image", medium.shape))
            first = sum(math.prod(layout.merged("image", view)) for view in before)
    sight = sight.part(slice(query, query + 1), slice(None))
    maps = []
    for i, kind in enumerate(c.kinds):
        if f"block_{i}/{within}query" not in out:
            continue
        mask = attention.visible(sight, c.window if not within and "local" in kind else 0)
        q, k = out[f"block_{i}/{within}query"][:, query : query + 1], out[f"block_{i}/{within}key"]
        q = q.reshape(1, 1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        w = np.asarray(attention.weights(q, k, mask, c.attention_scale or None, c.attention_cap))[0].mean((0, 1))[0]
        maps.append(w[first : first + rows * columns].reshape(rows, columns))
    return np.stack(maps)
