"""Several sources as one: how often each is read, in which order, and that the stream stays one stream."""

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, mixture, packing, pipeline, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.mixture import Entry
from gpt4v_jax.data.windows import Windows
from tests import tiny

LAYOUT = batch_lib.layout(tiny.make_config(context=24), tiny.DATA)
FIRST = len(tiny.SPECIAL)
SIZES, WEIGHTS = (10, 7, 4), (0.5, 1.0, 2.5)


class Part:
    """Document i of source k says k, i and the epoch; every other one has a picture, whose values are all k."""

    def __init__(self, k: int, size: int):
        self.k, self.size, self.name, self.layout = k, size, f"part {k}", LAYOUT
        self.bad = types.SimpleNamespace(where={})

    def pieces(self, epoch, i):
        said = chat.Piece("user", (FIRST + self.k, FIRST + i, FIRST + epoch % 20))
        seen = [chat.Piece("user", medium=chat.Medium("image", (self.k, i), ()))] * (i % 2)
        return [said, *seen, chat.Piece("assistant", (FIRST + i,) * (1 + (i + self.k) % 4))]

    def needs(self, epoch):
        return np.array([chat.needs(self.pieces(epoch, i), LAYOUT) for i in range(self.size)])

    def document(self, epoch, i):
        return chat.document(self.pieces(epoch, i), tiny.SPECIAL, LAYOUT)

    def read(self, medium):
        assert medium.key[0] == self.k
        (patch, index), = tiny.reader(LAYOUT)(dataclasses.replace(medium, key=medium.key[1]))
        return [(np.full_like(patch, self.k), index)]


def mixed(seed=3, weights=WEIGHTS, sizes=SIZES):
    return mixture.Mixture([Part(k, size) for k, size in enumerate(sizes)], weights, seed)


def said(document) -> tuple[int, int, int]:
    """-> (source, its document, its epoch)."""
    return tuple(int(token) - FIRST for token in document.tokens[1:4])


def order(mixed, epochs: int) -> list[tuple[int, int, int]]:
    return [said(mixed.document(e, i)) for e in range(epochs) for i in range(len(mixed.needs(e)))]


def data(*entries: str) -> config.Data:
    return config.Data(name="mnist", mixture=entries)


@pytest.mark.parametrize("text, entry", [
    ("emoji", Entry("emoji")), (" emoji ", Entry("emoji")),
    ("emoji: 2", Entry("emoji", 2.0)), ("emoji:0.5", Entry("emoji", 0.5)), ("emoji: .5", Entry("emoji", 0.5)),
    ("emoji: first:10%", Entry("emoji", 1.0, 0.1)), ("emoji:first: 2.5 %", Entry("emoji", 1.0, 0.025)),
    ("emoji: first:100%", Entry("emoji")), ("digits_world/small: 3", Entry("digits_world/small", 3.0)),
    ("jsonl:a/{split}.jsonl", Entry("jsonl:a/{split}.jsonl")), ("folder:a b: 2", Entry("folder:a b", 2.0)),
    ("llava:a.json@/m: first:1%", Entry("llava:a.json@/m", 1.0, 0.01)),
    ("folder:2024", Entry("folder:2024")), ("folder:2024: 2", Entry("folder:2024", 2.0)),
    ("tfds:mnist:3.0.1", Entry("tfds:mnist:3.0.1")), ("tfds:mnist:3.0.1: 2", Entry("tfds:mnist:3.0.1", 2.0)),
])  # fmt: skip
def test_entries(text, entry):
    found, other = mixture.entries(data(text, "fsdd"))
    assert (found.name, found.weight) == (entry.name, entry.weight) and found.share == pytest.approx(entry.share)
    assert other == Entry("fsdd")


def test_without_a_mixture_the_name_is_all():
    assert mixture.entries(config.Data(name="tfds:mnist: 2")) == [Entry("tfds:mnist: 2")]


@pytest.mark.parametrize("entries, message", [
    (("emoji: 0",), "'emoji: 0': a weight is above 0"), (("emoji: 0.0",), "a weight is above 0"),
    (("emoji: first:0%",), "a share above 0 %"), (("emoji: first:101%",), "at most 100 %"),
    (("emoji", "fsdd", "emoji"), "names a data set twice"), (("emoji", "emoji: 2"), "twice: give it one weight"),
    (("",), "'' is no 'name', 'name: weight'"), ((" ",), "'' is no|' ' is no"),
])  # fmt: skip
def test_what_is_no_mixture(entries, message):
    with pytest.raises(config.InputError, match=message):
        mixture.entries(data(*entries))


@pytest.mark.parametrize("text", ["emoji: two", "emoji: -1", "emoji: 1.2.3", "emoji: .", "emoji: first:x%", "emojj"])
def test_nonsense_is_an_unknown_name(text):
    with pytest.raises(config.InputError, match="data.mixture, of 'name', 'name: weight' and .*did you mean 'emoji'"):
        mixture.open_train(data(text))


def test_one_data_set_of_a_mixture():
    run = config.Config(data=data("emoji: 2", "fsdd: first:10%"))
    alone = mixture.one(run, "fsdd").data
    assert (alone.name, alone.mixture) == ("fsdd", ())
    with pytest.raises(config.InputError, match="the run reads emoji, fsdd: say which one, such as @emoji"):
        mixture.one(run, "")
    with pytest.raises(config.InputError, match="'fsd' is none of emoji, fsdd .did you mean 'fsdd'"):
        mixture.one(run, "fsd")
    assert mixture.one(config.Config(), "").data.name == "digits_world"


def test_each_source_is_read_as_often_as_its_weight_says():
    """Half of the first an epoch, the second once, all of the third twice and half of it: in two epochs 1, 2, 5 times;
    all of a source before one of it comes again, each time by its next epoch."""
    source, epochs = mixed(), 4
    assert [len(source.needs(e)) for e in range(epochs)] == [5 + 7 + 10] * epochs
    for e in range(epochs):
        assert collections.Counter(k for k, *_ in order(source, e + 1)[e * 22 :]) == {0: 5, 1: 7, 2: 10}
    everything = order(source, epochs)
    for k, (size, weight) in enumerate(zip(SIZES, WEIGHTS, strict=True)):
        mine = [(i, own) for part, i, own in everything if part == k]
        assert collections.Counter(i for i, _ in mine) == dict.fromkeys(range(size), epochs * weight)
        for own in range(len(mine) // size):
            whole = mine[own * size : (own + 1) * size]
            assert sorted(whole) == [(i, own) for i in range(size)]
        assert len({tuple(i for i, _ in mine[at : at + size]) for at in range(0, len(mine), size)}) > 1


def test_needs_are_those_of_the_documents():
    source = mixed()
    for e in range(3):
        for i, need in enumerate(source.needs(e)):
            document = source.document(e, i)
            assert need[0] == len(document) and need[1] == len(document.media)
            assert source.owner(i) == said(document)[0]


def test_the_order_is_the_seed_s():
    assert order(mixed(3), 3) == order(mixed(3), 3) != order(mixed(4), 3)
    source = mixed(3)  # the last epoch first: nothing is carried from one to the next
    late = [said(source.document(2, i)) for i in range(22)]
    assert late == order(mixed(3), 3)[44:]


def test_a_picture_is_read_by_the_source_that_has_it():
    source = mixed()
    for e in range(2):
        for i in range(22):
            document = source.document(e, i)
            for _, medium in document.media:
                ((patch, _),) = source.read(medium)
                assert (patch == said(document)[0]).all()


def test_a_source_without_documents_is_named():
    with pytest.raises(config.InputError, match="part 1"):
        mixed(sizes=(4, 0, 4))


def test_a_text_of_two_windows():
    """Sources that are windows may be one fewer in another epoch."""
    ids = np.arange(48)
    tokens = types.SimpleNamespace(encode=lambda text: ids, special=tiny.SPECIAL)
    text = Windows([""], config.Data(name="text"), tokens, LAYOUT, seed=0)
    source = mixture.Mixture([Part(0, 4), text], (1.0, 1.0), seed=0)
    for e in range(4):
        assert len(source.needs(e)) == 5 and len(source.document(e, 4)) == 24


def test_a_share_of_the_records(monkeypatch):
    """first:10% are the first ones, also of what data.limit leaves; at least one."""
    made = {}

    def conversations(records, one, *_):
        made[one.name] = one.limit
        return Part(0, 4)

    monkeypatch.setattr(sources, "Conversations", conversations)
    records = {name: [{"questions": []}] * 100 for name in "abcd"}
    asked = data("a: first:10%", "b: 2", "c: first:0.1%", "d: first:50%")
    mixture.train_source(records, asked, None, LAYOUT, 0)
    assert made == {"a": 10, "b": 0, "c": 1, "d": 50}
    made.clear()
    mixture.train_source(records, dataclasses.replace(asked, limit=20), None, LAYOUT, 0)
    assert made == {"a": 2, "b": 20, "c": 1, "d": 10}


def test_a_share_of_a_text():
    """Its beginning: a text is one record."""
    made = tokenizer_lib.train("byte", [], 0)
    text = "".join(chr(97 + i % 26) for i in range(50 * LAYOUT.context))
    here, one = [{"text": text}], config.Data(name="a")
    whole, tenth = (sources.from_records(here, one, made, LAYOUT, 0, share) for share in (1, 0.1))
    assert len(tenth.needs(0)) in (4, 5) and len(whole.needs(0)) in (49, 50)
    assert made.decode(tenth.document(0, 0).tokens) in text[: 5 * LAYOUT.context]


def stream(start, stop, threads=0, share=None):
    source = mixed()
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    return list(pipeline.batches(source, plan, LAYOUT, 4, start, stop, threads, share))


@pytest.fixture(scope="module")
def whole():
    """Seven steps: more than two epochs."""
    source = mixed()
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    assert plan.locate(7 * 4 - 1)[0] >= 2
    return stream(0, 7)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", range(7))
def test_from_any_step_by_any_host_the_stream_is_the_same(whole, start, hosts, threads):
    for host in range(hosts):
        share = range(host * 4 // hosts, (host + 1) * 4 // hosts)
        part = stream(start, 7, threads, None if hosts == 1 else share)
        for expected, batch in zip(whole[start:], part, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[list(share)], y), expected, batch)  # noqa: B023


def naive(batches) -> dict[str, float]:
    """Counted in the rows themselves: who speaks in each document, its positions, its pictures."""
    counts = collections.defaultdict(lambda: [0, 0, 0])
    for batch in batches:
        for row, tokens in zip(batch.document, batch.tokens, strict=True):
            for number in range(1, row.max() + 1):
                at = row == number
                one = counts[int(tokens[at][1]) - FIRST]
                one[0] += 1
                one[1] += int(at.sum())
                one[2] += int((tokens[at] == tiny.SPECIAL["<image>"]).sum()) // 4
    names = {f"data/part {k}/": n for k, n in counts.items()}
    return {f"{name}{what}": value for name, (n, tokens, media) in names.items()
            for what, value in (("epochs", n / SIZES[int(name[-2])]), ("tokens", tokens), ("media", media), ("bad", 0),
                                ("dropped", 0))}


def test_the_tally_is_what_was_read(whole):
    """Step by step, at once, from a resumed run, and asked twice."""
    source = mixed()
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    tally = mixture.Tally(source, plan)
    for step in range(1, 8):
        read = tally.to(4 * step)
        assert read == naive(whole[:step]) == tally.to(4 * step)
        resumed = mixed()
        assert mixture.Tally(resumed, packing.RowPlan(resumed.needs, LAYOUT, seed=5)).to(4 * step) == read
    source.parts[1].bad.where["a"] = "why"
    assert tally.to(28)["data/part 1/bad"] == 1
    assert sum(value for name, value in read.items() if name.endswith("media")) > 20


def test_documents_that_no_row_can_hold_are_counted_and_are_no_part_of_an_epoch():
    long = Part(1, 4)
    long.pieces = lambda epoch, i: [*Part.pieces(long, epoch, i), chat.Piece("user", (FIRST,) * 30 * (i < 3))]
    source = mixture.Mixture([Part(0, 6), long], (1.0, 1.0), 3)
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    read = mixture.Tally(source, plan).to(len(plan.epoch(0)))
    assert (read["data/part 1/epochs"], read["data/part 1/dropped"]) == (1.0, 3)
    assert (read["data/part 0/epochs"], read["data/part 0/dropped"]) == (1.0, 0)


def test_a_source_of_which_no_row_can_hold_anything():
    """It would be left out silently."""
    long = Part(1, 4)
    long.pieces = lambda epoch, i: [chat.Piece("user", (FIRST,) * 30), chat.Piece("assistant", (FIRST,))]
    with pytest.raises(config.InputError, match="part 1: there is no record .* that a row can hold: raise model.conte"):
        mixture.Mixture([Part(0, 6), long], (1.0, 1.0), 3)


def test_the_tally_of_a_source_alone():
    source = Part(0, 10)
    plan = packing.RowPlan(source.needs, LAYOUT, seed=5)
    rows = list(pipeline.batches(source, plan, LAYOUT, 4, 0, 3))
    assert mixture.Tally(source, plan).to(12) == naive(rows)
