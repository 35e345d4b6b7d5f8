"""digits_world: small scenes of handwritten digits and drawn shapes, with captions and questions.

Made here, without a download: the digits are the 1,797 scans of scikit-learn's `load_digits` (8x8 pixels, 16 levels),
the shapes are drawn. A scene is a 72x72 picture of 3x3 cells with 1-5 objects, each in its own cell. There is at most
one digit and at most one shape of a colour, so that "the red digit" is one object; a digit and a shape may share it.

Three splits differ in their scans: no scan of `test` occurs in `train` or `validation`. `compositional` has the scans
of `test` and asks about the pairs of HELD_OUT, such as a green 1, that the other splits never show or mention.
Questions are chosen so that kinds are even and answers are even for each question: guessing them blind does not pay.

    the scene      Thing, Scene, sample_scene          the words      captions, candidates, choose
    the picture    digit_mask, shape_mask, picture     the records    records, DigitsWorld
"""

import collections
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

# Middle luminance: each is seen on dark and on light grey, and they lie apart in CIELAB.
COLOURS = {
    "red": (222, 22, 32),
    "green": (20, 160, 45),
    "blue": (35, 85, 250),
    "yellow": (232, 196, 0),
    "purple": (155, 40, 195),
    "cyan": (0, 185, 210),
    "orange": (248, 118, 0),
    "pink": (255, 120, 195),
}
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star")
NAMES = DIGITS + SHAPES
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
PHRASES = ("in the top left", "at the top", "in the top right", "on the left", "in the centre", "on the right",
           "in the bottom left", "at the bottom", "in the bottom right")
KINDS = ("what", "shape", "where", "colour", "count", "compare", "sum", "yes_no")
# One colour for each name; 3 and 8 have no common divisor, so the colours are spread.
HELD_OUT = {name: tuple(COLOURS)[3 * i % 8] for i, name in enumerate(NAMES)}
SPLITS = ("train", "validation", "test", "compositional")

CELL = 24  # pixels
SIDE = 3 * CELL
MARGIN = 0.5  # pixels between an object and the border of its cell
CAPTIONS, QUESTIONS, QUESTIONS_OF_A_KIND = 4, 8, 2  # of a scene, at most


# ---- the scene


class Thing(NamedTuple):
    """A digit or a shape. `scan` is its index in `load_digits`, -1 for a shape."""

    name: str
    colour: str
    row: int  # 0-2, from the top
    column: int  # 0-2, from the left
    scan: int
    size: float  # pixels; a digit's is that of its 8x8 scan, a shape's is its diameter
    angle: float  # degrees, counter-clockwise
    shift: tuple[float, float]  # (x, y), -1 to 1: where in its cell, as a share of the room that is left

    @property
    def is_digit(self) -> bool:
        return self.scan >= 0

    @property
    def pair(self) -> tuple[str, str]:
        return self.name, self.colour


class Scene(NamedTuple):
    things: tuple[Thing, ...]  # in reading order
    background: int  # a grey, 0-255


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """-> scans uint8 [1797, 8, 8], 0 is paper and 255 is ink; their classes int [1797]."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8), digits.target


@functools.cache
def scans_of(split: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """-> for each class 0-9 the indices of the scans that `split` may use: 70 % train, 10 % validation, 20 % test."""
    rng = np.random.default_rng([seed, len(SPLITS)])
    part = {"train": 0, "validation": 1, "test": 2, "compositional": 2}[split]
    chosen = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(scans()[1] == digit))
        chosen.append(np.split(order, [round(0.7 * len(order)), round(0.8 * len(order))])[part])
    return tuple(chosen)


def sample_names(rng: np.random.Generator) -> list[str]:
    """-> 1-5 names, digits first. Two digits are together, are equal, and have each sum more often than chance would
    have it: otherwise compare and sum are rare, "9" is the best guess for a sum, and "equal" is never right."""
    number = int(rng.integers(1, 6))
    digits = int(rng.integers(2 if number >= 2 and rng.random() < 0.3 else 0, number + 1))
    values = list(rng.integers(0, 10, digits))
    if digits >= 2 and rng.random() < 0.3:
        values[1] = values[0]
    elif digits >= 2:
        total = rng.integers(0, 19)
        values[0] = rng.integers(max(0, total - 9), min(9, total) + 1)
        values[1] = total - values[0]
    return [str(v) for v in values] + [SHAPES[i] for i in rng.integers(0, len(SHAPES), number - digits)]


def sample_colours(rng: np.random.Generator, names: list[str], held_out: bool) -> list[str]:
    """-> a colour for each name, by trial and error. `held_out`: one name at least takes the colour held out for it,
    each other one with probability 1/2; otherwise none does."""
    digits = sum(name in DIGITS for name in names)
    while True:
        of_digits, of_shapes = (list(rng.permutation(list(COLOURS))) for _ in range(2))
        if rng.random() < 0.5:  # shapes take the colours of digits first: distractors
            of_shapes = of_digits
        colours = [str(c) for c in of_digits[:digits] + of_shapes[: len(names) - digits]]
        if held_out:
            forced = rng.random(len(names)) < 0.5
            forced[rng.integers(len(names))] = True
            colours = [HELD_OUT[n] if f else c for n, c, f in zip(names, colours, forced, strict=True)]
        elif any(HELD_OUT[n] == c for n, c in zip(names, colours, strict=True)):
            continue
        if len(set(colours[:digits])) == digits and len(set(colours[digits:])) == len(names) - digits:
            return colours


def sample_scene(rng: np.random.Generator, scans_of_class: tuple[np.ndarray, ...], held_out: bool = False) -> Scene:
    names = sample_names(rng)
    colours = sample_colours(rng, names, held_out)
    cells = rng.permutation(9)[: len(names)]
    things = []
    for name, colour, cell in zip(names, colours, cells, strict=True):
        row, column = divmod(int(cell), 3)
        scan, size, angle = -1, rng.uniform(16, 20), 0.0
        if name in DIGITS:
            scan, size, angle = int(rng.choice(scans_of_class[int(name)])), rng.uniform(18, 21), rng.uniform(-10, 10)
        shift = tuple(float(s) for s in rng.uniform(-1, 1, 2))
        things.append(Thing(name, colour, row, column, scan, float(size), float(angle), shift))
    background = rng.integers(8, 49) if rng.random() < 0.5 else rng.integers(222, 249)
    return Scene(tuple(sorted(things, key=lambda t: (t.row, t.column))), int(background))


# ---- the picture


@functools.cache
def ink(scan: int) -> tuple[Image.Image, tuple[float, float], tuple[float, float]]:
    """-> the scan with two empty pixels around it, for bicubic needs neighbours; its ink's middle (x, y) and size."""
    padded = np.pad(scans()[0][scan], 2)
    (top, bottom), (left, right) = (np.flatnonzero((padded > 16).any(axis))[[0, -1]] for axis in (1, 0))
    middle = (left + right + 1) / 2, (top + bottom + 1) / 2
    return Image.fromarray(padded), middle, (right - left + 1.5, bottom - top + 1.5)  # 1/4 pixel of blur on each side


def digit_mask(scan: int, size: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    """-> f32 [CELL, CELL], 0 background to 1 ink: the scan enlarged (bicubic), rotated and shifted, all in its cell."""
    source, middle, (width, height) = ink(scan)
    scale, cos, sin = size / 8, math.cos(math.radians(angle)), math.sin(math.radians(angle))
    half = np.array([width * cos + height * abs(sin), width * abs(sin) + height * cos]) / 2
    room = CELL / 2 - MARGIN
    scale = min(scale, room / half.max())
    x, y = CELL / 2 + np.array(shift) * (room - scale * half)
    a, b = cos / scale, -sin / scale  # PIL wants output -> input
    matrix = (a, b, middle[0] - a * x - b * y, -b, a, middle[1] + b * x - a * y)
    cell = source.transform((CELL, CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.minimum(np.asarray(cell, np.float32) * (1.25 / 255), 1.0)  # a little more ink: strokes are thin


def shape_mask(name: str, size: float, shift: tuple[float, float]) -> np.ndarray:
    """-> f32 [CELL, CELL], 0 background to 1 shape; drawn four times as large and averaged, for smooth edges."""
    room = CELL / 2 - MARGIN - size / 2
    x, y, radius = 4 * (CELL / 2 + shift[0] * room), 4 * (CELL / 2 + shift[1] * room), 4 * size / 2
    canvas = Image.new("L", (4 * CELL, 4 * CELL))
    draw = ImageDraw.Draw(canvas)
    if name == "circle":
        draw.circle((x, y), 0.95 * radius, fill=255)
    else:
        # Corners as (share of the radius, clockwise angle from the top in turns).
        corners = {"square": [(1.2, i / 4 + 1 / 8) for i in range(4)],
                   "triangle": [(1.12, i / 3) for i in range(3)],
                   "star": [((1.05, 0.42)[i % 2], i / 10) for i in range(10)]}[name]
        turns = [(r * radius, 2 * math.pi * t) for r, t in corners]
        down = 0.2 * radius if name == "triangle" else 0.0  # its box, not its centroid, is in the middle
        draw.polygon([(x + r * math.sin(t), y + down - r * math.cos(t)) for r, t in turns], fill=255)
    return np.asarray(canvas.reduce(4), np.float32) / 255


def picture(scene: Scene) -> np.ndarray:
    """-> uint8 [72, 72, 3]."""
    pixels = np.full((SIDE, SIDE, 3), scene.background, np.float32)
    for t in scene.things:
        mask = digit_mask(t.scan, t.size, t.angle, t.shift) if t.is_digit else shape_mask(t.name, t.size, t.shift)
        cell = pixels[t.row * CELL : (t.row + 1) * CELL, t.column * CELL : (t.column + 1) * CELL]
        cell += mask[..., None] * (np.array(COLOURS[t.colour], np.float32) - scene.background)
    return np.round(pixels).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)  # quicker to write, little larger
    return file.getvalue()


# ---- the words


def a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


IS_THERE = {(name, colour): f"is there {a(colour)} {name}?" for name in NAMES for colour in COLOURS}


def noun(thing: Thing) -> str:
    """-> what a question calls it: "red digit", which does not tell the digit, or "red circle"."""
    return f"{thing.colour} {'digit' if thing.is_digit else thing.name}"


def place(thing: Thing) -> int:
    """-> index into PLACES and PHRASES."""
    return 3 * thing.row + thing.column


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """-> up to 4, which differ in the order of their objects, so that what follows "a red" must be looked up: such as
    "a red 7 in the top left, a blue circle in the centre and a green 3 on the right.\""""
    parts = [f"{a(t.colour)} {t.name} {PHRASES[place(t)]}" for t in scene.things]
    orders = list(itertools.permutations(parts))
    orders = [orders[i] for i in rng.permutation(len(orders))[:CAPTIONS]]
    return [(", ".join(o[:-1]) + " and " if o[1:] else "") + o[-1] + "." for o in orders]


class Question(NamedTuple):
    kind: str  # of KINDS
    template: str  # questions that differ in names and colours only
    question: str
    answer: str
    outcome: str  # what is balanced within the template: the answer, or for compare first | second | equal
    about: tuple[tuple[str, str], ...]  # the (name, colour) pairs that it turns on, in the scene or not


def candidates(scene: Scene, held_out: bool = False) -> list[Question]:
    """-> every question that has one right answer in this scene. `held_out`: ask for absent HELD_OUT pairs, too."""
    things, digits = scene.things, [t for t in scene.things if t.is_digit]
    names = collections.Counter(t.name for t in things)
    found = []

    def add(kind, template, question, answer, *about, outcome=""):
        found.append(Question(kind, template, question, str(answer), outcome or str(answer), about))

    for t in things:
        kind = "what" if t.is_digit else "shape"
        add(kind, kind, f"what {'digit' if t.is_digit else 'shape'} is the {t.colour} one?", t.name, t.pair)
        add("where", f"where {t.is_digit}", f"where is the {noun(t)}?", PLACES[place(t)], t.pair)
        if names[t.name] == 1:
            add("colour", f"colour {t.is_digit}", f"what colour is the {t.name}?", t.colour, t.pair)

    add("count", "objects", "how many objects are there?", len(things), *(t.pair for t in things))
    add("count", "digits", "how many digits are there?", len(digits), *(t.pair for t in digits))
    shapes = [t.pair for t in things if not t.is_digit]
    add("count", "shapes", "how many shapes are there?", len(shapes), *shapes)
    for colour in COLOURS:
        pairs = [t.pair for t in things if t.colour == colour]
        add("count", "of a colour", f"how many {colour} objects are there?", len(pairs), *pairs)

    called = [(t, noun(t)) for t in things]
    for (t, first), (u, second) in itertools.permutations([c for c in called if c[0].is_digit], 2):
        outcome, larger = max((t.name, "first", t.colour), (u.name, "second", u.colour))[1:]
        if t.name == u.name:
            outcome = larger = "equal"
        question = f"which is larger, the {first} or the {second}?"
        add("compare", "compare", question, larger, t.pair, u.pair, outcome=outcome)
        total = int(t.name) + int(u.name)
        add("sum", "sum", f"what is the sum of the {first} and the {second}?", total, t.pair, u.pair)

    here = {t.pair for t in things}
    colours = {t.colour for t in things}
    for name, colour in itertools.product(NAMES, COLOURS):
        if (name in names or colour in colours) and (held_out or HELD_OUT[name] != colour or (name, colour) in here):
            yes = "yes" if (name, colour) in here else "no"
            add("yes_no", "is there", IS_THERE[name, colour], yes, (name, colour))
    for (t, first), (u, second) in itertools.permutations(called, 2):
        # In the same column neither is left of the other, but jitter makes it look so: not asked.
        if t.column != u.column:
            for side, yes in (("left", t.column < u.column), ("right", t.column > u.column)):
                question = f"is the {first} to the {side} of the {second}?"
                add("yes_no", "beside", question, "yes" if yes else "no", t.pair, u.pair)
        if t.row != u.row:
            for side, yes in (("above", t.row < u.row), ("below", t.row > u.row)):
                question = f"is the {first} {side} the {second}?"
                add("yes_no", "above or below", question, "yes" if yes else "no", t.pair, u.pair)
    return found


def choose(found: list[Question], used: collections.Counter, rng: np.random.Generator, held_out: bool = False):
    """Picks a scene's questions, always what was least used so far: the kind, then the template, then the outcome in
    the template, then the answer's share of the answers to this very question. `used` counts all that over the split.
    `held_out`: questions about HELD_OUT pairs come first within a kind.
    -> up to 8 Questions, at most 2 of a kind, in random order."""
    of_kind = collections.defaultdict(list)
    for i in rng.permutation(len(found)):  # settles ties
        of_kind[found[i].kind].append(found[i])
    chosen, taken = [], collections.Counter()

    def rank(q):
        old = held_out and not any(HELD_OUT[name] == colour for name, colour in q.about)
        share = used[q.question, q.answer] / (1 + used[q.question])
        return old, used[q.kind, q.template], used[q.kind, q.template, q.outcome], share

    while of_kind and len(chosen) < QUESTIONS:
        kind = min(of_kind, key=lambda k: used[k])
        best = min(of_kind[kind], key=rank)
        chosen.append(best)
        taken[kind] += 1
        used.update((kind, (kind, best.template), (kind, best.template, best.outcome)))
        used.update((best.question, (best.question, best.answer)))
        # Its mirror image, such as "blue or red" after "red or blue", would be the same question.
        same = best.template, set(best.about)
        of_kind[kind] = [q for q in of_kind[kind] if q is not best and (q.template, set(q.about)) != same]
        if not of_kind[kind] or taken[kind] == QUESTIONS_OF_A_KIND:
            del of_kind[kind]
    return [chosen[i] for i in rng.permutation(len(chosen))]


# ---- the records


def records(split: str, number: int, seed: int = 0) -> Iterator[dict]:
    """-> the records of a split in order, as in DigitsWorld's features. A scene depends on (seed, split, index) alone,
    its questions also on those asked before it in the split."""
    used, held_out = collections.Counter(), split == "compositional"
    for index in range(number):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = sample_scene(rng, scans_of(split, seed), held_out)
        questions = choose(candidates(scene, held_out), used, rng, held_out)
        yield {
            "image": png(picture(scene)),
            "captions": captions(scene, rng),
            "objects": [{key: getattr(t, key) for key in ("name", "colour", "row", "column", "scan")}
                        for t in scene.things],
            "questions": [{"kind": q.kind, "question": q.question, "answer": q.answer} for q in questions],
        }


def plain_text(record: dict) -> str:
    """-> a caption, and below it each question with its answer, which can be had from the caption alone."""
    return "\n".join([record["captions"][0], *(f"{q['question']} {q['answer']}" for q in record["questions"])]) + "\n"


@dataclasses.dataclass
class DigitsWorldConfig(tfds.core.BuilderConfig):
    """Scenes in each split, with their pictures or in words alone, or as plain text."""

    pictures: bool = True
    plain: bool = False
    train: int = 12_000
    validation: int = 400
    test: int = 600
    compositional: int = 400


class DigitsWorld(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Scenes of digits and shapes with captions and questions; see the top of this file."""

    VERSION = tfds.core.Version("1.1.0")  # raise it when a record changes: caches are kept by version
    BUILDER_CONFIGS: ClassVar = [
        DigitsWorldConfig(name="default", description="12,000 training scenes"),
        DigitsWorldConfig(name="small", description="a few scenes, for tests", train=64, validation=16, test=32,
                          compositional=32),
        DigitsWorldConfig(name="text", description="the default's scenes in words alone", pictures=False),
        DigitsWorldConfig(name="plain", description="the same, as a plain text each: a caption, questions, answers",
                          pictures=False, plain=True),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        thing = {"name": text(), "colour": text(), "row": np.int32, "column": np.int32, "scan": np.int32}
        image = tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png")
        features = ({"image": image} if self.builder_config.pictures else {}) | {
            "captions": tfds.features.Sequence(text()),
            "objects": tfds.features.Sequence(thing),
            "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
        }
        return self.dataset_info_from_configs(
            description="Small scenes of handwritten digits and drawn shapes, with captions and questions.",
            features=tfds.features.FeaturesDict({"text": text()} if self.builder_config.plain else features),
            disable_shuffling=True,  # record i is scene i; the first ones alone are balanced, too
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        for number, record in enumerate(records(split, getattr(self.builder_config, split))):
            if not self.builder_config.pictures:
                del record["image"]
            yield number, {"text": plain_text(record)} if self.builder_config.plain else record
