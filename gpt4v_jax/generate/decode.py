"""Prefill and cached decode under jit, and `generate`, which joins them.

A prompt is a document (generate.prompts) that ends where the answer begins. Prompts of different lengths share a batch:
the cache's unused slots have document 0, which no query sees.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import constrain, sample
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained

BLOCK = 16  # tokens decoded between two looks at the text, for stop strings
GREEDY = sample.Sampling()
NEW_TOKENS = 64  # where nobody says how many
BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    finish: str  # stop: <end> or a stop string | length: max_new_tokens, or the context is full | unreadable: a medium
    # | forbidden: no token may follow, or no more beams are left
    logprobs: tuple[float, ...] = ()  # of the tokens, by the model itself: before bias, penalties and temperature
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each token: the most probable ones, (token, logprob)
    scores: Any = None  # [n,V] float32: what each token was chosen by, after all laws, as Hugging Face's
    sequences_score: float | None = None  # of a beam: its log-probability / length ** length_penalty


@flax.struct.dataclass
class Told:
    """What decoding tells of the tokens that it has drawn; None of what was not asked for."""

    tokens: jax.Array  # [B,n] int32; -1: none was left to draw, which ends the row
    logprobs: jax.Array | None = None  # [B,n] float32, by the model itself
    top: jax.Array | None = None  # [B,n,k] int32: the most probable tokens
    top_logprobs: jax.Array | None = None  # [B,n,k] float32
    scores: jax.Array | None = None  # [B,n,V] float32: what they were chosen by


Processor = Callable[[sample.History, jax.Array], jax.Array]


def generate(
    trained: Trained,
    prompts: Sequence[chat.Document],
    read: prompts_lib.Read | None = None,
    max_new_tokens: int | None = None,
    sampling: sample.Sampling = GREEDY,
    seeds: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    *,
    max_length: int | None = None,
    num_return_sequences: int = 1,
    negative: Sequence[chat.Document] = (),
    logits_processor: Sequence[Processor] = (),
    grammar: constrain.Grammar | None = None,
    logprobs: int | None = None,
    output_scores: bool = False,
) -> list[Answer]:
    """-> the Answers of each prompt, num_return_sequences of the first, then of the second ...

    read: medium -> its patches, as a source's. max_new_tokens: NEW_TOKENS where neither it nor max_length is given;
    max_length counts the prompt's positions, too, and yields to it. seeds: one a prompt; its sequence i has seed + i.
    negative: the second prompt of each, for sampling.guidance_scale. logits_processor: functions of (History, logits
    [B,V]) -> logits [B,V], traced once; they come behind sampling's own. grammar: what an answer must match
    (generate.constrain), asked before each token. logprobs: an answer tells its tokens' and those of so many of the
    most probable ones. output_scores: it tells the processed logits, of a drawn answer what it is drawn from.

    Raises InputError for values that mean nothing, and for a prompt that the model cannot read.
    """
    if not prompts:
        return []
    check_second(sampling, prompts, negative)
    config.at_least(1, num_return_sequences=num_return_sequences)
    if num_return_sequences > 1 and not sampling.temperature:
        raise config.InputError(f"num_return_sequences={num_return_sequences}: greedy answers are one and the same, "
                                "set a temperature")  # fmt: skip
    check_stop(stop_strings)
    asks, second = ([p for p in given for _ in range(num_return_sequences)] for given in (prompts, negative))
    room = rooms(trained, asks, max_new_tokens, max_length, second)
    keys = keys_of(seeds, len(prompts), num_return_sequences)
    matchers = []
    for p in prompts if grammar else ():
        of_prompt = matcher(trained, p, grammar)
        matchers += [of_prompt.copy() for _ in range(num_return_sequences)]
    slots = rounded(max(room), BLOCK)
    logits, cache, there = begin(trained, [*asks, *second], read, slots)

    rules = sample.rules([sampling] * len(asks), trained.run.model.vocab)
    past = sample.history([p.tokens for p in asks], slots)
    told: list[Told] = []
    # A prompt whose media cannot be read is padding: nothing answers it.
    there = there.reshape(-1, len(asks)).all(axis=0)  # of both prompts
    answers: list[Answer | None] = [None if here else Answer("", (), "unreadable") for here in there]
    for i, place in enumerate(matchers):
        if not place.allowed().any():  # only the empty text matches, and no token ends it
            answers[i] = answers[i] or Answer("", (), "stop")
    n = 1 if grammar else BLOCK  # tokens at a time
    for _ in range(0, max(room), n):
        done = jnp.array([answer is not None for answer in answers])
        allowed = constrain.masks(matchers, trained.run.model.vocab) if grammar else None
        new, logits, cache, past = decode(  # not the clone: of media in the stream other ones compile nothing anew
            trained.model, trained.params, logits, cache, past, keys, done, rules, trained.tokenizer.ends,
            tuple(logits_processor), allowed, jnp.array(room), tokens=n, logprobs=logprobs,
            output_scores=output_scores,
        )  # fmt: skip
        told.append(jax.tree.map(np.asarray, new))
        so_far = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *told)
        for i, answer in enumerate(answers):
            if answer is None:
                of_row, complete = jax.tree.map(lambda x, i=i: x[i], so_far), False
                if grammar and of_row.tokens[-1] >= 0:
                    matchers[i].advance(int(of_row.tokens[-1]))
                    complete = matchers[i].finished  # nothing but an end may follow: it need not
                answers[i] = _finished(trained, asks[i], of_row, room[i], stop_strings, complete)
        if all(answers):
            break
    return answers


def keys_of(seeds: Sequence[int], prompts: int, sequences: int = 1):
    """-> random keys [prompts x sequences]: sequence i of a prompt has its seed + i. No seeds: 0, 1, 2, ... of all."""
    seeds = list(seeds) or [i * sequences for i in range(prompts)]
    if len(seeds) != prompts:
        raise config.InputError(f"{len(seeds)} seeds for {prompts} prompts: give one a prompt")
    seeds = [(seed + i) % 2**32 for seed in seeds for i in range(sequences)]
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


def matcher(trained: Trained, prompt: chat.Document, grammar: constrain.Grammar) -> constrain.Matcher:
    """-> the place of an answer that has not begun. Raises InputError as Matcher does."""
    return constrain.Matcher(grammar, trained.tokenizer, not trained.chats and not prompt.source)


def check_second(sampling: sample.Sampling, prompts: Sequence, negative: Sequence) -> None:
    """Raises InputError where guidance has not its second prompts, or they no guidance."""
    if (sampling.guidance_scale != 1) != bool(negative) or negative and len(negative) != len(prompts):
        raise config.InputError(f"guidance_scale={sampling.guidance_scale} with {len(negative)} second prompts: give "
                                f"one for each of the {len(prompts)} prompts, or leave it at 1, which needs none")


def check_stop(stop: Sequence[str]) -> None:
    """Raises InputError for a stop string that every text has."""
    if not all(stop):
        raise config.InputError("a stop string is empty: leave it out")


def rounded(n: int, multiple: int) -> int:
    """-> n, rounded up, so that few shapes are compiled."""
    return -(-n // multiple) * multiple


def rooms(trained: Trained, prompts: Sequence[chat.Document], max_new_tokens: int | None,
          max_length: int | None = None, second: Sequence[chat.Document] = ()) -> list[int]:  # fmt: skip
    """-> how many tokens the answer to each prompt may have. second: prompts of guidance, which must not leave the
    context, either. Raises InputError for what leaves none."""
    context = trained.layout.context
    if max_new_tokens is None and max_length is None:
        max_new_tokens = NEW_TOKENS
    if max_new_tokens is not None:
        config.at_least(1, max_new_tokens=max_new_tokens)
        room = [min(max_new_tokens, context - len(p)) for p in prompts]
    else:
        longest = max(map(len, prompts))
        if max_length <= longest:
            raise config.InputError(f"max_length={max_length} counts the prompt, which has {longest} positions: it "
                                    "must be more; max_new_tokens does not count it")  # fmt: skip
        room = [min(max_length, context) - len(p) for p in prompts]
    return [min(n, context - len(p)) for n, p in zip(room, second, strict=True)] if second else room


def begin(trained: Trained, prompts: Sequence[chat.Document], read: prompts_lib.Read | None, slots: int):
    """-> (logits [B,V] after each prompt, a cache with room for so many tokens more, [B] bool: whether the prompt is
    there; one whose media cannot be read is not). Raises InputError for a prompt that the model cannot read."""
    check(trained, prompts)
    context = trained.layout.context
    longest, asked = max(map(len, prompts)), max(len(p.source) for p in prompts)
    asked = max(asked, min(trained.layout.source, 1))  # an encoder reads something, be it padding
    most = ((longest, context), (asked, trained.layout.source))
    width, source = (min(rounded(n, BUCKET), limit) for n, limit in most)
    layout = dataclasses.replace(trained.layout, context=width, source=source, **budgets(prompts, trained.layout))
    batch = packing.stack([packing.fill([p], read, layout) for p in prompts])
    logits, cache = prefill(trained.model.clone(layout=layout), trained.params, batch, width + slots)
    return logits, cache, batch.document.any(axis=1)


def check(trained: Trained, prompts: Sequence[chat.Document]) -> None:
    """Raises InputError for a prompt that the model cannot read, or that leaves no room for an answer."""
    if not trained.run.model.causal:
        raise config.InputError("this model's stream is bidirectional: it fills in masked tokens and generates no text")
    longest, asked = max(map(len, prompts)), max(len(p.source) for p in prompts)
    context, reads = trained.layout.context, trained.layout.source
    if asked > reads:
        raise config.InputError(f"the prompt has {asked} positions, the encoder reads at most {reads}: shorten it")
    if longest >= context:
        raise config.InputError(f"the prompt has {longest} positions (media included), the model's context is "
                                f"{context}: shorten it to at most {context - 1}")


def budgets(prompts: Sequence[chat.Document], layout: batch_lib.Layout) -> dict[str, tuple[int, ...]]:
    """-> Layout's items and patches that hold the media of each of the prompts."""
    most = np.max([chat.media_needs([m for _, m in p.media], layout) for p in prompts], axis=0).tolist()
    return {"items": tuple(most[::2]), "patches": tuple(most[1::2])}


def text_of(trained: Trained, asked: chat.Document, tokens: Sequence[int]) -> str:
    """-> the text of an answer's tokens."""
    text = trained.tokenizer.decode(tokens)
    if trained.chats or asked.source:
        return text
    # It goes on: some decoders drop the blank that a text begins with.
    before = trained.tokenizer.decode(asked.tokens)
    whole = trained.tokenizer.decode([*asked.tokens, *tokens])
    return whole[len(before) :] if whole.startswith(before) else text


def ended(trained: Trained, asked: chat.Document, tokens: Sequence[int], room: int, stop: Sequence[str] = (),
          complete: bool = False) -> tuple[str, int, str | None]:  # fmt: skip
    """-> (an answer's text so far, how many of its tokens it has, Answer.finish or None where it goes on).

    tokens: what was drawn; complete: they are all that a grammar allows. The last token is the one that completes a
    stop string, before which the text is cut.
    """
    kept, finish = tokens[:room], "stop" if complete else "length" if len(tokens) >= room else None
    at = next((i for i, token in enumerate(kept) if token in trained.tokenizer.ends or token < 0), None)
    if at is not None:
        kept, finish = kept[:at], "stop" if kept[at] >= 0 else "forbidden"
    text = text_of(trained, asked, kept)
    if any(s in text for s in stop):
        n = next(n for n in range(1, len(kept) + 1) if any(s in text_of(trained, asked, kept[:n]) for s in stop))
        kept, finish, text = kept[:n], "stop", text_of(trained, asked, kept[:n])
        text = text[: min(text.index(s) for s in stop if s in text)]
    return text, len(kept), finish


def _finished(trained: Trained, asked: chat.Document, told: Told, room: int, stop: Sequence[str], complete: bool):
    """-> the Answer, if the tokens told of end it, else None."""
    text, n, finish = ended(trained, asked, told.tokens.tolist(), room, stop, complete)
    if not finish:
        return None
    told = jax.tree.map(lambda x: x[:n], told)
    answer = Answer(text, tuple(told.tokens.tolist()), finish, scores=told.scores)
    if told.logprobs is None:
        return answer
    return dataclasses.replace(answer, logprobs=tuple(told.logprobs.tolist()), top=pairs(told.top, told.top_logprobs))


def pairs(top, logprobs) -> tuple[tuple[tuple[int, float], ...], ...]:
    """[n,k] each -> Answer.top."""
    return tuple(tuple(zip(*pair, strict=True)) for pair in zip(top.tolist(), logprobs.tolist(), strict=True))


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(model: GPT4V, params, batch: batch_lib.Batch, slots: int):
    """-> (logits [B,V] after each row's last real position, a cache with room for `slots` positions)."""
    cache = attention.empty_cache(model.config.decoder, batch.tokens.shape[0], slots, model.config.axes)
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    last = jnp.sum(batch.document > 0, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, hidden, method="logits"), cache


STATIC = ("model", "end", "processors", "tokens", "logprobs", "output_scores")


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="cache")
def decode(model: GPT4V, params, logits, cache, past: sample.History, keys, done, rules: sample.Rules,
           end: tuple[int, ...] = (), processors: tuple[Processor, ...] = (), allowed=None, limit=None, *,
           tokens: int = BLOCK, logprobs: int | None = None, output_scores: bool = False):  # fmt: skip
    """Draws up to `tokens` a row, and stops early when all rows are done, or have `limit` [B] int32 tokens in all.

    -> (Told, the logits after them, cache, past). Token n of an answer is drawn by key fold_in(key, n), so that it
    depends on the row's seed and on n alone. With guidance logits and cache have twice the rows, the second prompts'
    last. allowed [B,V] bool: of the next token alone.
    """

    draw = functools.partial(drawn, end=end, processors=processors, allowed=allowed, logprobs=logprobs,
                             output_scores=output_scores)  # fmt: skip

    def go_on(carry):
        n, _, _, _, _, done = carry
        return (n < tokens) & ~done.all()

    def one(carry):
        n, told, logits, cache, past, done = carry
        new = draw(logits, past, keys, rules)
        told = jax.tree.map(lambda all, x: all.at[:, n].set(x), told, new)
        token = jnp.maximum(new.tokens, 0)
        logits, cache = step(model, params, jnp.tile(token, len(logits) // len(keys)), cache)
        past = past.append(token)
        done |= jnp.isin(new.tokens, jnp.array(end, jnp.int32)) | (new.tokens < 0)
        if limit is not None:
            done |= past.length - past.prompt >= limit
        return n + 1, told, logits, cache, past, done

    shapes = jax.eval_shape(draw, logits, past, keys, rules)
    told = jax.tree.map(lambda x: jnp.zeros((len(x), tokens, *x.shape[1:]), x.dtype), shapes)
    told = told.replace(tokens=told.tokens + (end[0] if end else -1))  # what is not drawn
    _, told, logits, cache, past, _ = jax.lax.while_loop(go_on, one, (jnp.int32(0), told, logits, cache, past, done))
    return told, logits, cache, past


def drawn(logits, past: sample.History, keys, rules: sample.Rules, end: tuple[int, ...] = (),
          processors: tuple[Processor, ...] = (), allowed=None, logprobs: int | None = None,
          output_scores: bool = False) -> Told:  # fmt: skip
    """-> of the next token of each row, `decode`'s arguments, what is told: its arrays without the n."""
    raw = logits[: len(keys)]
    x = sample.guided(raw, logits[len(keys) :], rules["guidance_scale"]) if "guidance_scale" in rules else raw
    x = sample.processed(x, past, rules, end)
    for process in processors:
        x = process(past, x)
    if allowed is not None:
        x = jnp.where(allowed, x, -jnp.inf)
    token = sample.draw(x, jax.vmap(jax.random.fold_in)(keys, past.length - past.prompt), rules)
    token = jnp.where((x > -jnp.inf).any(axis=-1), token, -1)
    told = Told(token, scores=sample.restricted(x, rules) if output_scores else None)
    if logprobs is None:
        return told
    nats = jax.nn.log_softmax(raw, axis=-1)
    best, which = jax.lax.top_k(nats, min(logprobs, nats.shape[1]))
    return told.replace(logprobs=jnp.take_along_axis(nats, token[:, None], axis=1)[:, 0], top=which, top_logprobs=best)


def step(model: GPT4V, params, token_B, cache: attention.Cache):
    """Appends one token a row -> (logits [B,V] after it, cache). The cache must have a free slot: jit cannot check."""
    logits, cache = extend(model, params, token_B[:, None], cache)
    return logits[:, 0], cache


def extend(model: GPT4V, params, tokens_BT, cache: attention.Cache):
    """Appends T tokens a row -> (logits [B,T,V] behind each, cache). The cache must have T free slots."""
    hidden, cache = appended(model, params, tokens_BT, cache)
    return model.apply({"params": params}, hidden, method="logits"), cache


def appended(model: GPT4V, params, tokens_BT, cache: attention.Cache):
    """`extend` -> (hidden [B,T,D], cache)."""
    position = cache.next_position[:, None] + jnp.arange(tokens_BT.shape[1])[:, None]
    if model.config.position == "learned":
        # Of rows that are done, and of proposals, some lie beyond the context. The table would give NaN there, of which
        # 0 times is NaN, too.
        position = jnp.minimum(position, model.config.context - 1)
    batch = batch_lib.Batch(
        tokens=tokens_BT,
        slot=jnp.full_like(tokens_BT, -1),
        position=position,
        document=jnp.ones_like(tokens_BT),
        ar=jnp.ones_like(tokens_BT, bool),
        target=jnp.zeros_like(tokens_BT),
        weight=jnp.zeros_like(tokens_BT, jnp.float32),
    )
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    return hidden, cache
