"""Pure functions of attention: the mask law, rotary positions, attention itself, and the cache as a value.

The alphabet is layers.py's. Attention: softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, eq. 1).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config

CHUNK = 64  # queries at a time: on a CPU the T x T scores of a chunk stay in the processor's cache
MASKED = -1e30


@flax.struct.dataclass
class Cache:
    """What decoding remembers: per layer k (after rope) and v, and what the mask law needs of every slot.

    All rows share one cursor; a row's unused slots have document 0, which no query sees, so prompts of different
    lengths need no shifting. `next_position` is one more than the largest position so far.
    """

    k: tuple[jax.Array, ...]  # depth x [B,S,K,H]
    v: tuple[jax.Array, ...]
    document: jax.Array  # [B,S] int32
    step: jax.Array  # [B,S] int32
    cursor: jax.Array  # [] int32: slots used
    next_position: jax.Array  # [B,1] int32
    last_step: jax.Array  # [B] int32


def empty_cache(model: config.Backbone, rows: int, slots: int) -> Cache:
    kv = tuple(jnp.zeros((rows, slots, model.kv_heads, model.head_dim)) for _ in range(model.depth))
    zeros = jnp.zeros((rows, slots), jnp.int32)
    return Cache(kv, kv, zeros, zeros, jnp.int32(0), jnp.zeros((rows, 1), jnp.int32), jnp.zeros(rows, jnp.int32))


def extend(cache: Cache, batch: batch_lib.Batch) -> tuple[jax.Array, Cache]:
    """Enters a batch's positions: -> (its steps [B,T], the cache with document, step and cursor moved on).

    k and v of these positions are written by the layers, at the cursor as it was.
    """
    step = cache.last_step[:, None] + jnp.cumsum(batch.ar, axis=1)
    real = batch.document > 0
    last = jnp.max(jnp.where(real, step, cache.last_step[:, None]), axis=1)
    seen = jnp.max(jnp.where(real[..., None], batch.position + 1, cache.next_position[:, None]), axis=1)
    at = (0, cache.cursor)
    return step, cache.replace(
        document=jax.lax.dynamic_update_slice(cache.document, batch.document, at),
        step=jax.lax.dynamic_update_slice(cache.step, step, at),
        cursor=cache.cursor + batch.tokens.shape[1],
        next_position=seen,
        last_step=last,
    )


@flax.struct.dataclass
class Sight:
    """Everything that attention needs to know besides q, k, v: who the queries are, who the keys are."""

    q_document: jax.Array  # [B,T]
    q_step: jax.Array  # [B,T]
    k_document: jax.Array  # [B,S]
    k_step: jax.Array  # [B,S]
    reach: int = flax.struct.field(pytree_node=False, default=0)
    cursor: Any = None  # with a cache: where this batch's k and v go


def visible(sight: Sight) -> jax.Array:
    """The mask law -> [B,T,S] bool."""
    same = sight.q_document[:, :, None] == sight.k_document[:, None, :]
    past = sight.k_step[:, None, :] <= sight.q_step[:, :, None]
    return same & past & (sight.q_document > 0)[:, :, None]


def rope(x_BTNH, position_BT, theta: float):
    """Rotary position embedding (Su et al. 2021), halves convention: dimension i turns with dimension i + H/2."""
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def weights(q_BTKGH, k_BSKH, mask_BTS, scale: float | None = None):
    """-> attention weights [B,K,G,T,S] in float32; a row without a visible key is exactly 0."""
    scale = q_BTKGH.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH * scale, k_BSKH, preferred_element_type=jnp.float32)
    scores += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    # An additive mask keeps the softmax one fused loop. It is uniform over a row that sees nothing: zero it.
    return jax.nn.softmax(scores, axis=-1) * mask_BTS.any(-1)[:, None, None, :, None]


def _attend(q_BTKGH, k_BSKH, v_BSKH, mask_BTS):
    """weights(...) @ v -> [B,T,K,G,H]. The sum of exponentials divides the result, H wide, not the weights, S wide.

    That saves passes over the scores, forward and backward.
    """
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH * q_BTKGH.shape[-1] ** -0.5, k_BSKH, preferred_element_type=jnp.float32
    )
    scores += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    # The largest score cancels: it needs no gradient.
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total_BTKG = powers.sum(-1).transpose(0, 3, 1, 2)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", powers.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    out *= (mask_BTS.any(-1)[:, :, None, None] / total_BTKG)[..., None]
    return out.astype(v_BSKH.dtype)


def attend(q_BTNH, k_BSKH, v_BSKH, sight: Sight):
    """-> [B,T,N,H]. N / K query heads share a kv-head.

    Without a cache the queries go in chunks that meet only the keys up to their end plus `sight.reach`, so that the
    causal half is never computed and no T x S array is made.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    chunk = CHUNK if sight.cursor is None else T
    out = []
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        keys = slice(0, min(rows.stop + sight.reach, S) if sight.cursor is None else S)
        part = Sight(sight.q_document[:, rows], sight.q_step[:, rows], sight.k_document[:, keys], sight.k_step[:, keys])
        out.append(_attend(q_BTKGH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], visible(part)))
    return (jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]).reshape(B, T, N, H)
