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


def number_of(medium) -> int:
    """-> the record whose picture it is; (its place in the record, the epoch by which it is augmented) are the rest."""
    (number, name), drawn = medium.key
    assert name == "image" and drawn == -1
    return number


def read(data, tokenizer, epoch, seed=0):
    """-> (the source, {record: what its documents' assistant says})."""
    source = sources.from_records(sources.open_split(data, "train"), data, tokenizer, LAYOUT, seed)
    said = collections.defaultdict(list)
    for i in range(len(source.needs(epoch))):
        first, *rest = source.pieces(epoch, i)
        assert first.medium.modality == "image" and not any(piece.medium for piece in rest)
        said[number_of(first.medium)].append([tokenizer.decode(p.ids) for p in rest if p.role == "assistant"])
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
    lengths, items, patches, *others = source.needs(0).T
    assert list(lengths) == [len(source.document(0, i)) for i in range(len(lengths))]
    assert set(items) == {1} and set(patches) == {4} and not np.any(others)


def test_what_is_drawn_depends_on_seed_and_epoch(digits_world, tokenizer):
    data = dataclasses.replace(digits_world, captions=1, turns=3, limit=20)
    first = read(data, tokenizer, epoch=0)[1]
    assert first == read(data, tokenizer, epoch=0)[1]
    assert first != read(data, tokenizer, epoch=1)[1] and first != read(data, tokenizer, epoch=0, seed=1)[1]


def test_blank_pictures_are_grey(digits_world, tokenizer):
    """All that the blind baseline sees; its texts and the plan of its rows are those of real pictures."""
    few = dataclasses.replace(digits_world, limit=4)
    real, blank = (read(dataclasses.replace(few, blank=names), tokenizer, 0) for names in ((), ("image",)))
    assert real[1] == blank[1]
    np.testing.assert_array_equal(real[0].needs(0), blank[0].needs(0))
    seen = set()
    for i in range(len(real[0].needs(0))):
        medium = blank[0].pieces(0, i)[0].medium
        assert medium == real[0].pieces(0, i)[0].medium
        ((grey, at),), ((patches, index),) = blank[0].read(medium), real[0].read(medium)
        np.testing.assert_array_equal(at, index)
        assert (grey == 128).all() and grey.dtype == patches.dtype == np.uint8 and patches.std() > 1
        seen.add(patches.tobytes())
    assert len(seen) == 4


@dataclasses.dataclass(frozen=True)
class Given:
    """A tokenizer of numbers: its text is "3 1 4"."""

    def encode(self, text):
        return list(map(int, text.split()))


def windows(ids, layout, seed, **data):
    return sources.Windows(" ".join(map(str, ids)), config.Data(name="numbers", **data), Given(), layout, seed)


@pytest.mark.parametrize("window", [0, 10, 99])  # 0: the context's; a wider one is the context's
def test_windows_read_a_text_once_an_epoch(window):
    ids, T = np.arange(1000) % 7 + np.arange(1000) // 7, window if window == 10 else 24
    layout = batch_lib.layout(tiny.make_config(size=0, context=24), config.Data())
    fixed = windows(ids, layout, None, window=window)
    np.testing.assert_array_equal(fixed.needs(0), [[T, *[0] * 6]] * (999 // T))
    for i in range(999 // T):  # no overlap, no gap, and the target is the token that follows
        document = fixed.document(0, i)
        np.testing.assert_array_equal(document.tokens, ids[T * i : T * i + T])
        np.testing.assert_array_equal(document.target, ids[T * i + 1 : T * i + T + 1])
        assert (document.weight == 1).all() and document.ar.all() and not document.media
    np.testing.assert_array_equal(
        fixed.trained_ids(), np.concatenate([fixed.document(0, i).target for i in range(999 // T)])
    )
    drawn = windows(ids, layout, 3, window=window)
    starts = set()
    for epoch in range(8):
        count = len(drawn.needs(epoch))
        read_ = np.concatenate([drawn.document(epoch, i).tokens for i in range(count)])
        start = next(s for s in range(T) if (ids[s : s + len(read_)] == read_).all())
        starts.add(start)
        assert start + len(read_) + 1 + T > len(ids)  # to the last whole window
    assert len(starts) > 3
    with pytest.raises(config.InputError, match=f"too few for two windows of {T}"):
        windows(ids[: 2 * T - 1], layout, None, window=window)


def test_no_questions_leaves_the_captions(digits_world, tokenizer):
    source, said = read(dataclasses.replace(digits_world, turns=0, captions=1, limit=20), tokenizer, epoch=0)
    assert len(source.needs(0)) == 20 and all(len(documents) == 1 for documents in said.values())


def test_no_captions_leaves_the_questions(digits_world, tokenizer):
    source, said = read(dataclasses.replace(digits_world, captions=0, limit=20), tokenizer, epoch=0)
    assert all(len(documents) == 1 for documents in said.values())
    items = sources.Questions(source).items
    assert len(items) == sum(len(record.turns) for record in source.records)
    assert "caption" not in {turn.kind for _, turn in items}
