"""The row plan and the filling of rows."""

import dataclasses
import itertools

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import packing
from gpt4v_jax.data.transforms import BadMedium
from tests import tiny

LAYOUT = batch_lib.layout(tiny.make_config(context=24), tiny.DATA)
MIXED = batch_lib.layout(tiny.make_config(context=64, media=True), tiny.DATA)


def some_needs(n=200, seed=0) -> np.ndarray:
    """What n documents of LAYOUT take of a row: positions, pictures, patches."""
    rng = np.random.default_rng(seed)
    lengths, items = rng.integers(1, 25, n), rng.integers(0, 3, n)
    return np.stack([lengths, items, 4 * items, *[0 * items] * 4], axis=1)


def need(*taken) -> np.ndarray:
    return np.array([[*some, *[0] * (7 - len(some))] for some in taken])


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_every_document_once_and_no_row_overfull(seed):
    needs = some_needs()
    rows = packing.plan_epoch(needs, LAYOUT, seed, epoch=0)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all((needs[row].sum(0) <= (24, 2, 8, 0, 0, 0, 0)).all() for row in rows)
    assert len(rows) < 0.75 * 200  # it does pack: one document a row would be 200
    share = packing.used(needs, LAYOUT, rows)
    assert share == {
        "positions": pytest.approx(needs[:, 0].sum() / (24 * len(rows))),
        "image patches": pytest.approx(needs[:, 2].sum() / (8 * len(rows))),
    }


@pytest.mark.parametrize("k", range(7))
def test_each_of_a_row_s_budgets_alone_bounds_it(k):
    """Positions, and items and patches of each modality: documents of which two fit by this one, and more by all."""
    room = np.array(MIXED.room)
    assert (room == (64, 2, 8, 2, 16, 2, 8)).all()
    needs = np.zeros((12, 7), int)
    needs[:, k] = room[k] // 2
    rows = packing.plan_epoch(needs, MIXED, seed=1, epoch=0)
    assert [len(row) for row in rows] == [2] * 6 and sorted(sum(rows, [])) == list(range(12))
    needs[5, k] = room[k] + 1
    assert packing.fits(needs, MIXED).tolist() == [i != 5 for i in range(12)]


def test_rows_that_wait_are_closed_when_there_are_too_many():
    """First fit over so many open rows; then the fullest is closed. In order, against the same by hand."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(9, 25, 300)
    needs = need(*((n,) for n in lengths))
    closed, waiting = [], []
    for i, n in enumerate(lengths):
        row = next((row for row in waiting if sum(lengths[row]) + n <= 24), None)
        if row is None:
            if len(waiting) == packing.OPEN_ROWS:
                fullest = max(waiting, key=lambda row: sum(lengths[row]))
                waiting.remove(fullest)
                closed.append(fullest)
            row = []
            waiting.append(row)
        row.append(i)
    assert len(closed) > 20
    assert packing.plan_epoch(needs, LAYOUT, None, 0) == closed + waiting


def test_the_plan_depends_on_seed_and_epoch_alone():
    needs = some_needs()

    def plan(seed, epoch):
        return packing.plan_epoch(needs, LAYOUT, seed, epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1) != plan(1, 1)
    assert plan(None, 0) == plan(None, 3)


def test_rows_are_numbered_across_epochs():
    def needs(epoch):
        return some_needs(50 + epoch, epoch)

    plan = packing.RowPlan(needs, LAYOUT, seed=3)
    expected = [
        (epoch, row) for epoch in range(3) for row in packing.plan_epoch(needs(epoch), LAYOUT, 3, epoch)
    ]
    assert [plan.locate(r) for r in range(len(expected))] == expected
    assert [(e, row) for e in range(3) for row in plan.epoch(e)] == expected
    late = packing.RowPlan(needs, LAYOUT, seed=3)
    assert late.locate(len(expected) - 1) == expected[-1]  # without the rows before it
    assert late.locate(0) == expected[0]


def test_what_no_row_can_hold():
    """It is left out, whole; where nothing is left, that is said."""
    needs = need((3,), (25,), (24, 2, 8), (4, 3, 8), (4, 1, 9), (4, 0, 0, 1, 1), (24,))
    rows = packing.plan_epoch(needs, LAYOUT, 0, 0)
    assert sorted(sum(rows, [])) == [0, 2, 6] and all(needs[row, 0].sum() <= 24 for row in rows)
    assert packing.fits(needs, LAYOUT).tolist() == [True, False, True, False, False, False, True]
    for nothing in (needs[[1, 3, 4, 5]], needs[:0]):
        assert packing.plan_epoch(nothing, LAYOUT, 0, 0) == []
        with pytest.raises(config.InputError, match="no record to train on.*model.context.*per_row, patches"):
            packing.RowPlan(lambda epoch, n=nothing: n, LAYOUT, 0).locate(0)


def test_fill():
    documents = [tiny.document("U1 A1", LAYOUT), tiny.document("U1 I A2", LAYOUT)]
    row = packing.fill(documents, tiny.reader(LAYOUT), LAYOUT)
    np.testing.assert_array_equal(row.document, [1] * 5 + [2] * 10 + [0] * 9)
    np.testing.assert_array_equal(row.position[:, 0], [*range(5), *range(10), *[0] * 9])
    np.testing.assert_array_equal(row.slot, [-1] * 7 + [0, 1, 2, 3] + [-1] * 13)
    np.testing.assert_array_equal(row.image.at, [7, -1])
    np.testing.assert_array_equal(row.image.item, [1] * 4 + [0] * 4)
    np.testing.assert_array_equal(row.image.index[:4], [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    medium = tiny.pieces("U1 I A2")[1].medium
    ((patches, _),) = tiny.reader(LAYOUT)(medium)
    np.testing.assert_array_equal(row.image.patch[:4], patches)
    assert (row.tokens[row.slot >= 0] == tiny.SPECIAL["<image>"]).all()
    assert row.weight.sum() == 2 + 3 and row.weight[4] == row.weight[14] == 0  # the last token of each predicts nothing


def test_fill_with_every_modality():
    """Each position of a medium names the feature that its own medium's patch becomes; patches are in order."""
    words = ["I V A1 S5 A1", "S3 U1 I A2"]
    documents = [tiny.document(text, MIXED, seed=i) for i, text in enumerate(words)]
    row, read = packing.fill(documents, tiny.reader(MIXED), MIXED), tiny.reader(MIXED)
    assert row.video.patch.dtype == np.uint8 and row.audio.patch.dtype == np.float32
    starts, found = {"image": 0, "video": 8, "audio": 24}, []  # budgets 8, 16, 8: features one modality after another
    for number, start in ((1, 0), (2, len(documents[0]))):
        for first, medium in documents[number - 1].media:
            found.append((medium.modality, start + first))
            media, item = getattr(row, medium.modality), sum(m == medium.modality for m, _ in found)
            ((patches, index),) = read(medium)
            slots = row.slot[start + first : start + first + len(patches)] - starts[medium.modality]
            np.testing.assert_array_equal(media.patch[slots], patches)
            np.testing.assert_array_equal(media.index[slots], index)
            assert (media.item[slots] == item).all() and media.at[item - 1] == start + first
            assert (row.document[start + first : start + first + len(patches)] == number).all()
    assert len(found) == 5
    used = {name: sum(m == name for m, _ in found) for name in starts}
    assert used == {"image": 2, "video": 1, "audio": 2}
    assert all((getattr(row, name).at[n:] == -1).all() for name, n in used.items())
    assert (row.video.item == [1] * 8 + [0] * 8).all() and (row.audio.item == [1] * 3 + [2] * 2 + [0] * 3).all()
    assert len(set(row.slot[row.slot >= 0])) == (row.slot >= 0).sum() == 8 + 8 + 5


def test_positions_over_three_axes():
    """Text counts on; a patch is at its medium's start plus (time, row, column); what follows, after the largest."""
    layout = batch_lib.layout(tiny.make_config(context=64, media=True, axes=3, width=12, heads=2), tiny.DATA)
    document = tiny.document("U1 I V S5 A1", layout)
    row = packing.fill([document], tiny.reader(layout), layout)
    expected = [(0,) * 3, (1,) * 3]
    for now, grid in ((2, (1, 2, 2)), (4, (2, 2, 2)), (6, (3, 1, 1))):
        expected += [tuple(now + i for i in at) for at in itertools.product(*map(range, grid))]
    expected += [(9,) * 3, (10,) * 3, (11,) * 3]
    np.testing.assert_array_equal(row.position[: len(document)], expected)
    assert (row.position[len(document) :] == 0).all()


def test_a_document_with_a_bad_medium_stays_out():
    """Its positions are padding, and its place in the row is kept: the others are as they would be beside it."""
    documents = [tiny.document(text, LAYOUT, seed=i) for i, text in enumerate(("U1 A1", "I A1", "I U1 A1"))]
    bad = documents[1].media[0][1]
    real = tiny.reader(LAYOUT)

    def read(medium):
        if medium == bad:
            raise BadMedium("torn")
        return real(medium)

    layout = dataclasses.replace(LAYOUT, context=32)
    whole, row = packing.fill(documents, real, layout), packing.fill(documents, read, layout)
    out = whole.document == 2
    for name in ("tokens", "document", "target", "weight", "position"):
        assert not getattr(row, name)[out].any() and getattr(whole, name)[out].any(), name
        np.testing.assert_array_equal(getattr(row, name)[~out], getattr(whole, name)[~out])
    assert row.ar[out].all() and (row.slot[out] == -1).all()
    np.testing.assert_array_equal(row.image.at, [whole.image.at[1], -1])
    np.testing.assert_array_equal(row.image.patch[row.slot[row.slot >= 0]], whole.image.patch[4:])


def test_patches_that_are_not_those_that_were_laid_are_refused():
    document, real = tiny.document("I A1", LAYOUT), tiny.reader(LAYOUT)
    with pytest.raises(ValueError, match="3 patches for 4 positions"):
        packing.fill([document], lambda medium: [tuple(x[:3] for x in real(medium)[0])], LAYOUT)


def test_a_trained_target_in_a_block_is_refused():
    document = tiny.document("U2 A3", LAYOUT)
    ar = document.ar.copy()
    ar[5] = False  # in the answer: position 4 would see the token that it is to predict
    with pytest.raises(ValueError, match="document 1: a trained target lies inside a block"):
        packing.fill([dataclasses.replace(document, ar=ar)], tiny.reader(LAYOUT), LAYOUT)


@pytest.mark.parametrize("field", ["tokens", "target"])
@pytest.mark.parametrize("odd", [tiny.VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_refused(field, odd):
    document = tiny.document("U2 A3", LAYOUT)
    ids = getattr(document, field).copy()
    ids[4] = odd
    with pytest.raises(config.InputError, match=f"token id {odd} is outside the vocabulary of {tiny.VOCAB}"):
        packing.fill([dataclasses.replace(document, **{field: ids})], tiny.reader(LAYOUT), LAYOUT)
