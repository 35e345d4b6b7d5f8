"""Several sources as one: how often each is read is `data.mixture`'s, and counted."""

import bisect
import dataclasses
import functools
import re

import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, files, objectives, packing, sources
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.data.windows import Windows

NUMBER = r"\d+\.?\d*|\.\d+"  # not 3.0.1, which is the version of one of TFDS's
ENTRY = re.compile(rf"(?P<name>.+?)(?:: *(?:first: *(?P<percent>{NUMBER}) *%|(?P<weight>{NUMBER})))?")


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    weight: float = 1.0  # how often an epoch of the mixture reads it
    share: float = 1.0  # its first records, so much of them; of a text its beginning


def entries(data: config.Data) -> list[Entry]:
    """data.mixture, or data.name alone -> Entries. "emoji: 2" is read twice an epoch, "emoji: first:10%" only its first
    tenth, "emoji" once and whole."""
    out = []
    for text in data.mixture or (data.name,):
        match = ENTRY.fullmatch(text.strip()) if data.mixture else None
        if data.mixture and not match:
            raise config.InputError(f"data.mixture: {text!r} is no 'name', 'name: weight' or 'name: first:10%'")
        entry = Entry(data.name)
        if match and match["name"] in files.FORMS:  # "folder:2024" is a folder, not a weight
            entry = Entry(text.strip())
        elif match:
            entry = Entry(match["name"], float(match["weight"] or 1), float(match["percent"] or 100) / 100)
        if not entry.weight > 0 or not 0 < entry.share <= 1:
            raise config.InputError(f"data.mixture: {text!r}: a weight is above 0, a share above 0 % and at most 100 %")
        out.append(entry)
    names = [entry.name for entry in out]
    if len(set(names)) < len(names):
        raise config.InputError(f"data.mixture={data.mixture} names a data set twice: give it one weight")
    for name in data.own:
        config.one_of("data.objectives", name, tuple(names))
    return out


def of(data: config.Data, entry: Entry) -> config.Data:
    """-> the Data of one entry alone."""
    own = data.own.get(entry.name, data.objective)
    return dataclasses.replace(data, name=entry.name, mixture=(), objective=own, objectives=())


def one(run: config.Config, name: str) -> config.Config:
    """-> the run on the data set `name` of its mixture alone; "": on the only one it has."""
    names = [entry.name for entry in entries(run.data)]
    if not name and len(names) > 1:
        raise config.InputError(f"the run reads {', '.join(names)}: say which one, such as @{names[0]}")
    if name:
        config.one_of("data set", name, tuple(names))
    return dataclasses.replace(run, data=of(run.data, Entry(name or names[0])))


def open_train(data: config.Data) -> dict[str, object]:
    """-> {name: records of its training split}."""
    try:
        return {entry.name: sources.open_split(of(data, entry), "train") for entry in entries(data)}
    except config.InputError as error:
        if not data.mixture:
            raise
        raise config.InputError(f"data.mixture, of 'name', 'name: weight' and 'name: first:10%': {error}") from error


def corpus(data: config.Data):
    """Every text that a tokenizer is trained on."""
    for entry in entries(data):
        yield from sources.corpus(of(data, entry))


def train_source(records: dict, data: config.Data, tokenizer: Tokenizer, layout: batch_lib.Layout, seed: int,
                 objective: config.Objective = config.Objective()):  # fmt: skip  # noqa: B008, frozen
    parts = []
    objectives.check({of(data, entry).objective for entry in entries(data)}, layout)
    for entry in entries(data):
        one = of(data, entry)
        parts.append(sources.from_records(records[entry.name], one, tokenizer, layout, seed, entry.share, objective))
    if objective.contrastive and not any(any(all(r.pair) for r in getattr(p, "records", ())) for p in parts):
        raise config.InputError(f"objective.contrastive={objective.contrastive} needs records of a medium and a text, "
                                f"and {', '.join(part.name for part in parts)} has none")
    return Mixture(parts, [entry.weight for entry in entries(data)], seed) if data.mixture else parts[0]


class Mixture:
    """Reads source k `weights[k]` times an epoch: of its n documents the next round(weight x n), in an order that is
    drawn anew each time all of them were read. So what epoch e holds is a function of (seed, e)."""

    def __init__(self, parts, weights, seed: int):
        self.parts, self._seed = parts, seed
        self.layout, self.names = parts[0].layout, [part.name for part in parts]
        for part in parts:
            if not packing.fits(part.needs(0), self.layout).any():
                raise config.InputError(f"{part.name}: {packing.NOTHING}, or leave it out of the mixture")
        # Windows of a text may be one fewer in another epoch.
        self._sizes = [max(n - isinstance(p, Windows), 1) for p in parts for n in [len(p.needs(0))]]
        self._taken = [max(round(w * n), 1) for w, n in zip(weights, self._sizes, strict=True)]
        self._starts = [0, *np.cumsum(self._taken).tolist()]
        self._order = functools.lru_cache(maxsize=4 * len(parts))(self._ordered)
        self.needs = functools.lru_cache(maxsize=4)(self._needs)

    def _locate(self, epoch: int, i: int) -> tuple[int, int, int]:
        """-> (source, its epoch, its document)."""
        k = bisect.bisect_right(self._starts, i) - 1
        own, at = divmod(epoch * self._taken[k] + i - self._starts[k], self._sizes[k])
        return k, own, int(self._order(k, own)[at])

    def _ordered(self, k: int, own: int) -> np.ndarray:
        return np.random.default_rng((self._seed, own, k, 2)).permutation(self._sizes[k])

    def _needs(self, epoch: int) -> np.ndarray:
        rows = []
        for i in range(self._starts[-1]):
            k, own, number = self._locate(epoch, i)
            rows.append(self.parts[k].needs(own)[number])
        return np.array(rows)

    def owner(self, i: int) -> int:
        return bisect.bisect_right(self._starts, i) - 1

    def document(self, epoch: int, i: int) -> chat.Document:
        k, own, number = self._locate(epoch, i)
        made = self.parts[k].document(own, number)
        media = tuple((at, dataclasses.replace(medium, key=(k, medium.key))) for at, medium in made.media)
        return dataclasses.replace(made, media=media)

    def read(self, medium: chat.Medium):
        k, key = medium.key
        return self.parts[k].read(dataclasses.replace(medium, key=key))


class Tally:
    """What has been read of each source: documents, positions, media, and how often all of it."""

    def __init__(self, source, plan: packing.RowPlan):
        self._source, self._plan, self._row = source, plan, 0
        self._parts = getattr(source, "parts", [source])
        fitting = [packing.fits(part.needs(0), part.layout) for part in self._parts]
        self._counts = [(max(int(fit.sum()), 1), int((~fit).sum())) for fit in fitting]
        self._totals = np.zeros((len(self._parts), 2 + len(batch_lib.MEDIA)), int)

    def to(self, row: int) -> dict[str, float]:
        """-> {"data/NAME/epochs": ..., ".../tokens", ".../media", ".../bad", ".../dropped"} of the rows before `row`;
        tiled pictures count as their parts, tokens are positions of the stream. dropped: documents of an epoch that no
        row can hold; `epochs` counts the others."""
        for r in range(self._row, row):
            epoch, numbers = self._plan.locate(r)
            needs = self._source.needs(epoch)
            for i in numbers:
                k = self._source.owner(i) if len(self._parts) > 1 else 0
                self._totals[k] += (1, needs[i][0], *needs[i][1 : 2 * len(batch_lib.MEDIA) : 2])
        self._row = max(row, self._row)
        out = {}
        for part, (count, dropped), (documents, tokens, *media) in zip(
            self._parts, self._counts, self._totals.tolist(), strict=True
        ):
            found = {"epochs": documents / count, "tokens": tokens, "media": sum(media), "bad": len(part.bad.where),
                     "dropped": dropped}  # fmt: skip
            out |= {f"data/{part.name}/{what}": value for what, value in found.items()}
        return out
