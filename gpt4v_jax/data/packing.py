"""The row plan (which documents fill which row) and the filling of rows.

Plan first, decode later: the plan is a pure function of (seed, epoch, lengths), so a row number is a data position, and
a host makes only its own rows.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data.chat import Document

OPEN_ROWS = 32  # rows that wait for a document that still fits


def plan_epoch(lengths: np.ndarray, items: np.ndarray, layout: batch_lib.Layout, seed: int | None, epoch: int):
    """-> rows, each a list of document numbers: first fit, in an order drawn from (seed, epoch); seed None: in order.

    lengths [n]: positions of each document; items [n]: its media. Raises InputError for one that no row can hold.
    """
    if len(lengths) and lengths.max() > layout.context:
        worst = int(lengths.argmax())
        raise config.InputError(
            f"document {worst} needs {lengths[worst]} positions, model.context={layout.context} has room for fewer: "
            "raise it, or lower data.turns"
        )
    if len(items) and items.max() > layout.items:
        raise config.InputError(f"a document has {items.max()} media, data.media={layout.items}: raise it")
    order = np.arange(len(lengths))
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(order)
    rows, open_rows = [], []  # open: [positions left, items left, documents]
    for i in order:
        for row in open_rows:
            if row[0] >= lengths[i] and row[1] >= items[i]:
                break
        else:
            if len(open_rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=lambda k: open_rows[k][0])
                rows.append(open_rows.pop(fullest)[2])
            row = [layout.context, layout.items, []]
            open_rows.append(row)
        row[0] -= lengths[i]
        row[1] -= items[i]
        row[2].append(int(i))
    return rows + [row[2] for row in open_rows]


class RowPlan:
    """Numbers all rows of all epochs. `locate(row)` -> (epoch, its document numbers).

    sizes(epoch) -> (lengths, items) of the documents, which may differ between epochs.
    """

    def __init__(self, sizes: Callable[[int], tuple], layout: batch_lib.Layout, seed: int | None):
        self._plan = functools.lru_cache(maxsize=4)(lambda e: plan_epoch(*sizes(e), layout, seed, e))
        self._starts = [0]  # first row of each epoch
        self._lock = threading.Lock()  # grain's reading threads share the plan

    def locate(self, row: int) -> tuple[int, list[int]]:
        with self._lock:
            while self._starts[-1] <= row:
                rows = len(self._plan(len(self._starts) - 1))
                if not rows:
                    raise config.InputError("the data set has no record to train on")
                self._starts.append(self._starts[-1] + rows)
            epoch = bisect.bisect_right(self._starts, row) - 1
            return epoch, self._plan(epoch)[row - self._starts[epoch]]


def fill(documents: Sequence[Document], picture: Callable[[int], np.ndarray], layout: batch_lib.Layout):
    """Documents -> one row of a Batch (its arrays without the leading B).

    picture(key) -> uint8 [size, size, 3]. Raises ValueError where a trained target would be visible to its own query.
    """
    row = jax.tree.map(lambda x: x[0], batch_lib.empty(layout, 1))
    start, items, patches, read = 0, 0, layout.grid**2, 0
    for number, doc in enumerate(documents, 1):
        n, at = len(doc), slice(start, start + len(doc))
        if bool(layout.source) != bool(doc.source) or layout.prefix == "all" and doc.ar.any():
            raise config.InputError(
                "these data are one causal stream: there is no training or scoring on them yet for a model with a "
                "separate encoder (model.source) or a bidirectional stream (model.causal=False)"
            )
        if (doc.weight[:-1] * (~doc.ar[1:])).any():
            raise ValueError(f"document {number}: a trained target lies inside a block, where its query sees it")
        row.tokens[at], row.target[at], row.weight[at], row.ar[at] = doc.tokens, doc.target, doc.weight, doc.ar
        row.position[at, 0], row.document[at] = np.arange(n), number
        for first, key in doc.pictures:
            slots = slice(items * patches, (items + 1) * patches)
            row.image.patch[slots] = patchify(picture(key), layout.patch)
            row.image.index[slots, 1:] = np.indices((layout.grid, layout.grid)).reshape(2, -1).T
            row.image.item[slots] = items + 1
            row.image.at[items] = start + first
            row.slot[start + first : start + first + patches] = np.arange(slots.start, slots.stop)
            items += 1
        start += n
        if doc.source:
            at = slice(read, read + len(doc.source))
            row.source.tokens[at], row.source.document[at] = doc.source, number
            row.source.position[at, 0] = np.arange(len(doc.source))
            read = at.stop
    ids = np.concatenate([row.tokens, row.target, *([row.source.tokens] if layout.source else [])])
    if ids.min() < 0 or ids.max() >= layout.vocab:
        odd = ids[(ids < 0) | (ids >= layout.vocab)][0]
        raise config.InputError(f"token id {odd} is outside the vocabulary of {layout.vocab}: is it this tokenizer's?")
    return row


def patchify(picture: np.ndarray, patch: int) -> np.ndarray:
    """[size, size, 3] -> [rows x columns of whole patches, patch x patch x 3], row by row."""
    grid = picture.shape[0] // patch
    tiles = picture[: grid * patch, : grid * patch].reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(grid * grid, patch * patch * 3)


def stack(rows: Sequence[batch_lib.Batch]) -> batch_lib.Batch:
    return jax.tree.map(lambda *x: np.stack(x), *rows)
