"""The row plan (which documents fill which row) and the filling of rows.

Plan first, decode later: the plan is a pure function of (seed, epoch, lengths), so a row number is a data position, and
a host makes only its own rows.
"""

import bisect
import functools
import math
import threading
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data.chat import Document, Medium
from gpt4v_jax.data.transforms import BadMedium

OPEN_ROWS = 32  # rows that wait for a document that still fits
NOTHING = ("there is no record to train on, or none that a row can hold: raise model.context (of what an encoder reads "
           "model.source_context), and of its media config.data.image, video, audio (per_row, patches)")  # fmt: skip


def plan_epoch(needs: np.ndarray, layout: batch_lib.Layout, seed: int | None, epoch: int) -> list[list[int]]:
    """-> rows, each a list of document numbers: first fit, in an order drawn from (seed, epoch); seed None: in order.

    needs [n, len(Layout.room)]: what each document takes of a row (chat.needs). One that no row can hold is in none.
    """
    room = np.array(layout.room)
    order = np.arange(len(needs))
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(order)
    rows: list[list[int]] = []
    left = np.zeros((OPEN_ROWS, len(room)), int)  # of the open rows, the oldest first
    documents: list[list[int]] = []
    for i in order[fits(needs, layout)[order]]:
        fitting = (left[: len(documents)] >= needs[i]).all(1)
        k = int(fitting.argmax()) if fitting.any() else len(documents)
        if k == OPEN_ROWS:
            fullest = int(left[:, 0].argmin())
            rows.append(documents.pop(fullest))
            left[fullest:-1] = left[fullest + 1 :]
            k -= 1
        if k == len(documents):
            documents.append([])
            left[k] = room
        left[k] -= needs[i]
        documents[k].append(int(i))
    return rows + documents


def fits(needs: np.ndarray, layout: batch_lib.Layout) -> np.ndarray:
    """-> [n] bool: which documents a row can hold. media are never cut: what does not fit is left out, and counted."""
    return (needs.reshape(-1, len(layout.room)) <= np.array(layout.room)).all(1)


def used(needs: np.ndarray, layout: batch_lib.Layout, rows: list[list[int]]) -> dict[str, float]:
    """-> the share of the rows' positions, and of each modality's patches, that documents take."""
    total = needs[[i for row in rows for i in row]].sum(0) / max(len(rows), 1)
    room = layout.room
    media = (name for m in batch_lib.MEDIA for name in (f"{m} items", f"{m} patches"))
    names = ("positions", *media, *(["source"] if layout.source else []))
    return {name: float(total[k] / room[k]) for k, name in enumerate(names) if room[k] and not name.endswith("items")}


class RowPlan:
    """Numbers all rows of all epochs. `locate(row)` -> (epoch, its document numbers).

    needs(epoch) -> what the documents take of a row (chat.needs), which may differ between epochs.
    """

    def __init__(self, needs: Callable[[int], np.ndarray], layout: batch_lib.Layout, seed: int | None):
        self._plan = functools.lru_cache(maxsize=4)(lambda e: plan_epoch(needs(e), layout, seed, e))
        self._starts = [0]  # first row of each epoch
        self._lock = threading.Lock()  # grain's reading threads share the plan

    def epoch(self, epoch: int) -> list[list[int]]:
        """-> its rows, each a list of document numbers."""
        with self._lock:
            return self._plan(epoch)

    def locate(self, row: int) -> tuple[int, list[int]]:
        with self._lock:
            while self._starts[-1] <= row:
                rows = len(self._plan(len(self._starts) - 1))
                if not rows:
                    raise config.InputError(NOTHING)
                self._starts.append(self._starts[-1] + rows)
            epoch = bisect.bisect_right(self._starts, row) - 1
            return epoch, self._plan(epoch)[row - self._starts[epoch]]


Patches = tuple[np.ndarray, np.ndarray]  # of one View: values [m,p] and index [m,3]


def fill(documents: Sequence[Document], read: Callable[[Medium], Sequence[Patches]], layout: batch_lib.Layout):
    """Documents -> one row of a Batch (its arrays without the leading B).

    read(medium) -> its views' patches, as Layout.views counts them; where it raises BadMedium the document stays out:
    its positions are padding. Raises ValueError where a trained target would be visible to its own query.
    """
    row = jax.tree.map(lambda x: x[0], batch_lib.empty(layout, 1))
    documents = [part for doc in documents for part in (doc, doc.pair) if part is not None]
    start, read_to, pairs, media_filler = 0, 0, 0, _Media(row, layout)
    for number, doc in enumerate(documents, 1):
        at, asked = slice(start, start + len(doc)), slice(read_to, read_to + len(doc.source))
        start, read_to = at.stop, asked.stop
        if layout.prefix == "all" and doc.ar.any():
            raise config.InputError("these documents are causal, and model.causal=False: such a model learns by "
                                    "data.objective='masked', and is evaluated by 'masked'")
        if doc.shifted and (doc.weight[:-1] * (~doc.ar[1:])).any():
            raise ValueError(f"document {number}: a trained target lies inside a block, where its query sees it")
        if (block := longest_block(doc)) > layout.reach + 1:
            raise config.InputError(f"document {number}: a block of {block} positions, and a query sees {layout.reach} "
                                    "ahead: name the objective in data.objective of the run that is trained")
        try:
            media = [(first, medium, read(medium)) for first, medium in doc.media]
        except BadMedium:  # who reads it has counted it
            pairs += doc.pair is not None
            continue
        row.tokens[at], row.target[at], row.weight[at], row.ar[at] = doc.tokens, doc.target, doc.weight, doc.ar
        row.position[at], row.document[at] = positions(len(doc), () if doc.source else doc.media, layout), number
        if doc.pair is not None:
            row.pair.medium[pairs], row.pair.text[pairs] = start - 1, start + len(doc.pair) - 1
            row.pair.id[pairs] = zlib.crc32(doc.pair.tokens.tobytes()) >> 1
            pairs += 1
        if doc.source:
            next_to = at.start + np.array(doc.source_at or (0,) * len(doc.source))
            row.source.tokens[asked], row.source.document[asked], row.source.at[asked] = doc.source, number, next_to
            row.source.position[asked] = positions(len(doc.source), doc.media, layout)
        for first, medium, views in media:
            if doc.source:
                media_filler.place(medium, views, row.source.slot, asked.start + first, int(next_to[first]))
            else:
                media_filler.place(medium, views, row.slot, at.start + first)
    ids = np.concatenate([row.tokens, row.target, *([row.source.tokens] if layout.source else [])])
    if ids.min() < 0 or ids.max() >= layout.vocab:
        odd = ids[(ids < 0) | (ids >= layout.vocab)][0]
        raise config.InputError(f"token id {odd} is outside the vocabulary of {layout.vocab}: is it this tokenizer's?")
    return row


class _Media:
    """Fills the media of one row, and the slots of their positions, one medium after the other."""

    def __init__(self, row: batch_lib.Batch, layout: batch_lib.Layout):
        self._row, self._layout = row, layout
        self._items, self._patches, self._features = (dict.fromkeys(batch_lib.MEDIA, 0) for _ in range(3))

    def place(self, medium: Medium, views: Sequence[Patches], slot: np.ndarray, here: int, at: int | None = None):
        """slot: of the stream or of the source, where the medium begins at `here`; at: stream index that its items are
        known by; None: where each begins."""
        name, layout = medium.modality, self._layout
        expected, made = sum(map(len, layout.views(name, medium.shape))), sum(len(patch) for patch, _ in views)
        if expected != made:
            raise ValueError(f"{medium}: {made} patches for {expected} positions")
        packed, anchor = getattr(self._row, name), layout.place == "memory"
        grids = layout.laid(name, medium.shape)
        for i, (patch, index) in enumerate(views):
            k, taken = self._items[name], slice(self._patches[name], self._patches[name] + len(patch))
            packed.patch[taken], packed.index[taken], packed.item[taken] = patch, index, k + 1
            packed.at[k], packed.size[k] = here if at is None else at, index.max(axis=0) + 1
            self._items[name], self._patches[name] = k + 1, taken.stop
            if not anchor:
                first, count = self._features[name], math.prod(grids[i])
                slot[here : here + count] = layout.offset(name) + np.arange(first, first + count)
                self._features[name], here = first + count, here + count


def longest_block(doc: Document) -> int:
    """-> positions of the longest block, which see each other."""
    opens = doc.ar.copy()
    opens[:1] = True
    return int(np.diff([*np.flatnonzero(opens), len(doc)]).max(initial=0))


def positions(n: int, media: Sequence[tuple[int, Medium]], layout: batch_lib.Layout) -> np.ndarray:
    """-> [n, Layout.axes]: 0, 1, 2, ...; over three axes a patch of a medium that begins at position s stands at
    s + its (time, row, column), and what follows it at one more than its largest (Wang et al. 2024, Qwen2-VL)."""
    if layout.axes == 1:
        return np.arange(n)[:, None]
    out, at, now = np.zeros((n, 3), np.int32), 0, 0
    for first, medium in media:
        out[at:first] = (now + np.arange(first - at))[:, None]
        now, at = now + first - at, first
        for grid in layout.laid(medium.modality, medium.shape):
            size = math.prod(grid)
            out[at : at + size] = now + np.indices(grid).reshape(3, -1).T
            now, at = now + max(grid), at + size
    out[at:] = (now + np.arange(n - at))[:, None]
    return out


def stack(rows: Sequence[batch_lib.Batch]) -> batch_lib.Batch:
    return jax.tree.map(lambda *x: np.stack(x), *rows)
