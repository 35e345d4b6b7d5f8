"""Rows -> batches: a grain dataset over step numbers, so that the data position is one integer, the step."""

from collections.abc import Iterator, Sequence

import grain

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import packing


def batches(
    source,
    plan: packing.RowPlan,
    layout: batch_lib.Layout,
    rows: int,
    start: int,
    stop: int,
    threads: int = 0,
    share: Sequence[int] | None = None,
) -> Iterator[batch_lib.Batch]:
    """-> the batches of steps start, ..., stop - 1; step s holds rows s x rows and on of the stream.

    share: which of a batch's rows this process fills (sharding.local_rows), in this order; None: all. What a row holds
    does not depend on it, nor on `start` or the threads. Raises InputError for a batch in which no token is trained.
    """
    share = range(rows) if share is None else share

    def documents(row: int) -> list:
        epoch, numbers = plan.locate(row)
        return [source.document(epoch, i) for i in numbers]

    def make(step: int) -> batch_lib.Batch:
        first = step * rows
        batch = packing.stack([packing.fill(documents(first + int(k)), source.read, layout) for k in share])
        # Where a share trains nothing, the batch may: documents say so without their pictures.
        trains = batch.weight.any() or batch.pair is not None and (batch.pair.id >= 0).any()
        if not trains and not any(doc.pair or doc.weight.any() for k in range(rows) for doc in documents(first + k)):
            raise config.InputError(f"step {step}: no token of the batch is trained; do its records have answers?")
        return batch

    dataset = grain.MapDataset.range(start, stop).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def all_rows(
    source, layout: batch_lib.Layout, rows: int, share: Sequence[int] | None = None
) -> Iterator[tuple[batch_lib.Batch, list[list[int]]]]:
    """Every document that a row can hold once, in order: -> (batch, the documents of each of its `rows` rows); the last
    batch is filled up.

    share: the batch holds these rows alone, in this order; None: all.
    """
    plan = packing.plan_epoch(source.needs(0), layout, seed=None, epoch=0)
    for first in range(0, len(plan), rows):
        part = plan[first : first + rows]
        part += [[]] * (rows - len(part))
        mine = part if share is None else [part[k] for k in share]
        filled = [packing.fill([source.document(0, i) for i in row], source.read, layout) for row in mine]
        yield packing.stack(filled), part
