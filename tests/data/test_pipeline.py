"""The data position is one integer: what a step holds depends on nothing else."""

import jax
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing, pipeline
from tests import tiny

LAYOUT = batch_lib.layout(tiny.make_config(context=24), tiny.DATA)


class Source:
    """Documents of several lengths, which change with the epoch."""

    def __init__(self, texts=("U1 A2", "I U2 A3", "U4 A6", "U1 I A1", "U2 A1 U1 A1", "I I U1 A1")):
        self.texts = texts
        self.decoded = []

    def read(self, medium):
        self.decoded.append(medium.key)
        return tiny.reader(LAYOUT)(medium)

    def document(self, epoch, i):
        return tiny.document(self.texts[i], LAYOUT, seed=epoch * 100 + i)

    def needs(self, epoch):
        return np.array([chat.needs(tiny.pieces(text, epoch * 100 + i), LAYOUT) for i, text in enumerate(self.texts)])


def stream(start, stop, threads=0, source=None, rows=2, share=None):
    source = source or Source()
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    return list(pipeline.batches(source, plan, LAYOUT, rows, start, stop, threads, share))


@pytest.mark.parametrize("start, threads", [(0, 2), (3, 0), (5, 2), (8, 0)])
def test_from_any_step_the_stream_is_the_same(start, threads):
    whole, part = stream(0, 8), stream(start, 8, threads)
    assert len(part) == 8 - start
    for expected, batch in zip(whole[start:], part, strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected, batch)
    assert any((whole[0].tokens != later.tokens).any() for later in whole[1:])


SHARES = {"halves": ([0, 1, 2], [3, 4, 5]), "interleaved": ([0, 1, 4], [2, 3, 5]), "rows": [[k] for k in range(6)]}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("start, threads", [(0, 0), (3, 2)])
def test_processes_share_one_stream(shares, start, threads):
    """Each fills its rows of it, and decodes the pictures of these alone."""
    whole, source = stream(start, 6, rows=6), Source()
    pictures = 0
    for share in shares:
        source.decoded.clear()
        for expected, batch in zip(whole, stream(start, 6, threads, source, 6, share), strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[share], y), expected, batch)  # noqa: B023
        here = sum(int((batch.image.at[share] >= 0).sum()) for batch in whole)
        assert len(source.decoded) == here
        pictures += here
    assert pictures == sum(int((batch.image.at >= 0).sum()) for batch in whole) > 10


def test_a_share_without_a_trained_token_is_no_error_where_the_batch_has_one():
    source = Source(texts=("I I U13", "U4 A16", "I I U12"))  # a row each
    trained = np.array([batch.weight.any(axis=1) for batch in stream(0, 2, source=source, rows=3)])
    assert trained.sum(axis=1).tolist() == [1, 1]
    idle = [k for k in range(3) if not trained[0][k]]
    source.decoded.clear()
    (batch,) = stream(0, 1, source=source, rows=3, share=idle[:1])
    assert not batch.weight.any() and len(source.decoded) == 2, "documents of others are looked at, not their pictures"
    with pytest.raises(config.InputError, match="step 0: no token of the batch is trained"):
        stream(0, 1, source=Source(texts=("I I U13", "I I U12")), rows=2, share=[1])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_without_a_trained_token_is_refused(threads):
    with pytest.raises(config.InputError, match="step 0: no token of the batch is trained"):
        stream(0, 2, threads, Source(texts=("U3", "I U1")))


def test_all_rows_reads_every_document_once():
    source, seen = Source(), []
    for batch, documents in pipeline.all_rows(source, LAYOUT, rows=4):
        assert batch.tokens.shape == (4, 24) and len(documents) == 4
        for row, numbers in enumerate(documents):
            seen += numbers
            for k, number in enumerate(numbers, 1):
                tokens = batch.tokens[row][batch.document[row] == k]
                np.testing.assert_array_equal(tokens, source.document(0, number).tokens)
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("share", [[0, 1], [3], [0, 2]])
def test_all_rows_of_a_share(share):
    """The documents of all rows are known, these alone are read."""
    whole, source = list(pipeline.all_rows(Source(), LAYOUT, rows=4)), Source()
    for (expected, documents), (batch, known) in zip(whole, pipeline.all_rows(source, LAYOUT, 4, share), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[share], y), expected, batch)
        assert known == documents and len(known) == 4
    assert len(source.decoded) == sum(int((batch.image.at[share] >= 0).sum()) for batch, _ in whole)
