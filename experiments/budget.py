"""Equal budgets: what a variant's training costs, and the steps or the width at which all cost the same.

FLOPs are those that `gpt4v_jax.plan` counts (model/flops.py): forward and backward, attention counted whole, so a mask
does not change them. Text tokens (positions of the stream, and of a source, that hold no medium) and pictures are those
of the documents in the row plan of the first seed's first epoch, which later epochs repeat: they draw other questions,
about as long.
"""

import bisect
import dataclasses
import functools
import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.variants import BEFORE
from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, plan, sharding, train
from gpt4v_jax.model import flops
from gpt4v_jax.training import optim

MATCH = {  # what is made equal -> the key that is solved for
    "flops": "steps", "text_tokens": "steps", "images": "steps", "steps": "steps",
    "params": "model.backbone.width", "none": "",  # and, where widths are too far apart, the MLP's hidden size
}  # fmt: skip
LIMIT = 0.02  # how far budgets may be apart
MOST = 10**9  # steps


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run of `steps` steps takes; None where no data were read."""

    params: int
    steps: int
    flops: int  # forward and backward, attention counted whole
    causal: int  # the same with attention counted through its mask
    positions: int  # of the stream, padding among them
    text_tokens: int | None = None
    images: int | None = None
    trained: int | None = None  # of the parameters


@dataclasses.dataclass(frozen=True)
class Solved:
    """A variant whose budget is settled."""

    asked: config.Config  # as base and overrides say it
    run: config.Config
    budget: Budget  # of all its stages
    off: float  # its budget less the reference's, as a share of that
    own: bool = False  # it says itself what would be solved for, and stays so
    before: tuple[config.Config, ...] = ()  # the stages before `run`
    spent: tuple[Budget, ...] = ()  # of each of them


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a run reads. text, images [n + 1]: how many an epoch's rows before row r hold."""

    vocab: int
    text: np.ndarray
    images: np.ndarray

    def before(self, row: int) -> tuple[int, int]:
        """-> (text tokens, pictures) of the run's rows before `row`."""
        epochs, rest = divmod(row, len(self.text) - 1)
        return tuple(int(epochs * x[-1] + x[rest]) for x in (self.text, self.images))


def budget(run: config.Config, data: bool = True) -> Budget:
    """data: read the data for its vocabulary and its rows; else the vocabulary is plan's, and there are no counts."""
    if data:
        rows = read(run)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=rows.vocab))
        text, images = rows.before(run.batch * run.steps)
    else:
        run, text, images = plan.with_vocabulary(run)[0], None, None
    layout = batch_lib.layout(run.model, run.data)
    full, causal = (run.steps * flops.train_step(run.model, layout, run.batch, count) for count in (False, True))
    params, trained = _params(run.model, run.optim, run.lora)
    positions = run.steps * run.batch * run.model.context
    return Budget(params, run.steps, full, causal, positions, text, images, trained)


def total(stages: list[Budget]) -> Budget:
    """-> the budget of runs one after the other; parameters, and how many are trained, are the last one's."""

    def add(name: str) -> int | None:
        each = [getattr(one, name) for one in stages]
        return None if None in each else sum(each)

    names = [field.name for field in dataclasses.fields(Budget) if field.name not in ("params", "trained")]
    return dataclasses.replace(stages[-1], **{name: add(name) for name in names})


@functools.lru_cache(maxsize=256)
def _params(model: config.Model, optim_: config.Optim, lora: config.LoRA) -> tuple[int, int]:
    """-> how many there are, LoRA's among them, and how many of them are trained."""
    params = plan.abstract_params(model, lora)
    return sum(flops.parameters(params).values()), optim.moving(optim_, lora, params)


_READ: dict[tuple, Rows] = {}  # variants that read the same are read once


def read(run: config.Config) -> Rows:
    """Opens the run's data as training does, so that what is wrong with them is said before anything runs."""
    if run.init_from.run == BEFORE:  # nothing is there yet to be read
        run = dataclasses.replace(run, init_from=config.InitFrom())
    key = run.seed, run.data, run.objective, run.eval, run.init_from, batch_lib.layout(run.model, run.data)
    if key not in _READ:
        _READ[key] = _rows(train.open_stream(run, Path("none"), sharding.make_mesh(config.Mesh()), resumes=False))
    return _READ[key]


def _rows(stream: train.Stream) -> Rows:
    needs, rows, layout = stream.source.needs(0), stream.plan.epoch(0), stream.layout
    text, images = needs[:, 0].copy(), np.zeros(len(needs), int)
    if layout.source:  # prompts that an encoder reads, and the media among them
        text += needs[:, -1]
    for i in (i for row in rows for i in row) if layout.media else ():
        for _, medium in stream.source.document(0, i).media:
            text[i] -= layout.count(medium.modality, medium.shape)
            images[i] += medium.modality == "image"
    sums = [np.cumsum([0, *(int(x[row].sum()) for row in rows)]) for x in (text, images)]
    return Rows(stream.run.model.vocab, *sums)


# ---- solving


def solve(asked: dict[str, tuple[config.Config, ...]], match: str, reference: str, fixed: dict[str, bool],
          data: bool = True) -> dict[str, Solved]:  # fmt: skip
    """-> {variant: as it is to run}. asked: the stages of each, of which the last is solved for what those before it
    leave. fixed: which variants say themselves what would be solved for.

    Raises InputError where a budget cannot come within LIMIT of the reference's, naming the nearest.
    """
    if match in ("text_tokens", "images") and not data:
        raise config.InputError(f"match={match!r} counts what is read, and this size reads no data: match flops")
    first = total([budget(run, data) for run in asked[reference]])
    if match != "none" and not getattr(first, match):
        raise config.InputError(f"match={match!r}: {reference} has none of them; match something that it has")
    solved, wrong = {}, []
    for name, (*before, last) in asked.items():
        own, spent, run = fixed[name] and name != reference, [budget(run, data) for run in before], last
        if match != "none" and not own and name != reference:
            taken = sum(getattr(one, match) for one in spent) if match != "params" else 0
            if taken >= getattr(first, match):
                wrong.append(f"{name}: its stages before the last take {taken / getattr(first, match):.0%} of the "
                             f"{match} of {reference} already: give them fewer steps")  # fmt: skip
                continue
            if match == "params" and before:
                raise config.InputError(f"match='params' changes the model, whose weights {name} has from the stage "
                                        "before: match flops, or steps")  # fmt: skip
            run = _nearest(run, match, getattr(first, match) - taken, data)
        made = total([*spent, budget(run, data)])
        off = 0.0 if match == "none" else getattr(made, match) / getattr(first, match) - 1
        if abs(off) > LIMIT and not own:
            key = MATCH[match]
            value = run.steps if key == "steps" else run.model.backbone.width
            wrong.append(f"{name}: {key}={value:,} is the nearest, and its {match} are {off:+.1%} of {reference}'s")
        solved[name] = Solved(last, run, made, off, own, tuple(before), tuple(spent))
    if wrong:
        raise config.InputError("\n  ".join([
            f"match={match!r} cannot be met within {LIMIT:.0%}: give the base more steps or width, or match otherwise",
            *wrong]))  # fmt: skip
    return solved


def _nearest(run: config.Config, match: str, target: int, data: bool) -> config.Config:
    """-> the run with the steps, or the width, whose budget is nearest to the target."""
    if MATCH[match] == "steps":
        value = operator.attrgetter(match)
        return _closest(lambda k: dataclasses.replace(run, steps=k), 1, lambda r: value(budget(r, data)), target)
    # Heads stay as many, and rope turns pairs of a head's dimensions, over three axes each of its own.
    unit = run.model.backbone.heads * (2 if run.model.position == "rope" else 1)

    def params(run: config.Config) -> int:
        return budget(run, data).params

    wide = _closest(lambda k: with_width(run, k * unit), run.model.axes, params, target)
    if abs(params(wide) / target - 1) <= LIMIT or run.model.backbone.hidden != 4 * run.model.backbone.width:
        return wide  # a hidden size of its own stays
    return _closest(lambda k: with_hidden(wide, k), 1, params, target)  # widths are too far apart


def _closest(made: Callable[[int], config.Config], low: int, value: Callable[[config.Config], int], target: int):
    """-> made(k) whose value, which grows with k, is nearest to the target, of k from `low` on."""
    high = low
    while value(made(high)) < target and high < MOST:
        low, high = high, 2 * high
    k = low + bisect.bisect_left(range(low, high + 1), target, key=lambda k: value(made(k)))
    return min((made(j) for j in (k - 1, k) if low <= j <= high), key=lambda r: abs(value(r) - target))


def with_hidden(run: config.Config, hidden: int) -> config.Config:
    backbone = dataclasses.replace(run.model.backbone, hidden=hidden)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))


def with_width(run: config.Config, width: int) -> config.Config:
    """-> the run with another width of its backbone, and of its source, which has the same. What the config had said as
    width / heads and as 4 x width is that of the new width; a hidden size or a head of its own stays."""

    def wide(stack: config.Backbone | None) -> config.Backbone | None:
        if not stack:
            return None
        derived = {"head_dim": stack.width // stack.heads, "hidden": 4 * stack.width}
        return dataclasses.replace(
            stack, width=width, **{name: 0 for name, value in derived.items() if getattr(stack, name) == value}
        )

    model = dataclasses.replace(run.model, backbone=wide(run.model.backbone), source=wide(run.model.source))
    return dataclasses.replace(run, model=model)
