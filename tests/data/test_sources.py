"""Which documents the records of a data set become."""

import collections
import dataclasses
import pathlib
import re

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import files, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.windows import Windows
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

    special = {}

    def encode(self, text):
        return list(map(int, text.split()))

    def ends_in(self, text):
        return [match.end() for match in re.finditer(r"\d+", text)]


def windows(ids, layout, seed, **data):
    return Windows([" ".join(map(str, ids))], config.Data(name="numbers", **data), Given(), layout, seed)


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
    said = np.concatenate([fixed.document(0, i).target for i in range(999 // T)])
    assert fixed.trained_text() == " " + " ".join(map(str, said))
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


# ---- conversations

TALK = tokenizer_lib.train("byte", [], 0)


def talk(*turns: str, context: int = 96, records: int = 2, seed=None, system: str = ""):
    """-> conversations; a turn is "I text" (with a picture) or "text"; record r's pictures are files "r.k"."""
    model = dataclasses.replace(tiny.make_config(context=context), vocab=TALK.vocab)
    made = []
    for r in range(records):
        parts = [
            (files.File("image", pathlib.Path(f"{r}.{k}")), turn[2:]) if turn.startswith("I ") else (turn,)
            for k, turn in enumerate(turns)
        ]
        made.append({"turns": [files.Turn("k", p, f"yes{k}") for k, p in enumerate(parts)], "where": f"line:{r}",
                     "system": system})  # fmt: skip
    layout = batch_lib.layout(model, config.Data(image=config.Budget(2)))
    return sources.from_records(made, config.Data(name="talk", image=config.Budget(2)), TALK, layout, seed)


def pictures(pieces) -> list:
    return [piece.medium.key[0][:2] for piece in pieces if piece.medium]


def test_a_turn_is_asked_after_those_before_it_whose_answers_are_not_scored():
    source = talk("I what?", "and now?")
    asked = sources.Questions(source)
    assert len(asked.items) == 4 and pictures(asked.pieces(0, 1)) == [(0, 0)]
    document = asked.document(0, 1)
    scored = document.target[document.weight > 0]
    assert TALK.decode(scored) == "yes1" and scored[-1] == TALK.special["<end>"] and len(scored) == 5
    text = TALK.decode(document.tokens[document.tokens >= len(tokenizer_lib.SPECIALS)])
    assert text == "what?yes0and now?yes1"


def test_permuted_media_are_another_records_wherever_they_stand():
    source = talk("I what?", "I and this?", records=3)
    asked = sources.Questions(source, media_of=lambda r: (r + 1) % 3)
    assert pictures(asked.pieces(0, 0)) == [(1, 0)] and pictures(asked.pieces(0, 5)) == [(0, 0), (0, 1)]
    assert pictures(sources.Questions(source).pieces(0, 5)) == [(2, 0), (2, 1)]


def test_a_conversation_that_is_cut_shows_its_picture_again():
    source = talk("I what is it?", "and its colour?", "why?", context=32, records=1, seed=0)
    found = [source.pieces(0, i) for i in range(len(source.needs(0)))]
    assert len(found) > 1 and all(pictures(pieces) == [(0, 0)] for pieces in found)
    said = [TALK.decode(p.ids) for pieces in found for p in pieces if p.role == "assistant"]
    assert said == ["yes0", "yes1", "yes2"]
    assert (source.needs(0)[:, 0] <= 32).all()


@pytest.mark.parametrize("picture, context", [("", 32), ("I ", 40)])
def test_a_conversation_that_is_cut_repeats_its_system_message(picture, context):
    """Before the picture that is shown again, too."""
    turns = [f"{picture}question 0?", "question 1?", "question 2?"]
    source = talk(*turns, context=context, records=1, seed=0, system="Be brief.\n")
    found = [source.pieces(0, i) for i in range(len(source.needs(0)))]
    assert [len(pictures(pieces)) for pieces in found] == [len(picture) // 2] * 3
    said = ["".join(TALK.decode(p.ids) for p in pieces if not p.medium) for pieces in found]
    assert said == [f"Be brief.\nquestion {k}?yes{k}" for k in range(3)]
    assert (source.needs(0)[:, 0] <= context).all()
    asked = sources.Questions(source)
    assert TALK.decode(asked.document(0, 0).tokens).startswith("Be brief.\n")


@pytest.mark.parametrize("kind", ["byte", "wordpiece", "bpe"])
def test_characters_are_counted_in_the_text_as_it_was(kind):
    """Also where decoding would write [UNK], or put spaces between Chinese characters."""
    text = "春眠不觉晓，处处闻啼鸟。\nAn unknown 🙂 word."
    tokens = tokenizer_lib.train(kind, ["春眠不觉晓处处闻啼鸟 known word"] * 3, 400)
    layout = batch_lib.layout(tiny.make_config(size=0, context=4), config.Data())
    source = Windows([text, text], config.Data(name="t"), tokens, layout, None)
    # All but the first token, and what makes no whole window at the end.
    said = source.trained_text()
    ends = tokens.ends_in(text)
    ends += [len(text)] + [len(text) + end for end in ends]  # the first text's, <end>'s, the second text's
    assert said == (text * 2)[ends[0] : ends[4 * len(source.needs(0))]] and len(said) > 2 * len(text) - 12


def test_between_two_texts_lies_an_end():
    layout = batch_lib.layout(tiny.make_config(size=0, context=4), config.Data())
    source = sources.from_records([{"text": "abcd"}, {"text": b"efgh"}], config.Data(name="t"), TALK, layout, seed=None)
    ids = np.concatenate([source.document(0, i).tokens for i in range(2)])
    assert ids[4] == TALK.special["<end>"] and TALK.decode(ids) == "abcdefg"
