"""Logits -> the next token: temperature, top-k, top-p, in this order."""

import dataclasses

import jax
import jax.numpy as jnp

from gpt4v_jax import config


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0: greedy, the most probable token
    top_k: int = 0  # keep only the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens until their mass reaches p (Holtzman et al. 2020)

    def __post_init__(self):
        if not self.temperature >= 0:  # also NaN
            raise config.InputError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise config.InputError(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise config.InputError(f"top_p={self.top_p} must be above 0 and at most 1")


def restrict(logits_BV, sampling: Sampling):
    """-> the logits that are drawn from: divided by the temperature, -inf where a token may not be drawn."""
    logits = logits_BV / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass = jax.nn.softmax(ordered, axis=-1)
        # A token stays when the mass before it is below p, so the first one always does.
        kept = jnp.cumsum(mass, axis=-1) - mass < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits_BV, keys_B, sampling: Sampling):
    """-> token ids [B] int32; every row has its own key, so that a row's draw does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, sampling)).astype(jnp.int32)
