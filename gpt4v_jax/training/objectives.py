"""Objectives: (scores, batch) -> {name: (sum, weight)}. A term is sum / weight, divided once, over all devices.

So a loss depends neither on padding nor on how rows lie on devices or in micro-batches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model.gpt4v import Head


class Scores(NamedTuple):
    """Of each position, [B,T]."""

    nats: jax.Array  # float32: -log softmax(logits)[target]
    hit: jax.Array  # bool: is the target the argmax
    log_sum: jax.Array  # float32: logsumexp(logits)
    embedded: tuple[jax.Array, jax.Array] | None = None  # of Batch.pair: media and texts [B,P,E]


def tokens(scores: Scores, batch: batch_lib.Batch, z_loss: bool = False) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy -log p(target) in nats and top-1 accuracy, summed over `batch.weight`; z_loss: also the square of
    the log of the softmax's sum, which a coefficient keeps near 1.

    The shift is in `target` already: the sum over a document is minus the log of its autoregressive factorisation, or
    of its masked tokens.
    """
    weight = batch.weight.sum()

    def summed(values):
        return (values * batch.weight).sum(), weight

    out = {"loss": summed(scores.nats), "accuracy": summed(scores.hit.astype(jnp.float32))}
    return out | ({"z_loss": summed(jnp.square(scores.log_sum))} if z_loss else {})


def total(values: dict[str, jax.Array], objective: config.Objective) -> dict[str, jax.Array]:
    """{term: its value} -> the same, "loss" being what is minimised: "token_loss" + coefficient x term + ..."""
    terms = {name: getattr(objective, name) for name in ("z_loss", "contrastive") if name in values}
    if not terms:
        return values
    return values | {
        "token_loss": values["loss"],
        "loss": values["loss"] + sum(factor * values[name] for name, factor in terms.items()),
    }


def of_logits(logits_BTV, target_BT) -> Scores:
    right = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    log_sum = jax.nn.logsumexp(logits_BTV, axis=-1)
    return Scores(log_sum - right, jnp.argmax(logits_BTV, axis=-1) == target_BT, log_sum)


def scores(x_BTD, head: Head, target_BT, chunks: int = 1) -> Scores:
    """`of_logits` of head(x_BTD).

    The vocabulary is seen in `chunks` pieces, whose logits the backward pass computes again: neither [B,T,V] nor a copy
    of the head's matrix is ever held. (A matrix whose V lies on several devices is gathered a piece at a time.)
    """
    if chunks == 1:
        return of_logits(head(x_BTD), target_BT)
    return _pieces(x_BTD, head, target_BT, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pieces(x, head, target, chunks):
    return _forward(x, head, target, chunks)[0]


def _piece(head: Head, chunks: int, i):
    """-> (first column, the head of this piece, which of its columns are its own [C]); the last one may overlap."""
    V = head.vocab
    C = -(-V // chunks)
    first = jnp.minimum(i * C, V - C)
    return first, head.columns(first, C), first + jnp.arange(C) >= i * C


def _forward(x, head, target, chunks):
    def step(seen, i):
        """The largest logit so far, the sum of exponentials relative to it, the target's logit, the argmax."""
        top, total, right, best = seen
        first, part, own = _piece(head, chunks, i)
        logits = jnp.where(own, part(x), -jnp.inf)
        here = logits.max(-1)
        higher = jnp.maximum(top, here)
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
        at = target - first
        inside = (at >= 0) & (at < own.size)
        picked = jnp.take_along_axis(logits, jnp.clip(at, 0, own.size - 1)[..., None], axis=-1)[..., 0]
        right = jnp.maximum(right, jnp.where(inside, picked, -jnp.inf))
        return (higher, total, right, jnp.where(here > top, first + jnp.argmax(logits, axis=-1), best)), None

    zeros = jnp.zeros(target.shape)
    lowest = zeros - jnp.finfo(jnp.float32).max
    (top, total, right, best), _ = jax.lax.scan(step, (lowest, zeros, lowest, target * 0), jnp.arange(chunks))
    log_sum = jnp.log(total) + top
    return Scores(log_sum - right, best == target, log_sum), (x, head, target, log_sum)


def _backward(chunks, saved, gradient):
    x, head, target, log_sum = saved
    of_nats, of_log_sum = gradient.nats, gradient.log_sum  # a hit has none

    def step(total, i):
        dx, dhead = total
        first, part, own = _piece(head, chunks, i)
        logits, pull = jax.vjp(lambda x, part: part(x), x, part)
        # d log_sum / d logits = softmax, d nats / d logits = softmax - one hot
        p = jnp.where(own, jnp.exp(logits - log_sum[..., None]), 0)
        one_hot = (first + jnp.arange(own.size) == target[..., None]) & own
        dx_part, dpart = pull((p - one_hot) * of_nats[..., None] + p * of_log_sum[..., None])
        return (dx + dx_part.astype(jnp.float32), dhead.add_columns(first, dpart)), None

    start = jnp.zeros(x.shape, jnp.float32), jax.tree.map(jnp.zeros_like, head)
    (dx, dhead), _ = jax.lax.scan(step, start, jnp.arange(chunks))
    return dx.astype(x.dtype), dhead, None


_pieces.defvjp(_forward, _backward)
