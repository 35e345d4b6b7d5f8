"""Speculative decoding (Leviathan et al. 2023; Chen et al. 2023): several tokens for one pass of the target model.

A round: a draft model, or a look into the text itself (prompt lookup, Saxena 2023), proposes k tokens; the target model
reads the last token and the k proposed ones in one pass of T = k + 1; a prefix of them is accepted, and one more token
is drawn from what the pass says behind it. What is written follows the target model's law, whatever the draft is.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import decode as plain
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.generate import sample
from gpt4v_jax.generate.draft import Law, Lookup, fold, kept, look_up, propose
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained


class Counts(NamedTuple):
    """Of each row [B] int32; the target model makes max(rounds) passes besides the prompt's."""

    drafted: jax.Array
    accepted: jax.Array
    rounds: jax.Array


@flax.struct.dataclass
class State:
    """What lies between two rounds. The caches hold all of a row's text but its last token."""

    text: jax.Array  # [B,L] int32: the prompt and the answer; anything behind `length`
    length: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    cache: attention.Cache
    draft_cache: attention.Cache | None  # None: prompt lookup
    counts: Counts


def slots(width: int, new: int, k: int) -> int:
    """-> the slots of a cache whose prompts take `width` and whose answers have at most `new` tokens each.

    The last token of an answer is never entered; the last round enters k + 1. Rejected tokens leave no holes (`kept`),
    so that this holds for any number of rows.
    """
    return width + max(new - 1, 0) + k + 1


def generate(
    trained: Trained,
    prompts: Sequence[chat.Document],
    read: prompts_lib.Read | None = None,
    max_new_tokens: int = plain.NEW_TOKENS,
    draft: Trained | Lookup = Lookup(),  # noqa: B008, frozen
    num_assistant_tokens: int = 5,
    sampling: sample.Sampling = plain.GREEDY,
    seeds: Sequence[int] = (),
    draft_prompts: Sequence[chat.Document] = (),
    draft_read: prompts_lib.Read | None = None,
) -> tuple[list[list[int]], Counts]:
    """-> (the tokens of each answer without the one that ends it, counts of each row).

    draft: another model of the same vocabulary, or prompt lookup; num_assistant_tokens: what a model proposes in a
    round. sampling: `Law`'s; seeds: one a prompt. draft_prompts, draft_read: the prompts as the draft
    model's layout lays them, where it lays media otherwise. Raises InputError.

    Greedy gives decode.generate's tokens, but where two logits tie within the rounding of a pass over T = k + 1
    positions in place of 1.
    """
    config.at_least(1, max_new_tokens=max_new_tokens, num_assistant_tokens=num_assistant_tokens)
    law = Law(sampling)
    keys = plain.keys_of(seeds, len(prompts))
    room = np.array(plain.rooms(trained, prompts, max_new_tokens))
    looks = isinstance(draft, Lookup)
    k = draft.prompt_lookup_num_tokens if looks else num_assistant_tokens
    new = plain.rounded(int(max(room)), plain.BLOCK)
    logits, cache, there = plain.begin(trained, prompts, read, slots(0, new, k))
    draft_cache = None
    if not looks:
        check(trained, draft, () if draft_prompts else prompts)
        # Its own prompt's cache; the logits are not needed: the target model draws the first token.
        _, draft_cache, _ = plain.begin(draft, draft_prompts or prompts, draft_read or read, slots(0, new, k))

    texts = [[*p.source, *p.tokens.tolist()] for p in prompts]  # a source may be copied from, too
    length = np.array([len(text) for text in texts], np.int32)
    text = np.zeros((len(prompts), plain.rounded(max(length), plain.BUCKET) + new + k + 1), np.int32)
    for row, ids in zip(text, texts, strict=True):
        row[: len(ids)] = ids
    end, limit = trained.tokenizer.ends, length + room
    state = begin(logits, cache, draft_cache, text, length, limit, ~there, keys, law, end)
    proposer = (draft, None) if looks else (draft.model, draft.params)
    state = decode(trained.model, trained.params, *proposer, state, limit, keys, new, k, law, end)
    found = [row[a:b].tolist() for row, a, b in zip(*map(np.asarray, (state.text, length, state.length)), strict=True)]
    return [ids[:-1] if ids and ids[-1] in end else ids for ids in found], state.counts


def check(trained: Trained, draft: Trained, prompts: Sequence[chat.Document] = ()) -> None:
    """Raises InputError where the draft model cannot propose for this one, or cannot read its prompts."""
    ours, other = trained.tokenizer, draft.tokenizer
    if trained.run.model.vocab != draft.run.model.vocab or ours != other and _words(ours) != _words(other):
        raise config.InputError("the draft model has another vocabulary: it must have the target model's tokenizer")
    names = ("image", "video", "audio", "place", "tokens", "merges")
    alike = all(getattr(trained.layout, name) == getattr(draft.layout, name) for name in names)
    if any(p.media for p in prompts) and not alike:
        raise config.InputError("the draft model lays media otherwise: give its own draft_prompts and draft_read")
    if any(p.source for p in prompts) and not draft.layout.source:
        raise config.InputError("the draft model has no encoder that reads the prompt: give its own draft_prompts")


def _words(tokenizer) -> list:
    return [tokenizer.token(id) for id in range(tokenizer.vocab)]


@functools.partial(jax.jit, static_argnames=("law", "end"), donate_argnames=("cache", "draft_cache"))
def begin(logits, cache, draft_cache, text, length, limit, done, keys, law: Law, end: tuple[int, ...]) -> State:
    """-> the State with the first token drawn. logits [B,V]: behind the prompts, which both caches hold; text [B,L]:
    the prompts, with room for k + 1 tokens behind `limit` [B], the longest that a row may become; keys [B]."""
    token = law.draw(fold(keys, length), law(logits))
    state = State(text, length, done, cache, draft_cache, Counts(*[jnp.zeros_like(length)] * 3))
    return _append(state, token[:, None], jnp.ones_like(length), limit, end)[0]


@functools.partial(jax.jit, static_argnames=("model", "draft", "k", "law", "end"), donate_argnames="state")
def decode(model: GPT4V, params, draft: GPT4V | Lookup, draft_params, state: State, limit, keys, rounds, k: int,
           law: Law, end: tuple[int, ...]) -> State:  # fmt: skip
    """At most `rounds` rounds more; fewer when all rows are done. The caches must have `slots`: jit cannot check.

    What is random in a round is drawn by fold_in(key, the row's length), so that it depends on the row alone.
    """

    def one(carry):
        n, state = carry
        round_keys = fold(keys, state.length)
        last = jnp.take_along_axis(state.text, state.length[:, None] - 1, axis=1)
        if isinstance(draft, Lookup):
            tokens, count = look_up(state.text, state.length, k, draft.max_matching_ngram_size)
            q = jax.nn.one_hot(tokens, model.config.vocab)
            draft_cache = None
        else:
            tokens, q, draft_cache = propose(draft, draft_params, last[:, 0], state.draft_cache, round_keys, k, law)
            count = jnp.full_like(state.length, k)
        logits, cache = plain.extend(model, params, jnp.concatenate([last, tokens], axis=1), state.cache)
        accepted, token = verify(law(logits), q, tokens, count, fold(round_keys, k), law)
        at = jnp.arange(k + 1)
        found = jnp.where(at < accepted[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), token[:, None])
        after, taken = _append(state, found, accepted + 1, limit, end)
        live = ~state.done
        added = Counts(live * count, jnp.minimum(accepted, taken), live)
        return n + 1, after.replace(
            cache=kept(state.cache, cache, taken, k + 1),
            draft_cache=None if draft_cache is None else kept(state.draft_cache, draft_cache, taken, k + 1),
            counts=Counts(*(old + new for old, new in zip(state.counts, added, strict=True))),
        )

    return jax.lax.while_loop(lambda c: (c[0] < rounds) & ~c[1].done.all(), one, (jnp.int32(0), state))[1]


def verify(p, q, tokens, count, keys, law: Law):
    """Rejection sampling (Leviathan et al. 2023, algorithm 1) -> (accepted proposals [B] int32, the next token [B]).

    p [B,k+1,V], q [B,k,V]: the law of the target model before each of the tokens [B,k] and behind the last, and of who
    proposed them; only `count` [B] of them are proposals. A token is accepted with probability min(1, p / q); after the
    first that is not, the next one is drawn from max(p - q, 0), behind the last from p.
    """
    k = tokens.shape[1]
    proposed = jnp.arange(k) < count[:, None]
    of_p, of_q = (jnp.take_along_axis(x[:, :k], tokens[..., None], axis=2)[..., 0] for x in (p, q))
    u = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(fold(keys, 0))
    accepted = jnp.cumprod((u * of_q < of_p) & proposed, axis=1).sum(axis=1)
    q = jnp.pad(q * proposed[..., None], ((0, 0), (0, 1), (0, 0)))
    p, q = (jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0] for x in (p, q))
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(rest.any(axis=1, keepdims=True), rest, p)  # p = q and yet rejected: a matter of rounding
    return accepted, law.draw(fold(keys, 1), rest)


def _append(state: State, tokens_Bn, count, limit, end):
    """-> (state with the first `count` [B] tokens, up to one that ends the answer and up to `limit`; how many [B])."""
    n = jnp.arange(tokens_Bn.shape[1])
    count = jnp.where(state.done, 0, jnp.minimum(count, limit - state.length))
    ends = jnp.isin(tokens_Bn, jnp.array(end, jnp.int32)) & (n < count[:, None])
    over = ends.any(axis=1)
    count = jnp.where(over, jnp.argmax(ends, axis=1) + 1, count)
    length = state.length + count
    text = attention.entered(state.text, tokens_Bn, state.length)
    return state.replace(text=text, length=length, done=state.done | over | (length >= limit)), count
