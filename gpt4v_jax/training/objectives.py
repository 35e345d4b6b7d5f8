"""Objectives: (logits, batch) -> {name: (sum, weight)}. The total is sum / weight, divided once, over all devices.

So a loss depends neither on padding nor on how rows lie on devices.
"""

import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib


def next_token(logits_BTV, batch: batch_lib.Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy -log p(target) in nats and top-1 accuracy, summed over `batch.weight`.

    The shift is in `target` already: the sum over a document is minus the log of its autoregressive factorisation.
    """
    nats_BT = token_nats(logits_BTV, batch.target)
    hit_BT = (jnp.argmax(logits_BTV, axis=-1) == batch.target).astype(jnp.float32)
    weight = batch.weight.sum()
    return {"loss": ((nats_BT * batch.weight).sum(), weight), "accuracy": ((hit_BT * batch.weight).sum(), weight)}


def token_nats(logits_BTV, target_BT) -> jax.Array:
    """-log softmax(logits)[target], [B,T] float32."""
    right = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - right
