"""Which documents the records of a data set become."""

import collections
import dataclasses

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


def test_no_captions_leaves_the_questions(digits_world, tokenizer):
    source, said = read(dataclasses.replace(digits_world, captions=0, limit=20), tokenizer, epoch=0)
    assert all(len(documents) == 1 for documents in said.values())
    items = sources.Questions(source).items
    assert len(items) == sum(len(turns) for turns in source.turns) and "caption" not in {t.kind for _, t in items}
