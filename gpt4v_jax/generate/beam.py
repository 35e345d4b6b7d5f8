"""Beam search by the names and with the meaning of Hugging Face's `generate` (transformers 5).

A prompt has `num_beams` live beams, which are rows side by side, and keeps its `num_beams` best finished ones. A step
takes the best candidates (a live beam and one token more): those that end finish if they are among the first
`num_beams`, the best of the others live on (Sutskever et al. 2014, sec. 3.2; how long, says `early_stopping`).

Beam sampling draws the candidates, without replacement, in place of taking the best: by their sums of log-probabilities
with Gumbel noise (Kool et al. 2019, sec. 3), the first `num_beams` being those that were drawn first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import constrain, decode, sample
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained


@dataclasses.dataclass(frozen=True)
class Beam:
    tokens: tuple[int, ...]  # an end token is the last of them, and counts in their length
    score: float  # the sum of their log-probabilities / len(tokens)**length_penalty
    finish: str  # stop: an end token, or `stopped` says so | length: its prompt's room is full


class State(NamedTuple):
    """What a step takes and gives: B prompts, W beams each, N slots, of which an answer fills the first n."""

    n: jax.Array  # [] int32
    logits: jax.Array  # [B*W,V] after the live beams; with guidance those after the second prompts follow, [2*B*W,V]
    cache: attention.Cache  # as many rows
    live: jax.Array  # [B,W,N] int32 tokens, -1 from n on
    sums: jax.Array  # [B,W] float32 of log-probabilities, best first; -inf: no beam
    done: jax.Array  # [B,W,N] int32 tokens of finished beams, -1 behind them
    scores: jax.Array  # [B,W] float32 of finished beams, best first; -inf: none
    open: jax.Array  # [B] bool: the search goes on


class Candidates(NamedTuple):
    """K of each prompt, best first, or as they were drawn."""

    sums: jax.Array  # [B,K] float32; -inf: none
    parent: jax.Array  # [B,K] int32: the live beam that it goes on from
    token: jax.Array  # [B,K] int32
    grown: jax.Array  # [B,K,N] int32: all of its tokens, -1 behind them


@flax.struct.dataclass
class How:
    """What stays the same in a search."""

    room: jax.Array  # [B] int
    longest: jax.Array  # [B] int: a live beam's sum is divided by this length, at least, when it meets finished ones
    length_penalty: float
    at_once: bool  # W finished beams are enough
    process: Any  # a jax.tree_util.Partial, or None
    scale: Any  # of guidance, [B*W] float32, or None
    allowed: Any  # [B*W,V] bool, or None: what process has as its last argument
    keys: Any  # [B] random keys, or None: nothing is drawn
    end: tuple[int, ...] = flax.struct.field(pytree_node=False)


def generate(
    trained: Trained,
    prompts: Sequence[chat.Document],
    read: prompts_lib.Read | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 4,
    sampling: sample.Sampling = decode.GREEDY,
    seeds: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    *,
    max_length: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    negative: Sequence[chat.Document] = (),
    logits_processor: Sequence[decode.Processor] = (),
    grammar: constrain.Grammar | None = None,
) -> list[decode.Answer]:
    """-> the best num_return_sequences Answers of each prompt, best first; other arguments are decode.generate's and
    `search`'s. What sampling, guidance and processors change of logits is applied to log-probabilities, as there. With
    a temperature candidates are drawn, by one seed a prompt; a beam's score is the sum of what it was drawn by, which
    temperature has divided. A stop string finishes a beam as an end token does, and so does all that a grammar allows.
    logits_processor: its rows are beams, num_beams of the first prompt, then of the second ...; they are not told apart
    by more than their History."""
    if not prompts:
        return []
    decode.check_second(sampling, prompts, negative)
    decode.check_stop(stop_strings)
    room = decode.rooms(trained, prompts, max_new_tokens, max_length, negative)
    slots = decode.rounded(max(room), decode.BLOCK)
    logits, cache, there = decode.begin(trained, [*prompts, *negative], read, slots)
    there = there.reshape(-1, len(prompts)).all(axis=0)
    rows, vocab = [p.tokens for p in prompts for _ in range(num_beams)], trained.run.model.vocab
    rules, ends = sample.rules([sampling] * len(rows), vocab), trained.tokenizer.ends
    scale = rules.pop("guidance_scale", None)
    keys = decode.keys_of(seeds, len(prompts))
    if sampling.temperature:
        rules["min_tokens_to_keep"] = jnp.full(len(rows), _spare(num_beams, ends))
    places, process = _Places(trained, prompts, grammar) if grammar else None, None
    if rules or logits_processor or grammar:
        process = jax.tree_util.Partial(_processed, sample.history(rows, slots), rules, ends,
                                        _Functions(tuple(logits_processor)))  # fmt: skip

    def stopped(i: int, tokens: tuple[int, ...]) -> bool:
        text = decode.text_of(trained, prompts[i], tokens) if stop_strings else ""
        return any(s in text for s in stop_strings) or places is not None and places.complete(i, tokens)

    found = search(
        trained.model, trained.params, logits, cache, num_beams, room, ends, length_penalty, early_stopping,
        num_return_sequences, process, keys if sampling.temperature else None,
        stopped if stop_strings or places else None, places.allowed if places else None, scale,
    )  # fmt: skip
    answers = []
    for i, (asked, here, most, beams) in enumerate(zip(prompts, there, room, found, strict=True)):
        answers_of = []
        if here and places and places.empty(i):
            answers_of = [decode.Answer("", (), "stop")]
        elif here:
            for beam in beams:
                complete = places is not None and places.complete(i, beam.tokens)
                text, n, finish = decode.ended(trained, asked, beam.tokens, most, stop_strings, complete)
                answers_of.append(decode.Answer(text, beam.tokens[:n], finish, sequences_score=beam.score))
        nothing = decode.Answer("", (), "forbidden" if here else "unreadable")
        answers += answers_of + [nothing] * (num_return_sequences - len(answers_of))
    return answers


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Functions:
    """logits_processor, as a part of a jax.tree_util.Partial that is compiled with it."""

    of: tuple[decode.Processor, ...]


def _processed(past: sample.History, rules: sample.Rules, end, functions: _Functions, tokens, scores, allowed=None):
    """Sampling's laws as `search` wants them: tokens [R,N] are the answers, -1 behind them."""
    n = (tokens >= 0).sum(axis=1)
    at = past.prompt[:, None] + jnp.arange(tokens.shape[1])
    rows = jnp.arange(len(tokens))[:, None]
    whole = past.tokens.at[rows, at].set(jnp.maximum(tokens, 0), mode="drop")
    past = past.replace(tokens=whole, length=past.prompt + n)
    scores = sample.processed(scores, past, rules, end)
    for function in functions.of:
        scores = function(past, scores)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    return sample.restrict(scores, rules) if "temperature" in rules else scores


class _Places:
    """Where beams are in a grammar, by (number of the prompt, tokens)."""

    def __init__(self, trained: Trained, prompts: Sequence[chat.Document], grammar: constrain.Grammar):
        self._vocab = trained.run.model.vocab
        self._first = {(i, ()): decode.matcher(trained, p, grammar) for i, p in enumerate(prompts)}
        self._known: dict[tuple[int, tuple[int, ...]], constrain.Matcher | None] = dict(self._first)

    def empty(self, i: int) -> bool:
        """-> whether only the empty text matches, and no token ends it."""
        return not self._first[i, ()].allowed().any()

    def complete(self, i: int, tokens: tuple[int, ...]) -> bool:
        """-> whether nothing but an end may follow."""
        place = self._at(i, tokens)
        return self.empty(i) or place is not None and place.finished

    def allowed(self, live, sums, open) -> np.ndarray:
        """`search`'s `allowed`."""
        B, W = sums.shape
        which = [(i, w) for i in range(B) for w in range(W)]
        searched = {(i, w): (i, tuple(live[i, w][live[i, w] >= 0].tolist()))
                    for i, w in which if open[i] and sums[i, w] > -np.inf and not self.empty(i)}  # fmt: skip
        found = {beam: self._at(*place) for beam, place in searched.items()}
        self._known = self._first | {place: found[beam] for beam, place in searched.items()}
        masks = constrain.masks([found.get(beam) for beam in which], self._vocab)
        masks[[beam in found and found[beam] is None for beam in which]] = False
        return masks

    def _at(self, i: int, tokens: tuple[int, ...]) -> constrain.Matcher | None:
        """-> a beam's place; None: it cannot go on, though others may."""
        n = next(n for n in range(len(tokens), -1, -1) if (i, tokens[:n]) in self._known)
        found = self._known[i, tokens[:n]]
        if n < len(tokens) and found is not None and not self.empty(i):
            found = found.copy()
            try:
                for token in tokens[n:]:
                    found.advance(token)
                found.allowed()  # is remembered
            except config.InputError:
                found = None
            self._known[i, tokens] = found
        return found


def _spare(num_beams: int, end: tuple[int, ...]) -> int:
    """-> how many candidates a live beam has at least: of them len(end) may end, and one goes on. HF have two where
    nothing ends, which drawing from them depends on. One beam has one: it is greedy, or drawn as decode draws."""
    return max(2, 1 + len(end)) if num_beams > 1 else 1


def search(
    model: GPT4V,
    params,
    logits,
    cache: attention.Cache,
    num_beams: int,
    room: Sequence[int],
    end: tuple[int, ...],
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    process: Callable | None = None,
    keys=None,
    stopped: Callable[[int, tuple[int, ...]], bool] | None = None,
    allowed: Callable | None = None,
    scale=None,
) -> list[list[Beam]]:
    """-> of each prompt its best num_return_sequences beams, best first; fewer where `process` forbids all others.

    logits [B,V], cache: what decode.prefill gives for B prompts; the cache has max(room) free slots. room [B]: the most
    new tokens of each prompt. end: the tokens that end an answer.

    length_penalty: above 0 favours long beams, below 0 short ones. early_stopping: a prompt with num_beams finished
    beams is done at once (True); when none of its live ones would be better if it ended now (False); or, with
    length_penalty > 0, if it kept its sum of log-probabilities until the room is full ("never"). One beam is greedy.

    process(tokens [B*num_beams,N] int32, log-probabilities [B*num_beams,V]) -> what takes their place, under jit;
    tokens are the answers so far, -1 behind them. Each function compiles its own search: what varies from call to call
    goes into the arrays of a jax.tree_util.Partial. Scores are not normalised after it.

    keys [B]: random keys; candidates are drawn, those of token n by fold_in(key, n), and one beam is drawn as
    decode.generate draws. None: the best are taken.

    stopped(number of the prompt, a candidate's tokens) -> whether they end it. It is asked on the host, between steps,
    so that a search with it is slower. So is allowed(live [B,num_beams,N], sums [B,num_beams], open [B]; State's) ->
    what process gets as its third argument in the next step.

    scale [B*num_beams]: of guidance (sample.guided); logits and cache then have 2 B rows, the second prompts' last.

    Raises InputError for values out of range.
    """
    if num_beams < 1:
        raise config.InputError(f"num_beams={num_beams} must be 1 (greedy) or more")
    if not 1 <= num_return_sequences <= num_beams:
        raise config.InputError(
            f"num_return_sequences={num_return_sequences} must be from 1 to num_beams={num_beams}: ask for more beams"
        )
    if early_stopping not in (False, True, "never"):
        raise config.InputError(f"early_stopping={early_stopping!r} must be False, True or 'never'")
    if min(room) < 1:
        raise config.InputError(f"room={min(room)} for new tokens must be 1 or more: shorten the prompt")
    if not abs(length_penalty) * math.log(max(room) + 1) < 60:  # also NaN; beyond it powers leave float32
        raise config.InputError(f"length_penalty={length_penalty} must be a number nearer to 0, such as 1.0")
    assert int(cache.cursor) + max(room) <= cache.document.shape[1], "the cache has too few slots"

    at_once = num_beams == 1 or early_stopping not in (False, "never")
    longest = np.array(room) if early_stopping == "never" and length_penalty > 0 else np.zeros(len(room), int)
    if process is not None and not isinstance(process, jax.tree_util.Partial):
        process = jax.tree_util.Partial(process)
    how = How(np.array(room), longest, length_penalty, at_once, process, scale, None, keys, end)
    if stopped is None and allowed is None:
        last = _search(model, params, logits, cache, num_beams, how)
    else:
        last = _start(logits, cache, num_beams, len(room))
        while last.open.any():
            if allowed is not None:
                how = how.replace(allowed=allowed(*jax.device_get((last.live, last.sums, last.open))))
            found = _candidates(last, how)
            ends = _asked(stopped, last.open, found) if stopped else False
            last = _advance(model, params, last, found, ends, how)
    done, scores = jax.device_get((last.done, last.scores))
    return [
        [_beam(i, *one, end, stopped) for one in zip(*of_prompt, strict=True) if one[1] > -np.inf]
        for i, of_prompt in enumerate(
            zip(done[:, :num_return_sequences], scores[:, :num_return_sequences], strict=True)
        )
    ]


def _beam(i: int, tokens, score, end, stopped) -> Beam:
    tokens = tuple(tokens[tokens >= 0].tolist())
    stop = tokens[-1] in end or stopped is not None and stopped(i, tokens)
    return Beam(tokens, float(score), "stop" if stop else "length")


def _asked(stopped: Callable, open, found: Candidates) -> np.ndarray:
    """-> [B,K] bool: which candidates `stopped` ends."""
    open, sums, grown = jax.device_get((open, found.sums, found.grown))
    ends = np.zeros(sums.shape, bool)
    for i, k in np.argwhere(open[:, None] & (sums > -np.inf)):
        ends[i, k] = stopped(i, tuple(grown[i, k][grown[i, k] >= 0].tolist()))
    return ends


@partial(jax.jit, static_argnames=("model", "num_beams"))
def _search(model, params, logits, cache, num_beams: int, how: How) -> State:
    """-> the last State, of a search without `stopped`."""
    return jax.lax.while_loop(
        lambda s: s.open.any(), lambda s: _advance(model, params, s, _candidates(s, how), False, how),
        _start(logits, cache, num_beams, len(how.room)),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("num_beams", "prompts"))
def _start(logits, cache, num_beams: int, prompts: int) -> State:
    """All beams of a prompt are the same at first: only one of them counts."""
    B, W, N = prompts, num_beams, cache.document.shape[1]
    none = jnp.full((B, W), -jnp.inf)
    tokens = jnp.full((B, W, N), -1, jnp.int32)
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0) if x.ndim else x, (logits, cache))
    return State(jnp.int32(0), logits, cache, tokens, none.at[:, 0].set(0.0), tokens, none, jnp.ones(B, bool))


@jax.jit
def _candidates(s: State, how: How) -> Candidates:
    (B, W, N), V = s.live.shape, s.logits.shape[1]
    logits = s.logits.astype(jnp.float32)
    if how.scale is None:
        log_p = jax.nn.log_softmax(logits, axis=-1)
    else:
        log_p = sample.guided(*jnp.split(logits, 2), how.scale)
    if how.process is not None:
        log_p = how.process(s.live.reshape(B * W, N), log_p, *([] if how.allowed is None else [how.allowed]))
    sums = (s.sums[:, :, None] + log_p.reshape(B, W, V)).reshape(B, W * V)
    order = sums
    if how.keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(how.keys, s.n)
        order += jax.vmap(lambda key: jax.random.gumbel(key, (W * V,)))(keys)
    at = jax.lax.top_k(order, min(_spare(W, how.end) * W, W * V))[1]
    parent, token = at // V, at % V
    return Candidates(_take(sums, at), parent, token, _take(s.live, parent).at[:, :, s.n].set(token))


@partial(jax.jit, static_argnames="model")
def _advance(model, params, s: State, found: Candidates, stopped, how: How) -> State:
    """stopped [B,K] bool, or False: the candidates that end by their text."""
    (B, W, _), n = s.live.shape, s.n + 1
    sums, parent, token, grown = found
    ended = stopped | jnp.isin(token, jnp.array(how.end, jnp.int32)) | (n >= how.room)[:, None]

    finished = ended & (jnp.arange(sums.shape[1]) < W) & s.open[:, None]
    new = jnp.where(finished, sums / n.astype(jnp.float32) ** how.length_penalty, -jnp.inf)
    scores, best = jax.lax.top_k(jnp.concatenate([s.scores, new], axis=1), W)
    done = _take(jnp.concatenate([s.done, grown], axis=1), best)

    sums, best = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), W)
    worst = scores[:, -1]  # -inf until W have finished: any live beam is better
    hope = sums[:, 0] / jnp.maximum(n, how.longest).astype(jnp.float32) ** how.length_penalty
    go_on = s.open & (hope > worst) & ~(how.at_once & (worst > -jnp.inf))

    cache = _reorder(s.cache, _take(parent, best))
    token = jnp.tile(_take(token, best).reshape(B * W), len(s.logits) // (B * W))
    logits, cache = decode.step(model, params, token, cache)
    return State(n, logits, cache, _take(grown, best), sums, done, scores, go_on)


def _take(x, at_BK):
    """x [B,W] or [B,W,N] -> [B,K] or [B,K,N]."""
    return jnp.take_along_axis(x, at_BK.reshape(at_BK.shape + (1,) * (x.ndim - 2)), axis=1)


def _reorder(cache: attention.Cache, parent_BW) -> attention.Cache:
    """-> the cache with the k and v of each beam's parent; in all else, the memory too, a prompt's beams are equal."""
    B, W = parent_BW.shape
    rows = (jnp.arange(B)[:, None] * W + parent_BW).reshape(B * W)
    rows = jnp.concatenate([rows + B * W * i for i in range(len(cache.document) // (B * W))])  # two with guidance
    k, v = jax.tree.map(lambda x: x[rows], (cache.k, cache.v))
    return cache.replace(k=k, v=v)
