"""Prompts in chunks, and what is remembered of chunks that were read before.

A prompt is always read in the same chunks, whether the first of them are remembered or not, and each is computed with
the same shapes from the same values: so an answer is the same to the bit with the cache and without it. A prompt that
is remembered to its end is not read again: other answers to it (n, a retry) begin at once.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import decode, prompts
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained

CHUNK = 64  # positions, or more where a block is longer; the other requests wait for one chunk at a time
SHARES = 4  # patches of media whose size differs are padded to such a share of the largest, so that few shapes compile


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Positions start to stop of a prompt, as a row of a batch."""

    batch: batch_lib.Batch  # [1,T]; T is stop - start, rounded up
    layout: batch_lib.Layout
    start: int
    stop: int
    key: bytes  # of all that the prompt has up to `stop`


def cuts(document: chat.Document, layout: batch_lib.Layout) -> list[int]:
    """-> where its chunks end: where a block ends, behind each medium and at the latest CHUNK positions on."""
    if document.source:
        return [len(document)]  # its encoder reads all of the prompt at once
    behind = {first + layout.count(m.modality, m.shape) for first, m in document.media}
    found, start = [], 0
    for t in range(1, len(document)):
        if document.ar[t] and (t in behind or t - start >= CHUNK):
            found.append(t)
            start = t
    return [*found, len(document)]


def chunks(document: chat.Document, read: prompts.Read | None, layout: batch_lib.Layout) -> Iterator[Chunk]:
    """-> its chunks. Keys cover the tokens, what opens a step, and the media as the model sees them: modality, shape
    and the values and places of their patches, in which the file's bytes and the processing are."""
    position, digest, start = packing.positions(len(document), document.media, layout), hashlib.sha256(), 0
    for stop in cuts(document, layout):
        media = tuple((first - start, m) for first, m in document.media if document.source or start <= first < stop)
        part = dataclasses.replace(document, media=media, **{
            name: getattr(document, name)[start:stop] for name in ("tokens", "target", "weight", "ar")
        })  # fmt: skip
        digest.update(repr((part.tokens.tolist(), part.ar.tolist(), document.source, document.source_at)).encode())
        views = {m.key: read(m) for _, m in media}
        for first, m in media:
            digest.update(repr((first, m.modality, m.shape)).encode())
            for values, index in views[m.key]:
                digest.update(repr((values.dtype, values.shape)).encode())
                digest.update(np.ascontiguousarray(values).tobytes())
                digest.update(np.ascontiguousarray(index).tobytes())
        chunk_layout = _layout(part, layout)
        row = packing.fill([part], lambda m, views=views: views[m.key], chunk_layout)
        if not document.source:
            row.position[: stop - start] = position[start:stop]
        yield Chunk(packing.stack([row]), chunk_layout, start, stop, digest.digest())
        start = stop


def _layout(part: chat.Document, layout: batch_lib.Layout) -> batch_lib.Layout:
    """-> of a row that holds this part of a prompt; only so many different ones that few programs are compiled."""
    budgets = decode.budgets([part], layout)
    patches = []
    for name, items, count in zip(batch_lib.MEDIA, budgets["items"], budgets["patches"], strict=True):
        largest = len(batch_lib.largest_view(getattr(layout, name))) if items else 1
        patches.append(min(decode.rounded(count, -(-largest // SHARES)), items * largest))
    source = min(decode.rounded(max(len(part.source), 1), decode.BUCKET), layout.source)
    context = decode.rounded(len(part), decode.BUCKET)
    return dataclasses.replace(layout, context=context, source=source, items=budgets["items"], patches=tuple(patches))


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def empty(model: GPT4V, rows: int, slots: int) -> attention.Cache:
    """Under jit each of its arrays has a buffer of its own, which can be donated."""
    return attention.empty_cache(model.config.decoder, rows, slots, model.config.axes)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("k", "v"))
def _emptied(model: GPT4V, k, v, used) -> attention.Cache:
    """-> `empty` by writing zeros over the first `used` slots alone: to write all of them takes as long as steps do."""

    def wipe(i, kv):
        return jax.tree.map(lambda x: attention.entered(x, jnp.zeros_like(x[:, :, :CHUNK]), i * CHUNK), kv)

    slots = k[0].shape[attention.slots(k[0])]
    k, v = jax.lax.fori_loop(0, -(-used // CHUNK), wipe, (k, v))
    return attention.empty_cache(model.config.decoder, 1, slots, model.config.axes).replace(k=k, v=v)


def read_chunk(model: GPT4V, params, batch: batch_lib.Batch, cache: attention.Cache):
    """-> (hidden [1,D] of its last position, the cache with the chunk: its padding is written over by what comes
    next)."""
    memory = cache.memory, cache.memory_parts  # grows, so that its buffers are of no use
    return _read(model, params, batch, memory, cache.replace(memory=(), memory_parts=()))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(model: GPT4V, params, batch: batch_lib.Batch, memory, cache: attention.Cache):
    before, count = cache.cursor, jnp.sum(batch.document > 0)
    # With a cursor of its own a row reads only such blocks of the cache as are in use: attention.Sight.alone.
    cache = cache.replace(memory=memory[0], memory_parts=memory[1], cursor=before[None])
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    hidden = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return hidden, cache.replace(cursor=before + count)


@functools.partial(jax.jit, static_argnames="width")
def _taken(cache: attention.Cache, start, width: int) -> attention.Cache:
    """-> what a chunk of so many slots has added, beside what is known of the whole row."""

    def take(x):
        return jax.lax.dynamic_slice_in_dim(x, start, width, axis=attention.slots(x))

    added = {name: jax.tree.map(take, getattr(cache, name)) for name in attention.IN_SLOTS}
    return jax.tree.map(jnp.copy, cache).replace(**added)  # copies: the cache is donated to what reads the next chunk


@functools.partial(jax.jit, donate_argnames="cache")
def _put(cache: attention.Cache, part: attention.Cache, start) -> attention.Cache:
    def put(x, new):
        return attention.entered(x, new, start)

    whole = {name: jax.tree.map(put, getattr(cache, name), getattr(part, name)) for name in attention.IN_SLOTS}
    return jax.tree.map(jnp.copy, part).replace(**whole)


class Part(NamedTuple):
    """What a chunk has left: what _taken and read_chunk give."""

    cache: attention.Cache
    hidden: jax.Array


class Prefixes:
    """The parts of chunks, the least recently used forgotten first. Not thread-safe."""

    def __init__(self, most_bytes: int):
        self._known: collections.OrderedDict[bytes, Part] = collections.OrderedDict()
        self.most, self.bytes, self.hits, self.asked = most_bytes, 0, 0, 0  # hits, asked: in positions

    def get(self, chunk: Chunk) -> Part | None:
        self.asked += chunk.stop - chunk.start
        part = self._known.get(chunk.key)
        if part is not None:
            self.hits += chunk.stop - chunk.start
        return part

    def touch(self, keys: Sequence[bytes]) -> None:
        """The last of them is forgotten last."""
        for key in keys:
            if key in self._known:
                self._known.move_to_end(key)

    def put(self, chunk: Chunk, part: Part) -> None:
        size = _bytes(part)
        if size > self.most:
            return
        self._known[chunk.key] = part
        self.bytes += size
        while self.bytes > self.most:
            self.bytes -= _bytes(self._known.popitem(last=False)[1])


def _bytes(part: Part) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(part))


def filled(trained: Trained, document: chat.Document, read: prompts.Read | None, slots: int, prefixes: Prefixes,
           old: attention.Cache | None = None) -> Iterator[tuple[jax.Array | None, attention.Cache, int]]:  # fmt: skip
    """Reads a prompt, a chunk a step -> (hidden [1,D] of its end once all is read, else None; a cache of so many slots;
    how many positions were remembered). slots: room for the longest prompt and BUCKET more, for a chunk is padded. old:
    a cache that this has given before and that nobody needs any more."""
    if old is None:
        cache = empty(trained.model, 1, slots)
    else:
        cache = _emptied(trained.model, old.k, old.v, old.cursor + decode.BUCKET)
    remembered, keys = 0, []
    for chunk in chunks(document, read, trained.layout):
        last = chunk.stop == len(document)
        keys.append(chunk.key)
        part = prefixes.get(chunk)
        if part is not None:
            cache, remembered = _put(cache, part.cache, chunk.start), remembered + chunk.stop - chunk.start
            hidden = part.hidden
        else:
            model = trained.model.clone(layout=chunk.layout)
            hidden, cache = read_chunk(model, trained.params, chunk.batch, cache)
            if prefixes.most:
                prefixes.put(chunk, Part(_taken(cache, chunk.start, chunk.batch.tokens.shape[1]), hidden))
        if last:
            prefixes.touch(keys[::-1])  # what others, too, begin with is worth more than how this one ends
        if last or part is None:
            yield hidden if last else None, cache, remembered
