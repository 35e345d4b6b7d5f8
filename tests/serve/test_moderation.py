"""Word lists and classifiers refuse what they should where they should; refusals are counted, and their text is told
nobody; files with a mistake are named with it."""

import concurrent.futures
import json
import logging
import re

import pytest

from gpt4v_jax import config
from gpt4v_jax.generate import classify
from gpt4v_jax.serve import folding, moderation
from gpt4v_jax.training import workdir
from tests.generate.test_classify import folder as classifier  # noqa: F401
from tests.serve import fake

SECRET = "the xylophone of Darn"


def made(folder, *words, classifiers=()):
    """-> what `load` makes of word lists and classifiers."""
    path = folder / "moderation.json"
    path.write_text(json.dumps({"words": words, "classifiers": classifiers}))
    return moderation.load(path)


@pytest.fixture
def lists(tmp_path):
    """"rude", as whole words, and in requests "parts", as substrings."""
    (tmp_path / "rude.txt").write_text("\ufeff# a list\n\n  Darn  # mild\nGo  away\nmother-in-law\n")
    return made(tmp_path, {"category": "rude", "entries": ["héck", "c'mon"], "files": ["rude.txt"]},
                {"category": "parts", "entries": ["$$$", "Cunt", "x  y"], "substrings": True, "where": ["request"]})


@pytest.mark.parametrize("text, category", [
    ("Darn!", "rude"), ("oh ＤＡ\u00adＲＮ", "rude"), ("HECK", "rude"), ("_darn_", "rude"), ("darn's", "rude"),
    ("so go\n\taway now", "rude"), ("go, away", "rude"), ("my Mother in Law", "rude"), ("c’mon", "rude"),
    ("darning", None), ("go faraway", None), ("ago away", None), ("mother, law", None), ("", None), ("go", None),
    ("for $$$", "parts"), ("x\n y", "parts"), ("xy", None), ("Scunthorpe", "parts"), ("cun\u200bt", "parts"),
])  # fmt: skip
def test_word_lists(lists, text, category):
    assert lists.check(text, "request") == category
    assert lists.words(text, "request", ended=True) == category
    assert lists.scores(text) == {"rude": float(category == "rude"), "parts": float(category == "parts")}
    assert lists.thresholds == {"rude": 1.0, "parts": 1.0}


def test_whole_words_let_what_has_them_inside_pass(tmp_path):
    found = made(tmp_path, {"category": "rude", "entries": ["cunt", "ass", "hell"]})
    for text in ("Scunthorpe", "assistant, class, assess", "hello shell", "Cuntz"):
        assert found.check(text, "answer") is None
    assert found.check("what the hell", "answer") == "rude"


def test_where(lists):
    assert lists.check("$$$", "request") == "parts" and lists.check("$$$", "answer") is None
    assert lists.check("$$$ darn", "answer") == "rude"
    for ask in (lists.check, lists.words):
        with pytest.raises(config.InputError, match="where='reply'.*request, answer"):
            ask("darn", "reply")


def test_an_answer_that_grows(lists):
    """A word that two Deltas cut is found when it has ended; one that goes on is another word."""
    text, said = "", []
    for delta in ("oh", ", da", "r", "n", "ing!", " go", " a", "way", "s", " go away", "."):
        text += delta
        said.append(lists.words(text, "answer"))
    assert said == [None] * 10 + ["rude"]
    assert lists.words("oh, darn", "answer") is None and lists.words("oh, darn", "answer", ended=True) == "rude"
    assert lists.words("oh, darn\u00ad", "answer") is None and lists.words("oh, darn ", "answer") == "rude"
    assert lists.words("say scun", "request") is None and lists.words("say scunt", "request") == "parts"


def test_what_may_be_shown_has_been_looked_at(lists):
    text = "oh, it is da\u200brning and then go away. So darn it"
    shown = ""
    for end in range(1, len(text) + 1):
        if lists.words(text[:end], "answer"):
            break
        shown = text[: folding.settled(text[:end])]
    assert shown == "oh, it is da\u200brning and then go "


def test_refusals_are_counted_and_logged_without_the_text(lists, caplog):
    assert set(lists.refusals().values()) == {0}
    assert set(lists.refusals()) == {("rude", "request"), ("rude", "answer"), ("parts", "request")}
    with caplog.at_level(logging.DEBUG):
        lists.check("nothing", "request")
        lists.scores(SECRET)
        assert not caplog.records
        lists.check(SECRET, "request")
        lists.check(SECRET, "answer")
        lists.words(SECRET + ".", "answer")
        lists.words(SECRET, "answer")
    assert lists.refusals() == {("rude", "request"): 1, ("rude", "answer"): 2, ("parts", "request"): 0}
    assert [r.getMessage() for r in caplog.records] == [
        f"refused: category=rude where={where} length={len(SECRET) + more}"
        for where, more in (("request", 0), ("answer", 0), ("answer", 1))]  # fmt: skip
    assert not re.search("xylophone|darn", f"{caplog.text}{[vars(r) for r in caplog.records]}", re.IGNORECASE)
    lists.refusals().clear()
    assert lists.refusals()["rude", "answer"] == 2


def test_threads(lists):
    def ask(i):
        return lists.check("darn" if i % 2 else "fine", "request"), lists.words("$$$", "request")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        said = list(pool.map(ask, range(2000)))
    assert said == [(None, "parts"), ("rude", "parts")] * 1000
    assert lists.refusals() == {("rude", "request"): 1000, ("rude", "answer"): 0, ("parts", "request"): 2000}


def test_a_long_text_is_searched_once(lists):
    """1 MB that nearly matches everywhere: one look-up for each word and length of an entry."""
    looked_up = []

    class Runs(set):
        def isdisjoint(self, other):
            looked_up.append(sum(1 for _ in other))
            return True

    words = lists._lists[0][1]
    words._runs = {count: Runs(runs) for count, runs in words._runs.items()}
    text = "dar go mother in " * 60_000
    assert len(text) > 1e6 and lists.check(text, "answer") is None
    assert sorted(looked_up) == [240_000 - 2, 240_000 - 1, 240_000]


@pytest.mark.parametrize("values, message", [
    ([], "JSON object"), ({}, "JSON object"), ({"word": []}, "key='word' is none of words, classifiers.*'words'"),
    ({"words": {"category": "a"}}, "words={'category': 'a'} must be a list"), ({"words": ["a"]}, "must be a list"),
    ({"words": [{"categry": "a"}]}, r"words\[0\].categry \(did you mean 'category'\?\)"),
    ({"words": [{"entries": ["a"]}]}, r"words\[0\]: category is missing"),
    ({"words": [{"category": "a", "entries": ["a"]}, {"category": "b"}]}, r"words\[1\]: the category 'b' has no words"),
    ({"words": [{"category": "a", "entries": "abc"}]}, r"words\[0\].entries='abc' must be a list of str"),
    ({"words": [{"category": "a", "entries": ["a"], "where": ["requests"]}]}, "'requests'.*did you mean 'request'"),
    ({"words": [{"category": "a", "entries": ["a"], "where": []}]}, r"where=\[\]"),
    ({"words": [{"category": "a", "entries": ["a"], "substrings": 1}]}, r"words\[0\].substrings=1 must be of type"),
    ({"words": [{"category": "a", "entries": ["c++"]}]}, r"words\[0\]: the entry 'c\+\+' has '\+'.*substrings=true"),
    ({"words": [{"category": "a", "entries": ["--"]}]}, r"the entry '--' has nothing"),
    ({"words": [{"category": "a", "entries": [" \u200b"], "substrings": True}]}, "has nothing"),
    ({"words": [{"category": "a", "files": ["no.txt"]}]}, r"words\[0\]: .*no.txt cannot be read: No such file"),
    ({"words": [{"category": "a", "files": ["latin.txt"]}]}, "latin.txt is not UTF-8: byte 0xe9"),
    ({"words": [{"category": "a", "files": ["empty.txt"]}]}, "no words"),
    ({"classifiers": [{"category": "a"}]}, r"classifiers\[0\]: workdir is missing"),
    ({"classifiers": [{"category": "a", "workdir": "w", "labels": ["x", "y"]}]}, "refuse is missing.*'x', 'y'"),
    ({"classifiers": [{"category": "a", "workdir": "w", "labels": ["bad", "y"], "refuse": ["bda"]}]},
     "refuse='bda'.*did you mean 'bad'"),
    ({"classifiers": [{"category": "a", "workdir": "w", "labels": ["x"], "refuse": ["x"], "threshold": 90}]},
     "threshold=90.0 must be a probability"),
    ({"classifiers": [{"category": "a", "workdir": "w", "labels": ["x"], "refuse": ["x"], "threshold": 0}]},
     "threshold=0.0 must be a probability"),
    ({"classifiers": [{"category": "a", "workdir": "w", "labels": ["x", "y"], "refuse": ["x"]}]},
     r"classifiers\[0\]: .*/w holds no run"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path, values, message):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("# none\n")
    path = tmp_path / "mod.json"
    path.write_text(json.dumps(values))
    with pytest.raises(config.InputError, match=message) as error:
        moderation.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_json(tmp_path):
    path = tmp_path / "mod.json"
    with pytest.raises(config.InputError, match="mod.json cannot be read: No such file"):
        moderation.load(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(config.InputError, match="mod.json is no JSON"):
            moderation.load(str(path))


HEAD = {"category": "unkind", "workdir": "run", "labels": ["bad", "good"], "refuse": ["bad"], "threshold": 0.8}


def test_a_classifier(classifier, tmp_path, caplog):  # noqa: F811
    (tmp_path / "run").symlink_to(classifier)
    found = made(tmp_path, {"category": "rude", "entries": ["darn"]},
                 classifiers=[HEAD, HEAD | {"category": "kind", "refuse": ["good"], "where": ["answer"]},
                              HEAD | {"category": "any", "refuse": ["bad", "good"], "threshold": 0.99,
                                      "where": ["request"], "question": "one {}", "lower": True}])  # fmt: skip
    assert found.thresholds == {"rude": 1.0, "unkind": 0.8, "kind": 0.8, "any": 0.99}
    for text in ("six awful", "ａwf\u200bul six"):
        assert found.check(text, "answer") == found.check(text, "request") == "unkind"
        scores = found.scores(text)
        assert scores == pytest.approx(found.scores(text.replace("ａ", "a").replace("\u200b", "")))
        assert scores["unkind"] > 0.8 and scores["kind"] == pytest.approx(1 - scores["unkind"])
    assert found.check("six fine", "answer") == "kind" and found.check("six fine", "request") == "any"
    assert found.check("awful darn", "answer") == "rude"
    assert found.scores("darn fine")["rude"] == 1 and found.scores("fine six")["any"] == pytest.approx(1)
    # One bad window of a long text is enough.
    text = "fine six one " * 20 + "awful six"
    p = classify.Classifier(workdir.restore(classifier), ["bad", "good"]).probabilities(text)[:, 0]
    assert p.min() < 0.5 < p.max() and found.scores(text)["unkind"] == pytest.approx(p.max())
    assert found.words("six awful one", "answer", ended=True) is None
    assert found.refusals()["unkind", "request"] == 2 and "awful" not in caplog.text
    lower = made(tmp_path, classifiers=[HEAD | {"lower": True}])
    assert lower.scores("SIX AWFUL") == lower.scores("six awful") != found.scores("SIX AWFUL")


def test_a_classifier_at_a_server(classifier, tmp_path):  # noqa: F811
    """What it refuses is no answer; of a stream it has been shown by then."""
    (tmp_path / "run").symlink_to(classifier)
    engine = fake.FakeEngine(fake.trained().tokenizer, "six awful")
    with fake.client(engine, moderation=made(tmp_path, classifiers=[HEAD])) as client:
        refused = client.post("/v1/chat/completions", json=fake.say("six awful"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter") and not engine.requests
        answer = client.post("/v1/chat/completions", json=fake.say("six fine")).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("", "content_filter")
        *chunks, end = fake.events(client.post("/v1/chat/completions", json=fake.say("six fine", stream=True)).text)
        said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        assert said.startswith("six") and chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        counts = client.get("/metrics").text
        assert 'gpt4v_refused_total{category="unkind",where="answer"} 2.0' in counts and "awful" not in counts


def test_classifier_in_threads(classifier, tmp_path):  # noqa: F811
    (tmp_path / "run").symlink_to(classifier)
    found = made(tmp_path, classifiers=[HEAD])
    texts = ["six awful", "six fine"] * 8
    alone = [found.scores(text)["unkind"] for text in texts[:2]] * 8
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [scores["unkind"] for scores in pool.map(found.scores, texts)] == pytest.approx(alone, rel=1e-5)


def test_classifiers_that_cannot_be(classifier, tmp_path):  # noqa: F811
    (tmp_path / "run").symlink_to(classifier)
    with pytest.raises(config.InputError, match=r"classifiers\[1\]: category='unkind' has a classifier already"):
        made(tmp_path, classifiers=[HEAD, HEAD])
    with pytest.raises(config.InputError, match=r"moderation.json: classifiers\[0\]: question='is it' must have one"):
        made(tmp_path, classifiers=[HEAD | {"question": "is it"}])
    with pytest.raises(config.InputError, match=r"classifiers\[0\]: labels=\['bad'\] must be two or more"):
        made(tmp_path, classifiers=[HEAD | {"labels": ["bad"]}])
