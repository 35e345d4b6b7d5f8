"""moving_digits: short grey clips in which digits of MNIST appear and move, with captions and questions.

Made here, from the files of mnist (see mnist.py). A clip has 8 frames of 40x40 pixels, 8 a second, encoded without
loss (FFV1 in Matroska). It shows 1 to 3 digits of different classes, each in a box of 20x20 pixels. Each appears at an
even frame of its own, at a multiple of 20 pixels, moves straight left, right, up or down at 10 pixels a frame, from the
half of the picture that it comes from, and is gone after 2 to 4 frames, or before, when it leaves the picture: often no
frame shows all digits. So a patch of 20 pixels and two frames holds a whole digit, and in its second half which way it
leaves: a small transformer without convolutions needs that to learn, within minutes, which digit moves which way. Of
many draws of their places the one is taken in which digits overlap least.

Questions want several frames: which digit moves left (only where exactly one does, and there are others), which way a
digit moves, how many there are, which came first. Captions name each digit and its way, one for each order of them: in
one order alone, that of time, the way could be told without looking for the digit. `train` has
digits of MNIST's training set, `validation` those of the first half of its test set and `test` those of the second.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from gpt4v_jax.data.datasets import mnist, raw

FRAMES, SIDE, RATE = 8, 40, 8  # frames of SIDE x SIDE pixels, RATE a second
BOX, SIZES = 20, (16, 20)  # pixels: of a digit's box; the longer side of its ink
CELL, SPEED = 20, 10  # pixels: digits appear at multiples of the one, and move at the other a frame
STARTS = (0, 2, 4)  # frames at which digits appear
STAYS = (2, 4)  # frames
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
DRAWS = 200  # of places, for one clip
SPLITS = ("train", "validation", "test")
SEED = 0


class Mover(NamedTuple):
    """A digit of a clip."""

    digit: int  # its class
    way: str  # of WAYS
    start: int  # the frame at which it appears
    end: int  # the frame at which it is gone
    ink: np.ndarray  # uint8 [BOX, BOX]
    corners: np.ndarray  # int [FRAMES, 2]: its upper left (y, x), pixels


def ink(picture: np.ndarray, size: int) -> np.ndarray:
    """picture: uint8 [28, 28] -> uint8 [BOX, BOX]: its ink in the middle, the longer side `size` pixels."""
    rows, columns = (np.flatnonzero(picture.any(axis)) for axis in (1, 0))
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * size / max(cut.shape))) for side in cut.shape)
    box, top, left = np.zeros((BOX, BOX), np.uint8), (BOX - height) // 2, (BOX - width) // 2
    resized = Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR)
    box[top : top + height, left : left + width] = resized
    return box


def paths(ways: list[str], begin: np.ndarray, end: np.ndarray, rng: np.random.Generator):
    """ways, begin, end [n]: frames at which they appear and are gone -> upper left corners int [n, FRAMES, 2]."""
    n, room = len(ways), SIDE - BOX
    speed = np.array([WAYS[way] for way in ways]) * SPEED  # [n, 2]
    place, half = (rng.integers(0, high // CELL + 1, (DRAWS, n, 2)) * CELL for high in (room, room // 2))
    # Along its way a digit starts in the first half of the room.
    place = np.where(speed > 0, half, np.where(speed < 0, room - half, place))
    age = np.arange(FRAMES) - begin[:, None]  # [n, FRAMES]
    shown = (age >= 0) & (np.arange(FRAMES) < end[:, None])
    corners = place[:, :, None] + speed[:, None] * age[..., None]  # [DRAWS, n, FRAMES, 2]
    overlap = np.zeros(DRAWS)
    for i in range(n):
        for j in range(i):
            low, high = np.maximum(corners[:, i], corners[:, j]), np.minimum(corners[:, i], corners[:, j]) + BOX
            overlap += (np.maximum(high - low, 0).prod(-1) * (shown[i] & shown[j])).sum(-1)
    return corners[overlap.argmin()]


def movers(pictures: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> list[Mover]:
    """pictures uint8 [n, 28, 28], classes [n] -> the 1 to 3 digits of a clip, of different classes."""
    number = rng.integers(1, 4)
    digits = rng.choice(10, number, replace=False)
    inks = [ink(pictures[rng.choice(np.flatnonzero(classes == d))], rng.integers(SIZES[0], SIZES[1] + 1))
            for d in digits]
    ways = [str(way) for way in rng.choice(list(WAYS), number)]
    begin = rng.permutation(STARTS)[:number]
    end = np.minimum(begin + rng.integers(STAYS[0], STAYS[1] + 1, number), FRAMES)
    corners = paths(ways, begin, end, rng)
    return list(map(Mover, digits.tolist(), ways, begin.tolist(), end.tolist(), inks, corners))


def frames(things: list[Mover]) -> np.ndarray:
    """-> uint8 [FRAMES, SIDE, SIDE], 0 is background; where two overlap, the brighter one."""
    margin = 2 * SIDE  # what is beyond the picture is drawn, too, and cut off at the end
    canvas = np.zeros((FRAMES, SIDE + 2 * margin, SIDE + 2 * margin), np.uint8)
    for thing in things:
        for t in range(thing.start, thing.end):
            y, x = thing.corners[t] + margin
            part = canvas[t, y : y + BOX, x : x + BOX]
            np.maximum(part, thing.ink, out=part)
    return canvas[:, margin:-margin, margin:-margin]


def encode(clip: np.ndarray) -> bytes:
    """uint8 [frames, height, width] -> a Matroska file; decoding it gives the same pixels."""
    av = raw.extra("moving_digits", "av")

    file = io.BytesIO()
    # bitexact: without it Matroska writes a random id, and no two builds are equal.
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width = clip.shape[1:]
        stream.pix_fmt = "gray"
        stream.thread_count = 1  # more would be slower for so little, and could cut a frame otherwise
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="gray")))
        container.mux(stream.encode())
    return file.getvalue()


def questions(things: list[Mover]) -> list[dict[str, str]]:
    """-> every question that has one right answer in this clip, as {kind, question, answer}."""
    found = [("count", "how many digits are there?", len(things))]
    found += [("way", f"which way does the {thing.digit} move?", thing.way) for thing in things]
    if len(things) > 1:  # else the only digit is the answer
        found.append(("first", "which digit came first?", min(things, key=lambda thing: thing.start).digit))
        for way in WAYS:
            those = [thing.digit for thing in things if thing.way == way]
            if len(those) == 1:
                found.append(("which", f"which digit moves {way}?", those[0]))
    return [{"kind": kind, "question": question, "answer": str(answer)} for kind, question, answer in found]


def captions(things: list[Mover]) -> list[str]:
    """-> such as "a 7 moves left, a 3 moves up.", in every order."""
    told = [f"a {thing.digit} moves {thing.way}" for thing in things]
    return [", ".join(order) + "." for order in itertools.permutations(told)]


def records(pictures: np.ndarray, classes: np.ndarray, split: str, number: int) -> Iterator[dict]:
    """pictures uint8 [n, 28, 28], classes [n]: those that the split may use -> its records; a clip depends on (SEED,
    split, index) alone."""
    for i in range(number):
        things = movers(pictures, classes, np.random.default_rng([SEED, SPLITS.index(split), i]))
        clip = np.frombuffer(encode(frames(things)), np.uint8)
        yield {"video": clip, "captions": captions(things), "questions": questions(things)}


@dataclasses.dataclass
class MovingDigitsConfig(tfds.core.BuilderConfig):
    """Clips in each split."""

    train: int = 16_000
    validation: int = 500
    test: int = 1000


class MovingDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Clips of moving digits with questions; see the top of this file."""

    VERSION = tfds.core.Version("1.3.0")  # raise it when a record changes: caches are kept by version
    BUILDER_CONFIGS: ClassVar = [
        MovingDigitsConfig(name="default", description="16,000 training clips"),
        MovingDigitsConfig(name="small", description="a few clips, for tests", train=40, validation=20, test=20),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Short clips in which digits of MNIST appear and move, with captions and questions.",
            features=tfds.features.FeaturesDict({
                "video": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),  # a Matroska file
                "captions": tfds.features.Sequence(text()),
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            disable_shuffling=True,  # record i is clip i
        )

    def _split_generators(self, dl_manager):
        parts = mnist.arrays(raw.manual_dir(dl_manager), "moving_digits", dl_manager.download)
        half = len(parts["t10k"][0]) // 2
        first, second = (tuple(array[cut] for array in parts["t10k"]) for cut in (slice(half), slice(half, None)))
        of_split = zip(SPLITS, (parts["train"], first, second), strict=True)
        return {split: enumerate(records(*part, split, getattr(self.builder_config, split)))
                for split, part in of_split}

    def _generate_examples(self):
        """TFDS wants this method; the splits are made above."""
