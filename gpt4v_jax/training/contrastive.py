"""The loss on pairs of a medium and its text: each beside the texts, and the media, of the whole batch.

One embedding each, unit vectors; logits are t x their products + b, with t = exp(scale), and scale and b learned.
"""

import math

import jax
import jax.numpy as jnp

from gpt4v_jax.sharding import shard

# Where (scale, b) start: the model's parameters are what training adds, so that its tree knows nothing of the loss.
START = {"softmax": (math.log(1 / 0.07), 0.0), "sigmoid": (math.log(10.0), -10.0)}
LARGEST = math.log(100.0)  # of scale under softmax


def loss(embedded, id, learned, kind: str) -> jax.Array:
    """-> [] float32: the mean over the pairs; 0 without one.

    embedded: (media, texts), unit vectors [...,E]; id [...] int32: -1 where there is no pair. Texts of one id are
    equal: beside a medium only its own counts, the others are no negatives. learned: (scale, b), both [].
    """
    media_NE, text_NE = (x.reshape(-1, x.shape[-1]) for x in embedded)
    scale, b = (start + x for start, x in zip(START[kind], learned, strict=True))
    if kind == "softmax":  # where it is cut off it still has a gradient, which may lead it back
        scale -= jax.lax.stop_gradient(jnp.maximum(scale - LARGEST, 0))
    # All rows meet all rows: the texts of every device go to each of them.
    logits_NN = jnp.exp(scale) * shard(media_NE, "batch") @ shard(text_NE).T
    id = id.reshape(-1)
    real, own = id >= 0, jnp.eye(id.size, dtype=bool)
    negative = real[:, None] & real & (id[:, None] != id)
    each = sigmoid(logits_NN + b, own, negative) if kind == "sigmoid" else softmax(logits_NN, own, negative)
    return jnp.where(real, each, 0).sum() / jnp.maximum(real.sum(), 1)


def sigmoid(logits_NN, own_NN, negative_NN):
    """-> [N]: -log sigmoid of a pair's own logit and of minus its negatives' (Zhai et al. 2023, eq. 1)."""
    signed = jnp.where(own_NN, logits_NN, -logits_NN)
    return -jnp.where(own_NN | negative_NN, jax.nn.log_sigmoid(signed), 0).sum(1)


def softmax(logits_NN, own_NN, negative_NN):
    """-> [N]: cross-entropy of a medium among the texts and of a text among the media, in the mean (Radford et al.
    2021, fig. 3)."""
    logits_NN = jnp.where(own_NN | negative_NN, logits_NN, -jnp.inf)
    both = jax.nn.logsumexp(logits_NN, 1) + jax.nn.logsumexp(logits_NN, 0)
    return both / 2 - jnp.diagonal(logits_NN)
