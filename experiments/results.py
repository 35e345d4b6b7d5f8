"""What a sweep has found: read from its runs, compared, and written as result.json and result.md.

Both depend on what was computed alone: not on time, machine, folder, or on how often the sweep was stopped.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments import compare, lanes
from experiments.budget import Solved
from gpt4v_jax import config
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.config.run import METRICS
from gpt4v_jax.data import mixture, sources
from gpt4v_jax.eval import common
from gpt4v_jax.training import metrics, steps

LEAST = r"loss.*|wer"  # metrics of which the least is the best
BY_KIND = ("retrieval", "zero_shot", "embedding")  # evaluators whose items are not in the records' order


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of every run: `evaluator`/`metric` on `split`, and the blind baselines beside it."""

    evaluator: str  # may name a data set of a mixture: questions@easyvqa
    metric: str
    split: str
    baselines: tuple[str, ...]

    @property
    def least_is_best(self) -> bool:
        return bool(re.fullmatch(LEAST, self.metric.partition("/")[0]))

    @property
    def told(self) -> list[str]:
        """What gpt4v_jax.evaluate is told."""
        return [f"--split={self.split}", f"--evaluator={','.join((self.evaluator, *self.baselines))}"]


@dataclasses.dataclass(frozen=True)
class Found:
    """One run's results. values: {evaluator: the metric}; losses: the same of what each says of its loss; kinds:
    {evaluator: {kind of question: (right, asked)}}; right: of the question's own evaluator, in the items' order."""

    step: int  # of the checkpoint that was evaluated
    values: dict[str, float]
    losses: dict[str, float]
    kinds: dict[str, dict[str, tuple[int, int]]]
    right: np.ndarray
    loss: float  # of the last training step


def question(metric: str, split: str, baselines: tuple[str, ...]) -> Question:
    evaluator, slash, name = metric.partition("/")
    if "@" in metric:  # names of data sets have slashes, too
        evaluator, slash, name = metric.rpartition("/")
    short, data_set = eval_lib.named(evaluator)
    config.one_of("metric", name.partition("/")[0], METRICS)
    at = f"@{data_set}" if data_set else ""
    beside = tuple(eval_lib.named(x)[0] + at for x in baselines if short == "questions")
    return Question(evaluator, name, split, beside)


def find(folder: Path, run: lanes.Run, asked: Question) -> Found | None:
    """-> a run's results; None where it is not done."""
    if lanes.said(folder, run.name).get("state") != "done":
        return None
    values, losses, kinds, main = {}, {}, {}, None
    for evaluator in (asked.evaluator, *asked.baselines):
        short, data_set = eval_lib.named(evaluator)
        several = len(mixture.entries(run.config.data)) > 1
        title = f"{data_set.replace('/', '-')}-{asked.split}" if several else asked.split
        step = steps_of(folder / "runs" / run.name / "eval" / f"{title}-{short}")[-1]
        path = folder / "runs" / run.name / "eval" / f"{title}-{short}" / f"{step}.json"
        result = common.Result(**json.loads(path.read_text()))
        if asked.metric in result.metrics:
            values[evaluator] = float(result.metrics[asked.metric])
        if "loss" in result.metrics and asked.metric != "loss":
            losses[evaluator] = float(result.metrics["loss"])
        kinds[evaluator] = {kind: tuple(n) for kind, n in sorted(result.kinds.items())}
        main = main or (step, result)
    step, result = main
    if asked.evaluator not in values:
        raise config.InputError(f"{asked.evaluator} gives no {asked.metric!r}, but {', '.join(result.metrics)}")
    loss = float(lanes.last_line(folder, run.name).get("loss", np.nan))
    right = np.array(result.right, bool) if asked.metric == "accuracy" else np.array([], bool)
    return Found(step, values, losses, kinds, right, loss)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.json"))


def records(run: config.Config, asked: Question, items: int) -> np.ndarray | None:
    """-> [items] whose each question is, from the split's records; None where they do not say it, or where an evaluator
    goes by kinds, not by records."""
    if eval_lib.named(asked.evaluator)[0] in BY_KIND:
        return None
    try:
        data = mixture.one(run, eval_lib.named(asked.evaluator)[1]).data
        split = sources.open_split(dataclasses.replace(data, limit=0), asked.split)
        each = [len(sources.asked(record)) for record in sources.usable(split, dataclasses.replace(data, limit=0))]
    except (config.InputError, KeyError):
        return None
    return np.repeat(np.arange(len(each)), each) if sum(each) == items else None


# ---- result.json


def result(folder: Path, asked: Question, solved: dict[str, Solved], runs: list[lanes.Run], about: dict) -> dict:
    """-> everything that result.json says. about: what the sweep is."""
    found = {name: {r.config.seed: find(folder, r, asked) for r in runs if r.variant == name} for name in solved}
    errors = {r.name: lanes.said(folder, r.name)["error"] for r in runs
              if lanes.said(folder, r.name).get("state") == "failed"}  # fmt: skip
    there = [one for by_seed in found.values() for one in by_seed.values() if one]
    whose = records(next(iter(solved.values())).run, asked, len(there[0].right)) if there and len(there[0].right) \
        else None  # fmt: skip
    pairs = [_pair(one, other, found, whose, asked) for one, other in itertools.combinations(solved, 2)]
    pairs = [pair for pair in pairs if pair]
    for pair, stands in zip(pairs, compare.holm([pair["p"] for pair in pairs]), strict=True):
        pair["stands_among_all"] = stands
    items = int(max((len(one.right) for one in there), default=0))
    return about | {
        "items": items,
        "records": None if whose is None else int(whose.max()) + 1,
        "runs_done": len(there),
        "runs": len(runs),
        "variants": {name: _variant(found[name], one, solved[about["reference"]]) for name, one in solved.items()},
        "pairs": pairs,
        "errors": errors,
    }


def _variant(found: dict[int, Found | None], one: Solved, reference: Solved) -> dict[str, Any]:
    seeds = {seed: f for seed, f in found.items() if f}
    out = {
        "differs_in": {key: [a, b] for key, (a, b) in config.differences(reference.run, one.run).items()},
        "budget": dataclasses.asdict(one.budget), "off": one.off, "fixed_by_itself": one.own,
        "before": [_stage(run, spent, one.run) for run, spent in zip(one.before, one.spent, strict=True)],
        "seeds": {str(seed): {"step": f.step, "training_loss": f.loss, **f.values} for seed, f in seeds.items()},
    }  # fmt: skip
    if seeds:
        names = list(next(iter(seeds.values())).values)
        out["mean"] = {name: list(compare.over_seeds([f.values[name] for f in seeds.values()])) for name in names}
        out["loss"] = {name: list(compare.over_seeds([f.losses[name] for f in seeds.values()]))
                       for name in next(iter(seeds.values())).losses}  # fmt: skip
        out["kinds"] = {
            name: {kind: float(np.mean([np.divide(*f.kinds[name][kind]) for f in seeds.values()])) for kind in kinds}
            for name, kinds in next(iter(seeds.values())).kinds.items()
        }
    return out


def _stage(run: config.Config, spent, last: config.Config) -> dict[str, Any]:
    """-> what a stage before was, beside the last one."""
    differs = {key: [a, b] for key, (a, b) in config.differences(last, run).items()}
    return {"differs_in": differs, "budget": dataclasses.asdict(spent)}


def _pair(one: str, other: str, found, whose, asked: Question) -> dict[str, Any] | None:
    """-> how `one` does beside `other`, over the seeds that both have; None where there is none."""
    both = [seed for seed, f in found[one].items() if f and found[other].get(seed)]
    if not both:
        return None
    values = [[found[name][seed].values[asked.evaluator] for seed in both] for name in (one, other)]
    right = [[found[name][seed].right for seed in both] for name in (one, other)]
    sizes = {len(r) for side in right for r in side}
    paired = tuple(map(np.array, right)) if len(sizes) == 1 and sizes != {0} else None
    made = compare.difference(*values, paired, whose)
    return {"one": one, "other": other, "verdict": compare.verdict(made, asked.least_is_best), **made._asdict()}


def turned(pair: dict) -> dict:
    """-> the same pair, seen from its other side."""
    low, high = (None if pair[end] is None else 0.0 - pair[end] for end in ("high", "low"))  # 0.0 - 0.0 has no sign
    verdict = {compare.BETTER: compare.WORSE, compare.WORSE: compare.BETTER}.get(pair["verdict"], pair["verdict"])
    return pair | {"one": pair["other"], "other": pair["one"], "mean": 0.0 - pair["mean"], "low": low, "high": high,
                   "verdict": verdict}  # fmt: skip


# ---- curves and time, which only the page shows


def curve(folder: Path, run: lanes.Run, name: str) -> list[dict]:
    """-> the lines of a run's log that have `name`, without those that are there because it was resumed."""
    every = run.config.log_every
    return [line for line in metrics.read(folder / "runs" / run.name)
            if name in line and ("/" in name or line["step"] % every == 0 or line["step"] in (1, run.config.steps))]


def seconds(folder: Path, runs: list[lanes.Run]) -> dict[str, dict]:
    """-> {run: {"minutes" of training, of all processes that worked on it; "steps" that are done}}, of all stages."""
    return {r.name: {"minutes": lanes.minutes(folder, r.stages),
                     "steps": sum(max(steps.finished(folder / "runs" / name / "checkpoints"), default=0)
                                  for name, _ in r.stages)}
            for r in runs}  # fmt: skip
