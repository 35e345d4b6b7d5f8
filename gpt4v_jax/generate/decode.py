"""Prefill and cached decode under jit, and `generate`, which joins them.

A prompt is a document (chat.document) that ends where the answer begins. Prompts of different lengths share a batch:
the cache's unused slots have document 0, which no query sees.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, files, packing
from gpt4v_jax.data import media as media_lib
from gpt4v_jax.generate import sample
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained

BLOCK = 16  # tokens decoded between two looks at the text, for stop strings
GREEDY = sample.Sampling()
BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    finish: str  # stop: <end> or a stop string | length: max_new_tokens, or the context is full | unreadable: a medium


Read = Callable[[chat.Medium], Sequence[packing.Patches]]


def attach(layout: batch_lib.Layout, files: Sequence[tuple[str, bytes]]) -> tuple[tuple[chat.Medium, ...], Read]:
    """[(modality, a file's bytes)] -> (media for `prompt`, and what `generate` reads them by). Raises BadMedium."""
    for modality, _ in files:
        if not layout.reads(modality):
            raise config.InputError(f"this model reads no {modality}: leave it out")
    shapes = [media_lib.shape(m, lambda data=data: data, layout) for m, data in files]
    for (modality, _), shape in zip(files, shapes, strict=True):
        if modality == "audio" and shape[0] > layout.audio.seconds * 100:
            raise media_lib.BadMedium(f"a sound longer than model.audio.seconds={layout.audio.seconds}: cut it")
    found = tuple(chat.Medium(m, i, shape) for i, ((m, _), shape) in enumerate(zip(files, shapes, strict=True)))
    # Now, for packing leaves out a document with a medium that turns out to be bad.
    patches = [media_lib.patches(m.modality, files[m.key][1], m.shape, layout) for m in found]
    return found, lambda m: patches[m.key]


def prompt(trained: Trained, text: str, media: Sequence[chat.Medium] = ()) -> chat.Document:
    """-> the document of one user's turn; a model that was trained on plain text gets the plain text.

    Media go in front; or, where `<image>`, `<video>` or `<audio>` stands in the text as often as there are such media,
    into these places.
    """
    special = trained.tokenizer.special
    if trained.chats:
        pieces = [
            chat.Piece("user", trained.tokenizer.encode(part)) if isinstance(part, str) else
            chat.Piece("user", medium=part) for part in _parts(text, media)
        ]  # fmt: skip
        return chat.document(pieces, special, trained.layout)
    if trained.run.model.source:
        start = [trained.tokenizer.id(token) for token in trained.run.data.start]
        if not start or None in start:
            raise config.InputError(f"data.start={trained.run.data.start!r} are no tokens: which ones start an answer?")
        return dataclasses.replace(_plain(start), source=tuple(_not_empty(trained.tokenizer.prompt(text))))
    return _plain(_not_empty(trained.tokenizer.prompt(text)))


def _parts(text: str, media: Sequence[chat.Medium]) -> list[str | chat.Medium]:
    left = {name: [medium for medium in media if medium.modality == name] for name in batch_lib.MEDIA}
    marked = {name for name, found in left.items() if found and f"<{name}>" in text}  # of others a marker is plain text
    for name in marked:
        if text.count(f"<{name}>") != len(left[name]):
            raise config.InputError(f"{text.count(f'<{name}>')} <{name}> in the prompt, and {len(left[name])} files: "
                                    "write one for each, or none")
    parts, at = [medium for medium in media if medium.modality not in marked], 0
    for marker in files.MARKER.finditer(text):
        if marker[1] in marked:
            parts += [*([text[at : marker.start()]] if marker.start() > at else []), left[marker[1]].pop(0)]
            at = marker.end()
    return parts + [text[at:]] if text[at:] or not at else parts


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise config.InputError("the prompt is empty: a model of plain text needs at least one character")
    return ids


def _plain(ids: list[int]) -> chat.Document:
    return chat.shifted(np.array(ids, np.int32), np.zeros(len(ids), bool), np.ones(len(ids), bool))


def generate(
    trained: Trained,
    prompts: Sequence[chat.Document],
    read: Read | None = None,
    max_new_tokens: int = 64,
    sampling: sample.Sampling = GREEDY,
    seeds: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> list[Answer]:
    """-> one Answer a prompt. read: medium -> its patches, as a source's; seeds: one a prompt."""
    context, end = trained.layout.context, trained.tokenizer.ends
    if not trained.run.model.causal:
        raise config.InputError("this model's stream is bidirectional: it fills in masked tokens and generates no text")
    longest, asked = max(map(len, prompts)), max(len(p.source) for p in prompts)
    asked = max(asked, min(trained.layout.source, 1))  # an encoder reads something, be it padding
    if asked > trained.layout.source:
        reads = trained.layout.source
        raise config.InputError(f"the prompt has {asked} positions, the encoder reads at most {reads}: shorten it")
    if longest >= context:
        raise config.InputError(
            f"the prompt has {longest} positions (media included), the model's context is {context}: "
            f"shorten it to at most {context - 1}"
        )
    if max_new_tokens < 1:
        raise config.InputError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if any(not text for text in stop):
        raise config.InputError("a stop string is empty: leave it out")
    seeds = list(seeds) or list(range(len(prompts)))
    if len(seeds) != len(prompts):
        raise config.InputError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")

    pairs = ((longest, context), (asked, trained.layout.source))
    width, source = (min(-(-n // BUCKET) * BUCKET, most) for n, most in pairs)
    layout = dataclasses.replace(trained.layout, context=width, source=source, **budgets(prompts, trained.layout))
    batch = packing.stack([packing.fill([p], read, layout) for p in prompts])
    blocks = -(-min(max_new_tokens, context - 1) // BLOCK)
    slots = width + blocks * BLOCK
    logits, cache = prefill(trained.model.clone(layout=layout), trained.params, batch, slots)

    room = np.array([min(max_new_tokens, context - len(p)) for p in prompts])
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    tokens: list[list[int]] = [[] for _ in prompts]
    # A prompt whose media cannot be read is padding: nothing answers it.
    there = batch.document.any(axis=1)
    answers: list[Answer | None] = [None if here else Answer("", (), "unreadable") for here in there]
    for block in range(blocks):
        done = jnp.array([answer is not None for answer in answers])
        drawn, logits, cache = decode(  # not the clone: of media in the stream other ones compile nothing anew
            trained.model, trained.params, logits, cache, keys, done, block * BLOCK, sampling, end
        )
        for i, row in enumerate(np.asarray(drawn)):
            if answers[i] is None:
                tokens[i].extend(row.tolist())
                answers[i] = _finished(trained, prompts[i], tokens[i], room[i], stop)
        if all(answers):
            break
    return answers


def budgets(prompts: Sequence[chat.Document], layout: batch_lib.Layout) -> dict[str, tuple[int, ...]]:
    """-> Layout's items and patches that hold the media of each of the prompts."""
    most = np.max([chat.media_needs([m for _, m in p.media], layout) for p in prompts], axis=0).tolist()
    return {"items": tuple(most[::2]), "patches": tuple(most[1::2])}


def _finished(trained: Trained, asked: chat.Document, tokens: list[int], room: int, stop: Sequence[str]):
    """-> the Answer, if these tokens hold its end, else None. Text is cut before a stop string."""
    kept, finish = tokens[:room], "length" if len(tokens) >= room else None
    at = next((i for i, token in enumerate(kept) if token in trained.tokenizer.ends), None)
    if at is not None:
        kept, finish = kept[:at], "stop"
    text = trained.tokenizer.decode(kept)
    if not trained.chats and not asked.source:  # it goes on: some decoders drop the blank that a text begins with
        before = trained.tokenizer.decode(asked.tokens)
        whole = trained.tokenizer.decode([*asked.tokens, *kept])
        text = whole[len(before) :] if whole.startswith(before) else text
    cuts = [text.index(s) for s in stop if s in text]
    if cuts:
        text, finish = text[: min(cuts)], "stop"
    return Answer(text, tuple(kept), finish) if finish else None


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(model: GPT4V, params, batch: batch_lib.Batch, slots: int):
    """-> (logits [B,V] after each row's last real position, a cache with room for `slots` positions)."""
    cache = attention.empty_cache(model.config.decoder, batch.tokens.shape[0], slots, model.config.axes)
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    last = jnp.sum(batch.document > 0, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, hidden, method="logits"), cache


@functools.partial(jax.jit, static_argnames=("model", "sampling", "end"), donate_argnames="cache")
def decode(model: GPT4V, params, logits, cache, keys, done, first, sampling: sample.Sampling, end: tuple[int, ...]):
    """Draws up to BLOCK tokens a row, and stops early when all rows are done.

    -> (tokens [B,BLOCK], the logits after them, cache). first: tokens drawn before; token n is drawn by key
    fold_in(key, n), so that it depends on the row's seed and on n alone.
    """
    rows = logits.shape[0]

    def go_on(carry):
        n, _, _, _, done = carry
        return (n < BLOCK) & ~done.all()

    def one(carry):
        n, tokens, logits, cache, done = carry
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, first + n)
        token = sample.draw(logits, token_keys, sampling)
        logits, cache = step(model, params, token, cache)
        return n + 1, tokens.at[:, n].set(token), logits, cache, done | jnp.isin(token, jnp.array(end, jnp.int32))

    rest = end[0] if end else -1
    start = (jnp.int32(0), jnp.full((rows, BLOCK), rest, jnp.int32), logits, cache, done)
    _, tokens, logits, cache, _ = jax.lax.while_loop(go_on, one, start)
    return tokens, logits, cache


def step(model: GPT4V, params, token_B, cache: attention.Cache):
    """Appends one token a row -> (logits [B,V] after it, cache). The cache must have a free slot: jit cannot check."""
    token_B1 = token_B[:, None]
    batch = batch_lib.Batch(
        tokens=token_B1,
        slot=jnp.full_like(token_B1, -1),
        position=cache.next_position[:, None],
        document=jnp.ones_like(token_B1),
        ar=jnp.ones_like(token_B1, bool),
        target=jnp.zeros_like(token_B1),
        weight=jnp.zeros_like(token_B1, jnp.float32),
    )
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    return model.apply({"params": params}, hidden[:, 0], method="logits"), cache
