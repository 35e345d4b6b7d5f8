"""The row plan and the filling of rows."""

import dataclasses

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import packing
from tests import tiny

LAYOUT = batch_lib.layout(tiny.make_config(context=24), config.Data(media=2))


def sizes(n=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 25, n), rng.integers(0, 3, n)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_every_document_once_and_no_row_overfull(seed):
    lengths, items = sizes()
    rows = packing.plan_epoch(lengths, items, LAYOUT, seed, epoch=0)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(lengths[row].sum() <= 24 and items[row].sum() <= 2 for row in rows)
    assert len(rows) < 0.75 * 200  # it does pack: one document a row would be 200


def test_the_plan_depends_on_seed_and_epoch_alone():
    lengths, items = sizes()

    def plan(seed, epoch):
        return packing.plan_epoch(lengths, items, LAYOUT, seed, epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1) != plan(1, 1)
    assert plan(None, 0) == plan(None, 3)


def test_rows_are_numbered_across_epochs():
    plan = packing.RowPlan(lambda epoch: sizes(50 + epoch, epoch), LAYOUT, seed=3)
    expected = [
        (epoch, row) for epoch in range(3) for row in packing.plan_epoch(*sizes(50 + epoch, epoch), LAYOUT, 3, epoch)
    ]
    assert [plan.locate(r) for r in range(len(expected))] == expected
    late = packing.RowPlan(lambda epoch: sizes(50 + epoch, epoch), LAYOUT, seed=3)
    assert late.locate(len(expected) - 1) == expected[-1]  # without the rows before it
    assert late.locate(0) == expected[0]


def test_what_no_row_can_hold():
    with pytest.raises(config.InputError, match="document 1 needs 25 positions, model.context=24"):
        packing.plan_epoch(np.array([3, 25]), np.array([0, 0]), LAYOUT, 0, 0)
    with pytest.raises(config.InputError, match="3 media, data.media=2"):
        packing.plan_epoch(np.array([3, 4]), np.array([3, 0]), LAYOUT, 0, 0)
    with pytest.raises(config.InputError, match="no record"):
        packing.RowPlan(lambda epoch: (np.array([], int), np.array([], int)), LAYOUT, 0).locate(0)


def test_fill():
    row = packing.fill([tiny.document("U1 A1", LAYOUT), tiny.document("U1 I A2", LAYOUT)], tiny.picture, LAYOUT)
    np.testing.assert_array_equal(row.document, [1] * 5 + [2] * 10 + [0] * 9)
    np.testing.assert_array_equal(row.position[:, 0], [*range(5), *range(10), *[0] * 9])
    np.testing.assert_array_equal(row.slot, [-1] * 8 + [0, 1, 2, 3] + [-1] * 12)
    np.testing.assert_array_equal(row.image.at, [8, -1])
    np.testing.assert_array_equal(row.image.item, [1] * 4 + [0] * 4)
    np.testing.assert_array_equal(row.image.index[:4], [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    key = tiny.pieces("U1 I A2")[1].picture
    np.testing.assert_array_equal(row.image.patch[2], tiny.picture(key)[2:, :2].ravel())
    assert row.weight.sum() == 2 + 3 and row.weight[4] == row.weight[14] == 0  # the last token of each predicts nothing


def test_a_trained_target_in_a_block_is_refused():
    document = tiny.document("U2 A3", LAYOUT)
    ar = document.ar.copy()
    ar[5] = False  # in the answer: position 4 would see the token that it is to predict
    with pytest.raises(ValueError, match="document 1: a trained target lies inside a block"):
        packing.fill([dataclasses.replace(document, ar=ar)], tiny.picture, LAYOUT)


@pytest.mark.parametrize("field", ["tokens", "target"])
@pytest.mark.parametrize("odd", [tiny.VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_refused(field, odd):
    document = tiny.document("U2 A3", LAYOUT)
    ids = getattr(document, field).copy()
    ids[4] = odd
    with pytest.raises(config.InputError, match=f"token id {odd} is outside the vocabulary of {tiny.VOCAB}"):
        packing.fill([dataclasses.replace(document, **{field: ids})], tiny.picture, LAYOUT)
