"""The rows that requests decode in, their pages of one cache, and the programs of steps.

A row has as many pages as its text is long (Kwon et al. 2023, PagedAttention). How many rows and pages a step has
follows what is in use: a step takes as long as they are many.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax.generate import decode, sample
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V

PAGE = attention.BLOCK  # slots

# Laws that come together or not at all, so that any mixture of requests finds its program compiled. A law that a row
# has not set changes none of its bits.
DRAWS = ("temperature", "top_k", "top_p")
OTHERS = tuple(name for name in sample.NUMBERS if name not in (*DRAWS, "guidance_scale"))


@flax.struct.dataclass
class State:
    """R rows, P pages; a row that nobody has goes on with nonsense, which nobody reads."""

    hidden: jax.Array  # [R,D] float32: what the next token's logits are made of, for all rows in one product
    cache: attention.Cache  # P pages; its cursor is [R]
    past: sample.History
    keys: jax.Array  # [R]


@functools.partial(jax.jit, static_argnames=("model", "rows", "pages", "longest"))
def empty(model: GPT4V, rows: int, pages: int, longest: int) -> State:
    """longest: the most tokens that a row can have, prompt and answer. Under jit each array has its own buffer."""
    c = model.config
    pool = attention.empty_cache(c.decoder, pages, PAGE, c.axes)
    none = jnp.zeros(rows, jnp.int32)
    cache = attention.empty_cache(c.decoder, rows, 0, c.axes).replace(cursor=none, **in_pages(pool))
    past = sample.History(jnp.zeros((rows, longest), jnp.int32), none, none)
    return State(jnp.zeros((rows, c.backbone.width)), cache, past, jax.vmap(jax.random.key)(none))


def in_pages(cache: attention.Cache) -> dict[str, Any]:
    """-> what lies in pages."""
    return {name: getattr(cache, name) for name in attention.IN_SLOTS}


def _apart(state: State) -> tuple[dict[str, Any], State]:
    """-> (what lies in pages, what lies in rows): programs of one do not depend on how many there are of the other."""
    none = dict.fromkeys(attention.IN_SLOTS)
    return in_pages(state.cache), state.replace(cache=state.cache.replace(**none))


def _joined(pool: dict[str, Any], rows: State) -> State:
    return rows.replace(cache=rows.cache.replace(**pool))


def moved(state: State, rows, pages, memory: int) -> State:
    """-> a state of these rows and pages of this one, int32 (pages: attention.NOBODY where nobody has one), and of so
    many slots of memory. What is cut off must not be in use."""
    pool, of_rows = _apart(state)
    return _joined(_repaged(pool, pages), _reseated(of_rows, rows, memory))


@jax.jit
def _repaged(pool, which):
    new = jax.tree.map(lambda x: jnp.zeros((len(which), *x.shape[1:]), x.dtype), pool)

    def move(i, new):  # a gather would compute the place of each value
        def put(x, old):
            page = jax.lax.dynamic_index_in_dim(old, which[i])
            return jax.lax.dynamic_update_slice_in_dim(x, page, i, axis=0)

        return jax.tree.map(put, new, pool)

    return jax.lax.fori_loop(0, jnp.sum(which != attention.NOBODY), move, new)


@functools.partial(jax.jit, static_argnames="memory")
def _reseated(rows: State, which, memory: int) -> State:

    def fit(x):
        at = attention.slots(x)
        x = jax.lax.slice_in_dim(x, 0, min(memory, x.shape[at]), axis=at)
        return jnp.pad(x, [(0, memory - size if axis == at else 0) for axis, size in enumerate(x.shape)])

    cache = rows.cache
    fitted = {name: jax.tree.map(fit, getattr(cache, name)) for name in ("memory", "memory_parts")}
    return jax.tree.map(lambda x: x[which], rows.replace(cache=cache.replace(**fitted)))


def admit(state: State, row, pages, hidden, cache: attention.Cache, tokens, length, key) -> State:
    """Gives a row and pages [N] (attention.NOBODY: no more) to a request: hidden [1,D] and a cache of one row, as
    prefix.filled makes them; tokens [L], the prompt's, `length` of them."""
    pool, rows = _apart(state)
    beside = cache.replace(cursor=jnp.atleast_1d(cache.cursor), **dict.fromkeys(attention.IN_SLOTS))
    return _joined(_pasted(pool, in_pages(cache), pages), _seated(rows, row, hidden, beside, tokens, length, key))


@functools.partial(jax.jit, donate_argnames="pool")
def _pasted(pool, one, pages):
    """-> the pool with the beginning of a cache of one row in these pages."""

    def paste(i, pool):
        def put(x, new):
            at = attention.slots(x)
            page = jax.lax.dynamic_slice_in_dim(new, i * x.shape[at], x.shape[at], axis=at)
            return jax.lax.dynamic_update_slice_in_dim(x, page.astype(x.dtype), pages[i], axis=0)

        return jax.tree.map(put, pool, one)

    return jax.lax.fori_loop(0, jnp.sum(pages != attention.NOBODY), paste, pool)


def cleared(state: State, pages) -> State:
    """-> the same with zeros in these pages [N]: who gets one gets nothing of who had it before, not even its NaN."""
    pool, rows = _apart(state)
    return _joined(_cleared(pool, pages), rows)


@functools.partial(jax.jit, donate_argnames="pool")
def _cleared(pool, pages):

    def clear(i, pool):
        return jax.tree.map(lambda x: x.at[pages[i]].set(0), pool)

    return jax.lax.fori_loop(0, jnp.sum(pages != attention.NOBODY), clear, pool)


@functools.partial(jax.jit, donate_argnames="rows")
def _seated(rows: State, row, hidden, cache: attention.Cache, tokens, length, key) -> State:

    def put(whole, one):
        fresh = jnp.zeros((1, *whole.shape[1:]), whole.dtype)
        fresh = jax.lax.dynamic_update_slice(fresh, one.astype(whole.dtype), (0,) * whole.ndim)
        return jax.lax.dynamic_update_slice_in_dim(whole, fresh, row, axis=0)

    def seat(whole, one):
        return whole.at[row].set(one)

    given = {name: jax.tree.map(put, getattr(rows.cache, name), getattr(cache, name))
             for name in ("memory", "memory_parts")}  # fmt: skip
    single = {name: seat(getattr(rows.cache, name), getattr(cache, name)[0])
              for name in ("cursor", "next_position", "last_step", "last_index")}  # fmt: skip
    past = rows.past
    past = sample.History(seat(past.tokens, tokens), seat(past.length, length), seat(past.prompt, length))
    return State(seat(rows.hidden, hidden[0]), rows.cache.replace(**given, **single), past, seat(rows.keys, key))


@functools.partial(jax.jit, static_argnames=("model", "end", "logprobs"))
def _chosen(model: GPT4V, params, hidden, past, keys, rules, allowed, end: tuple[int, ...], logprobs: int | None):
    logits = model.apply({"params": params}, hidden, method="logits")
    return decode.drawn(logits, past, keys, rules, end, allowed=allowed, logprobs=logprobs)


def choose(model: GPT4V, params, state: State, rules: sample.Rules, allowed, end: tuple[int, ...],
           logprobs: int | None) -> decode.Told:  # fmt: skip
    """-> what is drawn for each row. allowed: [R,V] bool, or None: all."""
    params = {name: tree for name, tree in params.items() if name != "backbone"}  # to look at all takes half a ms
    return _chosen(model, params, state.hidden, state.past, state.keys, rules, allowed, end, logprobs)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def advance(model: GPT4V, params, state: State, token_R, table_RN) -> State:
    """Appends a token to each row; -1, which nothing goes on after, counts as 0. table_RN: attention.Pages.table."""
    token, pages = jnp.maximum(token_R, 0), state.cache.document.shape[0]
    rows = jnp.broadcast_to(jnp.arange(len(token))[:, None], table_RN.shape)
    owner = jnp.zeros(pages, jnp.int32).at[table_RN].set(rows, mode="drop")
    cache = state.cache.replace(pages=attention.Pages(table_RN, owner))
    hidden, cache = decode.appended(model, params, token[:, None], cache)
    hidden = hidden[:, 0].astype(state.hidden.dtype)
    return state.replace(hidden=hidden, cache=cache.replace(pages=None), past=state.past.append(token))


@functools.partial(jax.jit, static_argnames=("model", "end", "most"), donate_argnames="state")
def burst(model: GPT4V, params, state: State, rules: sample.Rules, end: tuple[int, ...], table_RN, limit, most: int):
    """`choose` and `advance` up to `limit` <= `most` times, until a row has drawn its last token.

    -> (tokens [R,most] int32, how many of each row were drawn, the state).
    """

    def go_on(carry):
        n, _, _, over = carry
        return (n < limit) & ~over

    def one(carry):
        n, tokens, state, _ = carry
        token = choose(model, params, state, rules, None, end, None).tokens
        over = (jnp.isin(token, jnp.array(end, jnp.int32)) | (token < 0)).any()
        return n + 1, tokens.at[:, n].set(token), advance(model, params, state, token, table_RN), over

    tokens = jnp.zeros((len(state.keys), most), jnp.int32)
    n, tokens, state, _ = jax.lax.while_loop(go_on, one, (jnp.int32(0), tokens, state, jnp.bool(False)))
    return tokens, n, state


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
