"""Attention maps, computed again from the q and k that the model returns under `capture`."""

import dataclasses
import functools

import jax
import numpy as np

from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode
from gpt4v_jax.model import attention
from gpt4v_jax.training.workdir import Trained


@functools.partial(jax.jit, static_argnames="model")
def _captured(model, params, batch):
    return model.apply({"params": params}, batch, capture=True)[2]


def over_picture(trained: Trained, document: chat.Document, read, query: int) -> np.ndarray:
    """-> [depth, rows, columns]: how much position `query` of a document looks at each patch of its first picture.

    Mean over heads of the layer's attention weights; a layer's map sums to the share that the picture gets.
    """
    layout = dataclasses.replace(trained.layout, **decode.budgets([document], trained.layout))
    batch = packing.stack([packing.fill([document], read, layout)])
    model = trained.model.clone(layout=layout)
    out = _captured(model, trained.params, batch)
    step = np.cumsum(batch.ar, axis=1)
    one = slice(query, query + 1)
    index = np.cumsum(batch.document > 0, axis=1)
    sight = attention.Sight(
        batch.document[:, one], step[:, one], batch.document, step, index[:, one], index
    )
    first, picture = next((at, medium) for at, medium in document.media if medium.modality == "image")
    _, rows, columns = layout.views("image", picture.shape)[0].grid  # the thumbnail, where there are tiles
    c = trained.run.model.backbone
    maps = []
    for i, kind in enumerate(c.kinds):
        mask = attention.visible(sight, c.window if kind == "local" else 0)
        q, k = out[f"block_{i}/query"][:, one], out[f"block_{i}/key"]
        q = q.reshape(1, 1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        w = np.asarray(attention.weights(q, k, mask, c.attention_scale or None, c.attention_cap))[0].mean((0, 1))[0]
        maps.append(w[first : first + rows * columns].reshape(rows, columns))
    return np.stack(maps)
