"""The scenes of digits_world: how they are drawn at random, and their pictures. The words are digits_world.py's.

The digits are the 1,797 scans of scikit-learn's `load_digits` (8x8 pixels, 16 levels), the shapes are drawn here. A
scene is a 72x72 picture of 3x3 cells with 1-5 objects, each in its own cell. There is at most one digit and at most one
shape of a colour, so that "the red digit" is one object; a digit and a shape may share it.

    the scene      Thing, Scene, sample_scene
    the picture    digit_mask, shape_mask, picture
"""

import functools
import io
import math
from typing import NamedTuple

import numpy as np
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
# One colour for each name; 3 and 8 have no common divisor, so the colours are spread.
HELD_OUT = {name: tuple(COLOURS)[3 * i % 8] for i, name in enumerate(NAMES)}
SPLITS = ("train", "validation", "test", "compositional")

CELL = 24  # pixels
SIDE = 3 * CELL
MARGIN = 0.5  # pixels between an object and the border of its cell


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
