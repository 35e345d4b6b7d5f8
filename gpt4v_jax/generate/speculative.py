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

    past: sample.History  # an answer that no token may follow has -1 behind it
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
    max_new_tokens: int | None = None,
    draft: Trained | Lookup = Lookup(),  # noqa: B008, frozen
    num_assistant_tokens: int = 5,
    sampling: sample.Sampling = plain.GREEDY,
    seeds: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    draft_prompts: Sequence[chat.Document] = (),
    draft_read: prompts_lib.Read | None = None,
    *,
    max_length: int | None = None,
    negative: Sequence[chat.Document] = (),
    logits_processor: Sequence[plain.Processor] = (),
) -> tuple[list[plain.Answer], Counts]:
    """-> (an Answer of each prompt, counts of each row).

    draft: another model of the same vocabulary, or prompt lookup; num_assistant_tokens: what a model proposes in a
    round. seeds: one a prompt. draft_prompts, draft_read: the prompts as the draft model's layout lays them, where it
    lays media otherwise. A processor's rows are the prompts', or num_assistant_tokens + 1 of each, side by side. All
    else is decode.generate's. Raises InputError.

    Greedy gives decode.generate's answers, but where two logits tie within the rounding of a pass over T = k + 1
    positions in place of 1.
    """
    config.at_least(1, num_assistant_tokens=num_assistant_tokens)
    if not prompts:
        return [], Counts(*[jnp.zeros(0, jnp.int32)] * 3)
    plain.check_stop(stop_strings)
    plain.check_second(sampling, prompts, negative)
    law = Law(sampling, trained.tokenizer.ends, tuple(logits_processor))
    keys = plain.keys_of(seeds, len(prompts))
    room = plain.rooms(trained, prompts, max_new_tokens, max_length, negative)
    looks = isinstance(draft, Lookup)
    k = draft.prompt_lookup_num_tokens if looks else num_assistant_tokens
    new = plain.rounded(max(room), plain.BLOCK)
    logits, cache, there = plain.begin(trained, [*prompts, *negative], read, slots(0, new, k))
    there = there.reshape(-1, len(prompts)).all(axis=0)
    draft_cache = None
    if not looks:
        check(trained, draft, () if draft_prompts else prompts)
        # Its own prompt's cache; the logits are not needed: the target model draws the first token.
        _, draft_cache, _ = plain.begin(draft, draft_prompts or prompts, draft_read or read, slots(0, new, k))

    longest, width = (max(map(len, x)) for x in (prompts, [p.source for p in prompts]))
    past = sample.history([p.tokens for p in prompts], plain.rounded(longest, plain.BUCKET) - longest + new + k + 1)
    source = np.full((len(prompts), plain.rounded(width, plain.BUCKET)), -1, np.int32)
    for row, p in zip(source, prompts, strict=True):
        row[len(row) - len(p.source) :] = p.source
    limit = past.prompt + np.array(room)
    answers = [None if here else plain.Answer("", (), "unreadable") for here in there]
    state = begin(logits, cache, draft_cache, past, limit, ~there, keys, law)
    proposer = (draft, None) if looks else (draft.model, draft.params)
    rounds = -(-plain.BLOCK // (k + 1)) if stop_strings else new  # between two looks at the text
    while not all(answers):
        state = decode(trained.model, trained.params, *proposer, state, source, limit, keys, rounds, k, law)
        rows = zip(*map(np.asarray, (state.past.tokens, past.prompt, state.past.length)), strict=True)
        for i, (row, a, b) in enumerate(rows):
            tokens = row[a:b].tolist()
            text, n, finish = plain.ended(trained, prompts[i], tokens, room[i], stop_strings)
            if finish and answers[i] is None:
                answers[i] = plain.Answer(text, tuple(tokens[:n]), finish)
        state = state.replace(done=jnp.array([answer is not None for answer in answers]))
    return answers, state.counts


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


@functools.partial(jax.jit, static_argnames="law", donate_argnames=("cache", "draft_cache"))
def begin(logits, cache, draft_cache, past: sample.History, limit, done, keys, law: Law) -> State:
    """-> the State with the first token drawn. logits [law.parts*B,V]: behind the prompts, which past and both caches
    hold; past has room for k + 1 tokens behind `limit` [B], the longest that a row may become; keys [B]."""
    token = law.draw(fold(keys, past.length), law(law.guided(logits), past))
    state = State(past, done, cache, draft_cache, Counts(*[jnp.zeros_like(past.length)] * 3))
    return _append(state, token[:, None], jnp.ones_like(past.length), limit, law.end)[0]


@functools.partial(jax.jit, static_argnames=("model", "draft", "k", "law"), donate_argnames="state")
def decode(model: GPT4V, params, draft: GPT4V | Lookup, draft_params, state: State, source, limit, keys, rounds, k: int,
           law: Law) -> State:  # fmt: skip
    """At most `rounds` rounds more; fewer when all rows are done. The caches must have `slots`: jit cannot check.

    source [B,S] int32, right-aligned after -1: what an encoder reads is no history, but may be copied from. What is
    random in a round is drawn by fold_in(key, the row's length), so that it depends on the row alone.
    """

    def one(carry):
        n, state = carry
        # A row that no token may follow is done, and its -1 is no token.
        past = state.past.replace(tokens=jnp.maximum(state.past.tokens, 0))
        round_keys = fold(keys, past.length)
        if isinstance(draft, Lookup):
            text = jnp.concatenate([source, past.tokens], axis=1)
            tokens, count = look_up(text, source.shape[1] + past.length, k, draft.max_matching_ngram_size)
            q = jax.nn.one_hot(tokens, model.config.vocab)
            draft_cache = None
        else:
            tokens, q, draft_cache = propose(draft, draft_params, past, state.draft_cache, round_keys, k, law)
            count = jnp.full_like(past.length, k)
        said = jnp.concatenate([past.back(1)[:, None], tokens], axis=1)
        logits, cache = plain.extend(model, params, jnp.tile(said, (law.parts, 1)), state.cache)
        p = law.along(law.guided(logits), past, tokens)
        accepted, token = verify(p, q, tokens, count, fold(round_keys, k), law)
        at = jnp.arange(k + 1)
        found = jnp.where(at < accepted[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), token[:, None])
        after, taken = _append(state, found, accepted + 1, limit, law.end)
        live = ~state.done
        added = Counts(live * count, jnp.minimum(accepted, taken), live)
        return n + 1, after.replace(
            cache=kept(state.cache, cache, jnp.tile(taken, law.parts), k + 1),
            draft_cache=None if draft_cache is None else kept(state.draft_cache, draft_cache, taken, k + 1),
            counts=Counts(*(old + new for old, new in zip(state.counts, added, strict=True))),
        )

    return jax.lax.while_loop(lambda c: (c[0] < rounds) & ~c[1].done.all(), one, (jnp.int32(0), state))[1]


def verify(p, q, tokens, count, keys, law: Law):
    """Rejection sampling (Leviathan et al. 2023, algorithm 1) -> (accepted proposals [B] int32, the next token [B],
    -1 where none is allowed).

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
    n, past = jnp.arange(tokens_Bn.shape[1]), state.past
    count = jnp.where(state.done, 0, jnp.minimum(count, limit - past.length))
    ends = (jnp.isin(tokens_Bn, jnp.array(end, jnp.int32)) | (tokens_Bn < 0)) & (n < count[:, None])
    over = ends.any(axis=1)
    count = jnp.where(over, jnp.argmax(ends, axis=1) + 1, count)
    length = past.length + count
    past = past.replace(tokens=attention.entered(past.tokens, tokens_Bn, past.length), length=length)
    return state.replace(past=past, done=state.done | over | (length >= limit)), count
