"""The rows that requests decode in, as one value on the device, and the two programs of a step: `choose`, `advance`."""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax.generate import decode, sample
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V

# Laws that come together or not at all, so that any mixture of requests finds its program compiled. A law that a row
# has not set changes none of its bits.
DRAWS = ("temperature", "top_k", "top_p")
OTHERS = tuple(name for name in sample.NUMBERS if name not in (*DRAWS, "guidance_scale"))


@flax.struct.dataclass
class Slots:
    """B rows; one that nobody has goes on with nonsense, which nobody reads: idle rows cost nothing to tell apart."""

    logits: jax.Array  # [B,V] float32: of the next token
    cache: attention.Cache  # its cursor is [B]: every row begins at its slot 0
    past: sample.History
    keys: jax.Array  # [B]


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "longest"))
def empty(model: GPT4V, rows: int, slots: int, longest: int) -> Slots:
    """longest: the most tokens that a row can have, prompt and answer. Under jit each array has its own buffer."""
    c = model.config
    cache = attention.empty_cache(c.decoder, rows, slots, c.axes)
    logits, none = jnp.zeros((rows, c.vocab)), jnp.zeros(rows, jnp.int32)
    past = sample.History(jnp.zeros((rows, longest), jnp.int32), none, none)
    return Slots(logits, cache.replace(cursor=none), past, jax.vmap(jax.random.key)(none))


def resized(state: Slots, slots: int, memory: int) -> Slots:
    """-> the same with so many slots in the cache, and in its memory. What is cut off must not be in use."""
    if (slots, memory) == (state.cache.document.shape[1], state.cache.memory_parts[0].shape[1]):
        return state
    return _resized(state, slots, memory)


@functools.partial(jax.jit, static_argnames=("slots", "memory"))
def _resized(state: Slots, slots: int, memory: int) -> Slots:

    def fit(x, n):
        at = attention.slots(x)
        x = jax.lax.slice_in_dim(x, 0, min(n, x.shape[at]), axis=at)
        return jnp.pad(x, [(0, n - size if axis == at else 0) for axis, size in enumerate(x.shape)])

    cache = state.cache
    stream = {name: jax.tree.map(lambda x: fit(x, slots), getattr(cache, name))
              for name in ("k", "v", "document", "step", "index")}  # fmt: skip
    beside = {name: jax.tree.map(lambda x: fit(x, memory), getattr(cache, name)) for name in ("memory", "memory_parts")}
    return state.replace(cache=cache.replace(**stream, **beside))


@functools.partial(jax.jit, donate_argnames="state")
def admit(state: Slots, row, logits, cache: attention.Cache, tokens, length, key) -> Slots:
    """Gives a row to a request: logits [1,V] and a cache of one row, as prefix.filled makes them; tokens [L], the
    prompt's, `length` of them. What is in the cache beyond the row's slots is left out."""

    def put(whole, one):
        at = attention.slots(whole)
        one = jax.lax.slice_in_dim(one, 0, min(one.shape[at], whole.shape[at]), axis=at).astype(whole.dtype)
        fresh = jnp.zeros((1, *whole.shape[1:]), whole.dtype)
        fresh = jax.lax.dynamic_update_slice(fresh, one, (0,) * whole.ndim)
        return jax.lax.dynamic_update_slice_in_dim(whole, fresh, row, axis=0)

    def rows(whole, one):
        return whole.at[row].set(one)

    one = cache.replace(cursor=jnp.atleast_1d(cache.cursor))
    given = {name: jax.tree.map(put, getattr(state.cache, name), getattr(one, name))
             for name in ("k", "v", "document", "step", "index", "memory", "memory_parts")}  # fmt: skip
    single = {name: rows(getattr(state.cache, name), getattr(one, name)[0])
              for name in ("cursor", "next_position", "last_step", "last_index")}  # fmt: skip
    past = state.past
    past = sample.History(rows(past.tokens, tokens), rows(past.length, length), rows(past.prompt, length))
    return Slots(rows(state.logits, logits[0]), state.cache.replace(**given, **single), past,
                 rows(state.keys, key))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("end", "logprobs"))
def choose(state: Slots, rules: sample.Rules, allowed, end: tuple[int, ...], logprobs: int | None) -> decode.Told:
    """-> what is drawn for each row. allowed: [B,V] bool, or None: all."""
    return decode.drawn(state.logits, state.past, state.keys, rules, end, allowed=allowed, logprobs=logprobs)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(model: GPT4V, params, state: Slots, token_B) -> Slots:
    """Appends a token to each row; -1, which nothing goes on after, counts as 0."""
    token = jnp.maximum(token_B, 0)
    logits, cache = decode.step(model, params, token, state.cache)
    return state.replace(logits=logits, cache=cache, past=state.past.append(token))


def rules_of(samplings: Sequence[sample.Sampling], vocab: int) -> sample.Rules:
    """`sample.rules` of the rows, with all laws of a program where one is asked for."""
    found = sample.rules(samplings, vocab)
    for group in (DRAWS, OTHERS):
        if any(name in found for name in group):
            for name in group:
                whole = name in sample.WHOLE
                off = np.full(len(samplings), sample.OFF[name], np.int32 if whole else np.float32)
                found.setdefault(name, jnp.asarray(off))
    return found
