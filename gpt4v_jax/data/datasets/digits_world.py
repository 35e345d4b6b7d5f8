"""digits_world: small scenes of handwritten digits and drawn shapes, with captions and questions.

Made here, without a download: the scenes are scenes.py's. Three splits differ in their scans: no scan of `test` occurs
in `train` or `validation`. `compositional` has the scans of `test` and asks about the pairs of HELD_OUT, such as a
green 1, that the other splits never show or mention. Questions are chosen so that kinds are even and answers are even
for each question: guessing them blind does not pay.

    the words      captions, candidates, choose
    the records    records, DigitsWorld
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import scenes
from gpt4v_jax.data.datasets.scenes import COLOURS, HELD_OUT, NAMES, SPLITS, Scene, Thing

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
PHRASES = ("in the top left", "at the top", "in the top right", "on the left", "in the centre", "on the right",
           "in the bottom left", "at the bottom", "in the bottom right")
KINDS = ("what", "shape", "where", "colour", "count", "compare", "sum", "yes_no")
CAPTIONS, QUESTIONS, QUESTIONS_OF_A_KIND = 4, 8, 2  # of a scene, at most


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
        scene = scenes.sample_scene(rng, scenes.scans_of(split, seed), held_out)
        questions = choose(candidates(scene, held_out), used, rng, held_out)
        yield {
            "image": scenes.png(scenes.picture(scene)),
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
        image = tfds.features.Image(shape=(scenes.SIDE, scenes.SIDE, 3), encoding_format="png")
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
