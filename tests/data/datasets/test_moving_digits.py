"""Moving digits: a clip's file keeps its pixels, and what its questions ask can be seen in it, frame by frame."""

import collections
import io
import itertools
import pathlib
import re

import av
import numpy as np
import pytest

from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import mnist, moving_digits
from tests.data.datasets.test_mnist import fake

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"
BRIGHT = {"train": 0, "validation": 1, "test": 2}  # fake digits of a split have a brightness of their own


def bars(bright: int) -> tuple[np.ndarray, np.ndarray]:
    """-> 20 pictures, a bar each, whose brightness tells its class and `bright`; their classes."""
    pictures, classes = np.zeros((20, 28, 28), np.uint8), np.arange(20) % 10
    for picture, digit in zip(pictures, classes, strict=True):
        picture[4:24, 8:20] = 20 + 20 * digit + 5 * bright
    return pictures, classes


def decode(file: np.ndarray) -> np.ndarray:
    with av.open(io.BytesIO(file.tobytes())) as container:
        (stream,) = container.streams
        assert stream.average_rate == 8
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(stream)])


def seen(clip: np.ndarray) -> dict[int, dict[int, tuple[float, float]]]:
    """clip of bars -> {brightness: {frame: its middle (y, x)}}, where it is seen whole."""
    found = collections.defaultdict(dict)
    for t, frame in enumerate(clip):
        for value in set(np.unique(frame).tolist()) - {0}:
            ys, xs = np.nonzero(frame == value)
            found[value]
            found[value][t] = (ys.mean(), xs.mean()), np.ptp(ys) * np.ptp(xs)
    for value, at in found.items():  # those frames in which most of it is seen
        found[value] = {t: middle for t, (middle, area) in at.items() if area == max(area for _, area in at.values())}
    return found


@pytest.fixture
def small(monkeypatch, tmp_path):
    first, second = bars(BRIGHT["validation"]), bars(BRIGHT["test"])
    fake(monkeypatch, tmp_path, {"train": bars(0), "t10k": tuple(map(np.concatenate, zip(first, second, strict=True)))})
    return lambda cache: datasets.prepare("moving_digits/small", str(tmp_path / cache), str(tmp_path))


def test_what_is_asked_is_seen_and_two_builds_are_equal(small):
    one, two = small("one"), small("two")
    sizes, kinds, ways, hidden = {}, collections.Counter(), collections.Counter(), 0
    for split, bright in BRIGHT.items():
        sizes[split] = len(one.as_data_source(split))
        for record, same in zip(one.as_data_source(split), two.as_data_source(split), strict=True):
            np.testing.assert_equal(record, same)
            clip = decode(record["video"])
            assert clip.shape == (8, 40, 40)
            found = seen(clip)
            assert all((value - 20) % 20 == 5 * bright for value in found)  # the split's own digits
            digits = {(value - 20) // 20: at for value, at in found.items()}
            begins = {d: next(t for t in range(8) if np.any(clip[t] == 20 + 20 * d + 5 * bright)) for d in digits}
            assert 1 <= len(digits) <= 3 and len(set(begins.values())) == len(digits)
            hidden += not any(len(np.unique(frame)) == len(digits) + 1 for frame in clip)
            asked = [tuple(v.decode() for v in q) for q in zip(*(record["questions"][k] for k in
                     ("kind", "question", "answer")), strict=True)]
            told = {int(re.search(r"\d", q)[0]): answer for kind, q, answer in asked if kind == "way"}
            assert set(told) == set(digits)
            for digit, at in digits.items():
                times = sorted(at)
                if len(times) > 2 and len(digits) == 1:  # with others before it, its middle is not that of what is seen
                    step = (np.array(at[times[-1]]) - at[times[0]]) / (times[-1] - times[0])
                    y, x = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[told[digit]]
                    assert step @ (y, x) == 10 and abs(step @ (x, y)) < 0.1
                    ways[told[digit]] += 1
            expected = {("count", "how many digits are there?", str(len(digits)))}
            expected |= {("way", f"which way does the {d} move?", way) for d, way in told.items()}
            if len(digits) > 1:
                expected.add(("first", "which digit came first?", str(min(begins, key=begins.get))))
                expected |= {("which", f"which digit moves {way}?", str(d)) for d, way in told.items()
                             if list(told.values()).count(way) == 1}
            assert set(asked) == expected and len(asked) == len(expected)
            kinds.update(kind for kind, _, _ in asked)
            orders = {tuple(caption.decode().rstrip(".").split(", ")) for caption in record["captions"]}
            assert orders == set(itertools.permutations(f"a {d} moves {way}" for d, way in told.items()))
    assert sizes == {"train": 40, "validation": 20, "test": 20}
    assert set(kinds) == {"which", "way", "count", "first"} and set(ways) == {"left", "right", "up", "down"}
    assert hidden > 5


def test_encoding_is_without_loss():
    clip = np.random.default_rng(0).integers(0, 256, (8, 40, 40), np.uint8)
    file = np.frombuffer(moving_digits.encode(clip), np.uint8)
    np.testing.assert_array_equal(decode(file), clip)
    assert file.tobytes() == moving_digits.encode(clip)


def test_digits_rarely_overlap_and_are_apart_in_time():
    pictures, classes = bars(0)
    overlapping, numbers = 0, collections.Counter()
    for seed in range(200):
        things = moving_digits.movers(pictures, classes, np.random.default_rng(seed))
        numbers[len(things)] += 1
        assert len({thing.digit for thing in things}) == len(things)
        begins = sorted(thing.start for thing in things)
        assert all(b - a >= 2 for a, b in zip(begins, begins[1:], strict=False)) and begins[0] >= 0 and begins[-1] <= 4
        assert all(2 <= thing.end - thing.start <= 4 and thing.end <= 8 for thing in things)
        assert all(16 <= max(np.ptp(np.nonzero(thing.ink), axis=1)) + 1 <= 20 for thing in things)
        whole = sum(int(np.count_nonzero(moving_digits.frames([thing]))) for thing in things)
        overlapping += whole - np.count_nonzero(moving_digits.frames(things)) > 0.05 * whole
    assert min(numbers.values()) > 45 and overlapping < 12


def test_ink_is_cut_out_and_keeps_its_form():
    picture = np.zeros((28, 28), np.uint8)
    picture[3:23, 11:16] = 200
    ink = moving_digits.ink(picture, 16)
    assert ink.shape == (20, 20) and set(np.unique(ink)) == {0, 200}
    assert (ink[2:18, 8:12] == 200).all() and np.count_nonzero(ink) == 16 * 4


@pytest.mark.skipif(not (REAL / "img-mnist").is_dir(), reason="the real files are not here")
def test_real_files():
    pictures, classes = mnist.arrays(str(REAL))["t10k"]
    for record in moving_digits.records(pictures[:5000], classes[:5000], "validation", 20):
        clip = decode(record["video"])
        assert clip.shape == (8, 40, 40) and clip.max() > 200
