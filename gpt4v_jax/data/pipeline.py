"""Rows -> batches: a grain dataset over step numbers, so that the data position is one integer, the step."""

from collections.abc import Iterator

import grain
import jax

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
) -> Iterator[batch_lib.Batch]:
    """-> this host's share of the batches of steps start, ..., stop - 1; step s holds rows s x rows and on.

    What a step holds does not depend on `start`, the number of hosts or the threads. Raises InputError for a batch in
    which no token is trained.
    """
    hosts = jax.process_count()
    share = rows // hosts

    def make(step: int) -> batch_lib.Batch:
        first = step * rows + jax.process_index() * share
        filled = []
        for row in range(first, first + share):
            epoch, documents = plan.locate(row)
            filled.append(packing.fill([source.document(epoch, i) for i in documents], source.picture, layout))
        batch = packing.stack(filled)
        if not batch.weight.any():
            raise config.InputError(f"step {step}: no token of the batch is trained; do its records have answers?")
        return batch

    dataset = grain.MapDataset.range(start, stop).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def all_rows(source, layout: batch_lib.Layout, rows: int) -> Iterator[tuple[batch_lib.Batch, list[list[int]]]]:
    """Every document once, in order: -> (batch, the documents of each of its rows); the last batch is filled up."""
    lengths, items = source.sizes(0)
    plan = packing.plan_epoch(lengths, items, layout, seed=None, epoch=0)
    for first in range(0, len(plan), rows):
        part = plan[first : first + rows]
        part += [[]] * (rows - len(part))
        filled = [packing.fill([source.document(0, i) for i in row], source.picture, layout) for row in part]
        yield packing.stack(filled), part
