"""Which documents the records of a data set become."""

import collections
import dataclasses

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from tests import tiny

LAYOUT = batch_lib.layout(tiny.make_config(context=96), config.Data())


@pytest.fixture(scope="module")
def tokenizer(digits_world):
    return tokenizer_lib.train("bpe", sources.corpus(digits_world), digits_world.vocab)


def read(data, tokenizer, epoch, seed=0):
    """-> (the source, {record: what its documents' assistant says})."""
    source = sources.from_records(sources.open_split(data, "train"), data, tokenizer, LAYOUT, seed)
    said = collections.defaultdict(list)
    for i in range(len(source.sizes(epoch)[0])):
        first, *rest = source.pieces(epoch, i)
        said[first.picture].append([tokenizer.decode(p.ids) for p in rest if p.role == "assistant"])
    return source, said


def test_a_record_is_captions_in_documents_of_their_own_and_one_of_questions(digits_world, tokenizer):
    data = dataclasses.replace(digits_world, captions=2, turns=3, limit=20)
    records = sources.open_split(data, "train")
    source, said = read(data, tokenizer, epoch=0)
    assert sorted(said) == list(range(20))
    for number, documents in said.items():
        asked, *captions = documents
        answers = {answer for _, _, answer in sources.questions(records[number])}
        known = {sources.text_of(c) for c in records[number]["captions"]}
        assert len(asked) == 3 and set(asked) <= answers
        assert len(captions) == min(2, len(known)) and len({c for c, in captions}) == len(captions)
        assert {c for c, in captions} <= known
    lengths, media = source.sizes(0)
    assert list(lengths) == [len(source.document(0, i)) for i in range(len(lengths))] and set(media) == {1}


def test_what_is_drawn_depends_on_seed_and_epoch(digits_world, tokenizer):
    data = dataclasses.replace(digits_world, captions=1, turns=3, limit=20)
    first = read(data, tokenizer, epoch=0)[1]
    assert first == read(data, tokenizer, epoch=0)[1]
    assert first != read(data, tokenizer, epoch=1)[1] and first != read(data, tokenizer, epoch=0, seed=1)[1]


def test_blank_pictures_are_grey(digits_world, tokenizer):
    """All that the blind baseline sees; its texts and the plan of its rows are those of real pictures."""
    few = dataclasses.replace(digits_world, limit=4)
    real, blank = (read(dataclasses.replace(few, pictures=name), tokenizer, 0) for name in ("real", "blank"))
    assert real[1] == blank[1] and (real[0].sizes(0)[0] == blank[0].sizes(0)[0]).all()
    assert all((blank[0].picture(i) == 128).all() and real[0].picture(i).std() > 1 for i in range(4))


def test_windows_read_a_text_once_an_epoch():
    ids = np.arange(1000) % 7 + np.arange(1000) // 7
    layout = batch_lib.layout(tiny.make_config(size=0, context=24), config.Data())
    fixed = sources.Windows(ids, layout, seed=None)
    assert set(fixed.sizes(0)[0]) == {24} and len(fixed.sizes(0)[0]) == 999 // 24
    for i in range(999 // 24):  # no overlap, no gap, and the target is the token that follows
        document = fixed.document(0, i)
        np.testing.assert_array_equal(document.tokens, ids[24 * i : 24 * i + 24])
        np.testing.assert_array_equal(document.target, ids[24 * i + 1 : 24 * i + 25])
        assert (document.weight == 1).all() and document.ar.all()
    drawn = sources.Windows(ids, layout, seed=3)
    starts = set()
    for epoch in range(8):
        count = len(drawn.sizes(epoch)[0])
        read_ = np.concatenate([drawn.document(epoch, i).tokens for i in range(count)])
        start = next(s for s in range(24) if (ids[s : s + len(read_)] == read_).all())
        starts.add(start)
        assert start + len(read_) + 1 + 24 > len(ids)  # to the last whole window
    assert len(starts) > 3
    with pytest.raises(config.InputError, match="too few for two windows of 24"):
        sources.Windows(ids[:40], layout, seed=None)


def test_no_questions_leaves_the_captions(digits_world, tokenizer):
    source, said = read(dataclasses.replace(digits_world, turns=0, captions=1, limit=20), tokenizer, epoch=0)
    assert len(source.sizes(0)[0]) == 20 and all(len(documents) == 1 for documents in said.values())


def test_no_captions_leaves_the_questions(digits_world, tokenizer):
    source, said = read(dataclasses.replace(digits_world, captions=0, limit=20), tokenizer, epoch=0)
    assert all(len(documents) == 1 for documents in said.values())
    items = sources.Questions(source).items
    assert len(items) == sum(len(turns) for turns in source.turns) and "caption" not in {t.kind for _, t in items}
