"""Beam search by the names and with the meaning of Hugging Face's `generate` (transformers 5).

A prompt has `num_beams` live beams, which are rows side by side, and keeps its `num_beams` best finished ones. A step
takes the best candidates (a live beam and one token more): those that end finish if they are among the first
`num_beams`, the best of the others live on (Sutskever et al. 2014, sec. 3.2; how long, says `early_stopping`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained


@dataclasses.dataclass(frozen=True)
class Beam:
    tokens: tuple[int, ...]  # an end token is the last of them, and counts in their length
    score: float  # the sum of their log-probabilities / len(tokens)**length_penalty
    finish: str  # stop: an end token | length: its prompt's room is full


class State(NamedTuple):
    """What a step takes and gives: B prompts, W beams each, N slots, of which an answer fills the first n."""

    n: jax.Array  # [] int32
    logits: jax.Array  # [B*W,V] after the live beams
    cache: attention.Cache  # of the live beams, B*W rows
    live: jax.Array  # [B,W,N] int32 tokens, -1 from n on
    sums: jax.Array  # [B,W] float32 of log-probabilities, best first; -inf: no beam
    done: jax.Array  # [B,W,N] int32 tokens of finished beams, -1 behind them
    scores: jax.Array  # [B,W] float32 of finished beams, best first; -inf: none
    open: jax.Array  # [B] bool: the search goes on


def generate(
    trained: Trained,
    prompts: Sequence[chat.Document],
    read: prompts_lib.Read | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 4,
    sampling: sample.Sampling = decode.GREEDY,
    *,
    max_length: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
) -> list[decode.Answer]:
    """-> the best num_return_sequences Answers of each prompt, best first; other arguments are decode.generate's and
    `search`'s. Of sampling what changes logits is applied to log-probabilities, as there; nothing is drawn."""
    if sampling.temperature or sampling.guidance_scale != 1:
        raise config.InputError(f"num_beams={num_beams} draws nothing and is not guided: leave temperature at 0 and "
                                "guidance_scale at 1")  # fmt: skip
    room = decode.rooms(trained, prompts, max_new_tokens, max_length)
    slots = decode.rounded(max(room), decode.BLOCK)
    logits, cache, there = decode.begin(trained, prompts, read, slots)
    rows = [p.tokens for p in prompts for _ in range(num_beams)]
    rules = sample.rules([sampling] * len(rows), trained.run.model.vocab)
    ends = trained.tokenizer.ends
    process = jax.tree_util.Partial(_processed, sample.history(rows, slots), rules, ends) if rules else None
    found = search(trained.model, trained.params, logits, cache, num_beams, room, ends, length_penalty, early_stopping,
                   num_return_sequences, process)  # fmt: skip
    answers = []
    for asked, here, beams in zip(prompts, there, found, strict=True):
        for beam in beams if here else ():
            tokens = beam.tokens[:-1] if beam.finish == "stop" else beam.tokens
            text = decode.text_of(trained, asked, tokens)
            answers.append(decode.Answer(text, tokens, beam.finish, sequences_score=beam.score))
        nothing = decode.Answer("", (), "forbidden" if here else "unreadable")
        answers += [nothing] * (num_return_sequences - (len(beams) if here else 0))
    return answers


def _processed(past: sample.History, rules: sample.Rules, end, tokens, scores):
    """Sampling's laws as `search` wants them: tokens [R,N] are the answers, -1 behind them."""
    n = (tokens >= 0).sum(axis=1)
    at = past.prompt[:, None] + jnp.arange(tokens.shape[1])
    rows = jnp.arange(len(tokens))[:, None]
    whole = past.tokens.at[rows, at].set(jnp.maximum(tokens, 0), mode="drop")
    return sample.processed(scores, past.replace(tokens=whole, length=past.prompt + n), rules, end)


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
    done, scores = jax.device_get(
        _search(model, params, logits, cache, num_beams, end, np.array(room), longest, length_penalty, at_once, process)
    )
    return [
        [_beam(tokens, score, end) for tokens, score in zip(*of_prompt, strict=True) if score > -np.inf]
        for of_prompt in zip(done[:, :num_return_sequences], scores[:, :num_return_sequences], strict=True)
    ]


def _beam(tokens, score, end) -> Beam:
    tokens = tuple(tokens[tokens >= 0].tolist())
    return Beam(tokens, float(score), "stop" if tokens[-1] in end else "length")


@partial(jax.jit, static_argnames=("model", "num_beams", "end"))
def _search(
    model, params, logits, cache, num_beams: int, end: tuple[int, ...], room, longest, length_penalty, at_once,
    process: Any,
):  # fmt: skip
    """-> (finished tokens [B,W,N], their scores [B,W]), as in State. longest [B]: the length, at least, by which a live
    beam's sum is divided before it is compared with finished ones; at_once: whether W finished ones are enough."""
    (B, V), W, N = logits.shape, num_beams, cache.document.shape[1]
    # Of a live beam's candidates at most len(end) end, so that W others are among so many.
    keep = min((1 + len(end)) * W, W * V)

    def one(s: State) -> State:
        log_p = jax.nn.log_softmax(s.logits.astype(jnp.float32), axis=-1)
        if process is not None:
            log_p = process(s.live.reshape(B * W, N), log_p)
        sums, at = jax.lax.top_k((s.sums[:, :, None] + log_p.reshape(B, W, V)).reshape(B, W * V), keep)
        parent, token, n = at // V, at % V, s.n + 1
        grown = _take(s.live, parent).at[:, :, s.n].set(token)
        ended = jnp.isin(token, jnp.array(end, jnp.int32)) | (n >= room)[:, None]

        finished = ended & (jnp.arange(keep) < W) & s.open[:, None]
        new = jnp.where(finished, sums / n.astype(jnp.float32) ** length_penalty, -jnp.inf)
        scores, best = jax.lax.top_k(jnp.concatenate([s.scores, new], axis=1), W)
        done = _take(jnp.concatenate([s.done, grown], axis=1), best)

        sums, best = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), W)
        worst = scores[:, -1]  # -inf until W have finished: any live beam is better
        hope = sums[:, 0] / jnp.maximum(n, longest).astype(jnp.float32) ** length_penalty
        go_on = s.open & (hope > worst) & ~(at_once & (worst > -jnp.inf))

        cache = _reorder(s.cache, _take(parent, best))
        logits, cache = decode.step(model, params, _take(token, best).reshape(B * W), cache)
        return State(n, logits, cache, _take(grown, best), sums, done, scores, go_on)

    # All beams of a prompt are the same at first: only one of them counts.
    none = jnp.full((B, W), -jnp.inf)
    tokens = jnp.full((B, W, N), -1, jnp.int32)
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0) if x.ndim else x, (logits, cache))
    start = State(jnp.int32(0), logits, cache, tokens, none.at[:, 0].set(0.0), tokens, none, jnp.ones(B, bool))
    last = jax.lax.while_loop(lambda s: s.open.any(), one, start)
    return last.done, last.scores


def _take(x, at_BK):
    """x [B,W] or [B,W,N] -> [B,K] or [B,K,N]."""
    return jnp.take_along_axis(x, at_BK.reshape(at_BK.shape + (1,) * (x.ndim - 2)), axis=1)


def _reorder(cache: attention.Cache, parent_BW) -> attention.Cache:
    """-> the cache with the k and v of each beam's parent; in all else, the memory too, a prompt's beams are equal."""
    B, W = parent_BW.shape
    rows = (jnp.arange(B)[:, None] * W + parent_BW).reshape(B * W)
    k, v = jax.tree.map(lambda x: x[rows], (cache.k, cache.v))
    return cache.replace(k=k, v=v)
