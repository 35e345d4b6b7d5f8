"""What digits_world promises: equal records everywhere, disjoint scans, held-out pairs, right and balanced answers."""

import collections
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import digits_world, scenes
from gpt4v_jax.data.datasets.digits_world import KINDS, PLACES
from gpt4v_jax.data.datasets.scenes import COLOURS, HELD_OUT, NAMES, SPLITS

NUMBER = {"train": 2000, "validation": 400, "test": 600, "compositional": 400}


@pytest.fixture(scope="module")
def records():
    """The splits in memory; train is a sixth of the default."""
    return {split: list(digits_world.records(split, number)) for split, number in NUMBER.items()}


def pairs(record):
    return {(t["name"], t["colour"]) for t in record["objects"]}


def pixels(record):
    return np.asarray(Image.open(io.BytesIO(record["image"])))


# ---- the builder


def test_two_builds_are_equal_and_a_second_call_builds_nothing(tmp_path, capsys):
    one, two = (datasets.prepare("digits_world/small", str(tmp_path / name)) for name in ("one", "two"))
    assert capsys.readouterr().out.count("building") == 2
    for split in SPLITS:
        a, b = one.as_data_source(split), two.as_data_source(split)
        expected = list(digits_world.records(split, {"train": 64, "validation": 16}.get(split, 32)))
        assert len(a) == len(b) == len(expected)
        for x, y, record in zip(a, b, expected, strict=True):
            np.testing.assert_equal(x, y)
            np.testing.assert_equal(x["image"], pixels(record))
            assert [c.decode() for c in x["captions"]] == record["captions"]
            assert [q.decode() for q in x["questions"]["question"]] == [q["question"] for q in record["questions"]]
    modified = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.array_record*"))]
    datasets.prepare("digits_world/small", str(tmp_path / "one"))
    assert capsys.readouterr().out == ""
    assert modified == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.array_record*"))]


def test_scenes_do_not_depend_on_how_many_there_are():
    assert list(digits_world.records("test", 5)) == list(digits_world.records("test", 9))[:5]
    assert list(digits_world.records("test", 5)) != list(digits_world.records("test", 5, seed=1))


def test_unknown_names_and_half_a_data_set_are_errors(tmp_path):
    with pytest.raises(InputError, match="did you mean 'digits_world'"):
        datasets.prepare("digit_world", str(tmp_path))
    with pytest.raises(InputError, match="did you mean 'small'"):
        datasets.prepare("digits_world/smal", str(tmp_path))
    (tmp_path / "digits_world" / "small" / str(digits_world.DigitsWorld.VERSION)).mkdir(parents=True)
    with pytest.raises(InputError, match="in the way"):
        datasets.prepare("digits_world/small", str(tmp_path))


def test_scenes_in_words_alone(tmp_path):
    few = digits_world.DigitsWorldConfig(name="few", pictures=False, train=3, validation=1, test=1, compositional=1)
    builder = digits_world.DigitsWorld(data_dir=str(tmp_path), config=few, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    there, made = builder.as_data_source("train"), list(digits_world.records("train", 3))
    assert [list(map(bytes.decode, x["captions"])) for x in there] == [x["captions"] for x in made]
    assert all("image" not in x for x in there)
    assert not next(c for c in digits_world.DigitsWorld.BUILDER_CONFIGS if c.name == "text").pictures


def test_plain_text(records):
    """A caption and every question with its answer, a line each; and it is known as a text."""
    record = records["train"][0]
    lines = digits_world.plain_text(record).splitlines()
    assert lines == [record["captions"][0], *(f"{q['question']} {q['answer']}" for q in record["questions"])]
    assert len(lines) > 3 and datasets.is_text("digits_world/plain") and not datasets.is_text("digits_world/text")
    plain = next(c for c in digits_world.DigitsWorld.BUILDER_CONFIGS if c.name == "plain")
    assert plain.plain and not plain.pictures


# ---- the scenes


def test_scans_are_disjoint_stratified_and_of_the_right_class(records):
    used = {split: {t["scan"] for r in of for t in r["objects"]} - {-1} for split, of in records.items()}
    used["test"] |= used["compositional"]
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not used[a] & used[b]
    assert len(used["train"]) > 1100 and len(used["validation"]) > 150 and len(used["test"]) > 330
    classes = scenes.scans()[1]
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        for digit, chosen in enumerate(scenes.scans_of(split)):
            assert set(classes[chosen]) == {digit}
            assert len(chosen) / np.sum(classes == digit) == pytest.approx(share, abs=0.01)
    for r in (r for of in records.values() for r in of):
        assert all((str(classes[t["scan"]]) == t["name"]) if t["scan"] >= 0 else t["name"] in scenes.SHAPES
                   for t in r["objects"])


def test_held_out_pairs_are_in_compositional_scenes_only(records):
    assert set(HELD_OUT) == set(NAMES) and set(HELD_OUT.values()) == set(COLOURS)
    held_out, seen = set(HELD_OUT.items()), set()
    for split in ("train", "validation", "test"):
        for r in records[split]:
            seen |= pairs(r)
            for q in r["questions"]:  # nor are they asked for: "no" would be learnt
                assert not any(f" {c} {n}?" in q["question"] for n, c in held_out)
    assert seen == {(n, c) for n in NAMES for c in COLOURS} - held_out
    assert all(pairs(r) & held_out for r in records["compositional"])
    assert held_out == set.union(*map(pairs, records["compositional"])) & held_out


def test_scenes_have_one_to_five_objects_apart_and_unique_by_colour(records):
    numbers = collections.Counter()
    for r in (r for of in records.values() for r in of):
        things = r["objects"]
        numbers[len(things)] += 1
        cells = [(t["row"], t["column"]) for t in things]
        assert len(set(cells)) == len(cells) and set(sum(cells, ())) <= {0, 1, 2}
        assert cells == sorted(cells)
        for of_digits in (True, False):
            colours = [t["colour"] for t in things if (t["scan"] >= 0) == of_digits]
            assert len(set(colours)) == len(colours)
    assert set(numbers) == {1, 2, 3, 4, 5}
    assert min(numbers.values()) > 0.8 * sum(numbers.values()) / 5


def test_each_object_is_drawn_in_its_cell_and_its_colour(records):
    for r in records["train"][:300]:
        image = pixels(r).astype(float)
        assert image.shape == (72, 72, 3)
        cells = {(t["row"], t["column"]): t["colour"] for t in r["objects"]}
        empty = next((i, j) for i in range(3) for j in range(3) if (i, j) not in cells)
        background = image[24 * empty[0], 24 * empty[1]]
        assert len(set(background)) == 1
        for i in range(3):
            for j in range(3):
                cell = image[24 * i : 24 * i + 24, 24 * j : 24 * j + 24]
                distance = np.abs(cell - background).max(-1)
                if (i, j) not in cells:
                    assert distance.max() == 0
                    continue
                ring = np.concatenate([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
                assert ring.max() < 0.6 * distance.max()  # blur may reach the border, strokes may not
                # The pixels that differ most have the object's colour, or one between it and the background.
                strongest = cell[distance > 0.9 * distance.max()].mean(0) - background
                cosine = {c: np.dot(strongest, np.array(v) - background) / np.linalg.norm(np.array(v) - background)
                          / np.linalg.norm(strongest) for c, v in COLOURS.items()}
                assert max(cosine, key=cosine.get) == cells[i, j]
                assert 25 < np.sum(distance > 0.5 * distance.max()) < 400


def test_masks_keep_to_their_cell_at_every_extreme():
    for shift in [(x, y) for x in (-1.0, 1.0) for y in (-1.0, 1.0)]:
        for name in scenes.SHAPES:
            mask = scenes.shape_mask(name, 20, shift)
            assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.6
            assert mask.max() == 1
        for scan in range(0, 1797, 13):
            for angle in (-10, 10):
                mask = scenes.digit_mask(scan, 21, angle, shift)
                assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.75
                assert mask.min() >= 0 and mask.max() <= 1


# ---- the words


def answer(question: str, things: list[dict]) -> set[str]:
    """The answers that a reader of the objects would accept; written without the builder's code."""

    def those(words: str) -> list[dict]:
        """Objects called "red digit", "red circle", "red 7", "7" or "circle"."""
        *colour, name = words.split()
        fits = [t for t in things if (t["scan"] >= 0 if name == "digit" else t["name"] == name)]
        return [t for t in fits if not colour or t["colour"] == colour[0]]

    def one(words: str) -> dict:
        (thing,) = those(words)
        return thing

    if m := re.fullmatch(r"what digit is the (\w+) one\?", question):
        return {t["name"] for t in things if t["colour"] == m[1] and t["scan"] >= 0}
    if m := re.fullmatch(r"what shape is the (\w+) one\?", question):
        return {t["name"] for t in things if t["colour"] == m[1] and t["scan"] < 0}
    if m := re.fullmatch(r"where is the (\w+ \w+)\?", question):
        rows, columns = ("top", "", "bottom"), ("left", "", "right")
        return {f"{rows[t['row']]} {columns[t['column']]}".strip() or "centre" for t in those(m[1])}
    if m := re.fullmatch(r"what colour is the (\w+)\?", question):
        return {one(m[1])["colour"]}
    if m := re.fullmatch(r"how many (objects|digits|shapes|(\w+) objects) are there\?", question):
        if m[2]:
            return {str(sum(t["colour"] == m[2] for t in things))}
        digits = sum(t["scan"] >= 0 for t in things)
        return {str({"objects": len(things), "digits": digits, "shapes": len(things) - digits}[m[1]])}
    if m := re.fullmatch(r"which is larger, the (\w+ digit) or the (\w+ digit)\?", question):
        a, b = one(m[1]), one(m[2])
        return {"equal" if a["name"] == b["name"] else (a if int(a["name"]) > int(b["name"]) else b)["colour"]}
    if m := re.fullmatch(r"what is the sum of the (\w+ digit) and the (\w+ digit)\?", question):
        return {str(int(one(m[1])["name"]) + int(one(m[2])["name"]))}
    if m := re.fullmatch(r"is there (an?) (\w+ \w+)\?", question):
        assert (m[1] == "an") == (m[2][0] in "aeiou")
        return {"yes" if those(m[2]) else "no"}
    if m := re.fullmatch(r"is the (\w+ \w+) (to the left of|to the right of|above|below) the (\w+ \w+)\?", question):
        a, b = one(m[1]), one(m[3])
        key = "column" if "to the" in m[2] else "row"
        assert a[key] != b[key]
        return {"yes" if (a[key] < b[key]) == (m[2] in ("to the left of", "above")) else "no"}
    raise AssertionError(question)


def test_every_question_has_one_right_answer(records):
    kinds = collections.defaultdict(set)
    for r in (r for of in records.values() for r in of):
        asked = [q["question"] for q in r["questions"]]
        assert 1 <= len(asked) <= 8 and len(set(asked)) == len(asked)
        assert max(collections.Counter(q["kind"] for q in r["questions"]).values()) <= 2
        for q in r["questions"]:
            assert answer(q["question"], r["objects"]) == {q["answer"]}, (q, r["objects"])
            kinds[" ".join(q["question"].split()[:2])].add(q["kind"])
    assert kinds == {"what digit": {"what"}, "what shape": {"shape"}, "where is": {"where"}, "what colour": {"colour"},
                     "how many": {"count"}, "which is": {"compare"}, "what is": {"sum"}, "is there": {"yes_no"},
                     "is the": {"yes_no"}}


def test_captions_tell_each_object_once_in_different_orders(records):
    phrases = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"}
    phrases |= {f"in the {place}": place for place in PLACES if place not in phrases.values()}
    first = collections.Counter()
    for r in (r for of in records.values() for r in of):
        there = sorted((t["name"], t["colour"], t["row"], t["column"]) for t in r["objects"])
        assert len(set(r["captions"])) == len(r["captions"]) == min(4, math.factorial(len(there)))
        for caption in r["captions"]:
            assert caption.endswith(".") and (" and " in caption) == (len(there) > 1)
            told = []
            for part in re.split(", | and ", caption[:-1]):
                article, colour, name, *rest = part.split()
                assert (article == "an") == (colour[0] in "aeiou")
                told.append((name, colour, *divmod(PLACES.index(phrases[" ".join(rest)]), 3)))
            assert sorted(told) == there
            first[len(told), min(told, key=lambda t: t[2:]) == told[0]] += 1
    for n in range(2, 6):  # the first in reading order is told first no more often than any other
        assert abs(first[n, True] / (first[n, True] + first[n, False]) - 1 / n) < 0.05


def test_kinds_are_even(records):
    for split, of in records.items():
        number = collections.Counter(q["kind"] for r in of for q in r["questions"])
        assert set(number) == set(KINDS)
        assert min(number.values()) >= 0.08 * sum(number.values()), (split, number)
    assert sum(len(r["questions"]) for r in records["test"]) >= 2000


def test_guessing_blind_does_not_pay(records):
    """The most frequent training answer to the very question, else to its kind; and no order of mention wins."""
    to_question, to_kind = (collections.defaultdict(collections.Counter) for _ in range(2))
    for q in (q for r in records["train"] for q in r["questions"]):
        to_question[q["question"]][q["answer"]] += 1
        to_kind[q["kind"]][q["answer"]] += 1
    for split in ("test", "compositional"):
        right = [(to_question.get(q["question"]) or to_kind[q["kind"]]).most_common(1)[0][0] == q["answer"]
                 for r in records[split] for q in r["questions"]]
        assert np.mean(right) <= 0.30, split
    compare = collections.Counter()
    for q in (q for r in records["train"] for q in r["questions"] if q["kind"] == "compare"):
        first, second = re.findall(r"the (\w+) digit", q["question"])
        compare[{first: "first", second: "second"}.get(q["answer"], "equal")] += 1
    assert max(compare.values()) <= 0.36 * sum(compare.values())
    assert max(to_kind["yes_no"].values()) <= 0.52 * sum(to_kind["yes_no"].values())


def test_compositional_questions_prefer_held_out_pairs(records):
    """Of the questions that name one object of a scene, at least half are about a held-out one."""
    about = []
    for r in records["compositional"]:
        for q in r["questions"]:
            if m := re.fullmatch(r"(?:what (digit|shape)|where) is the (\w+) (\w+)\?", q["question"]):
                kind, colour, noun = m.groups()
                is_digit = "digit" in (kind, noun)
                about += [HELD_OUT[t["name"]] == colour for t in r["objects"]
                          if t["colour"] == colour and (t["scan"] >= 0) == is_digit]
    assert len(about) > 500 and np.mean(about) > 0.7
