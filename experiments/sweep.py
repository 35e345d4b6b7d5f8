"""Variants of one config, trained with several seeds at an equal budget, and compared: docs/ablations.md.

An experiment file calls `main`. The same command again goes on where the sweep was, also after a kill -9.
Exit status: 0 done, 1 a run failed, 2 bad input, 75 it was asked to stop (SIGTERM, SIGINT): runs have saved.
"""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.console
import rich.live
import rich.table
from absl import flags

from experiments import ablation_report, budget, results, variants
from experiments.lanes import Lanes, Run, last_line, minutes
from gpt4v_jax import command, config, plan
from gpt4v_jax.training import lock, workdir
from gpt4v_jax.training.stop import PREEMPTED

_WORKDIR = flags.DEFINE_string("workdir", None, "the sweep's folder; a sweep there is continued", allow_override=True)
_SIZE = flags.DEFINE_string("size", "toy", "toy: a CPU | small: one GPU | paper: the published one")
_JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time; several share the cores evenly", lower_bound=1)
_PLAN = flags.DEFINE_bool("plan", False, "print the budgets and stop")
_REPORT = flags.DEFINE_bool("report", False, "run nothing: write the results of what is there")
_SMOKE = flags.DEFINE_bool("smoke", False, "two steps a run of one seed, on little data: does every variant run?")
_REALLY = flags.DEFINE_bool("really", False, "run a size that is there for its plan")

SMOKE = {"steps": 2, "batch": 2, "log_every": 1, "data.limit": 64, "data.threads": 0, "eval.limit": 2,
         "eval.every": 0, "optim.warmup": 1}  # fmt: skip
STATES = {"waiting": "", "stopped": "", "training": "cyan", "evaluating": "cyan", "done": "green", "failed": "red"}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One size of an experiment. Overrides are dotted, over `base`: those of all variants, then the variant's own."""

    base: str  # a config file of the repository, with its arguments after a colon
    variants: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    match: str = "flops"  # of budget.MATCH
    reference: str = ""  # the variant that the others are matched with; "": the first
    metric: str = "questions/accuracy"  # evaluator/metric
    split: str = "test"
    baselines: tuple[str, ...] = ("counted", "permuted")  # beside `questions`
    smoke: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what --smoke needs beyond SMOKE, over `common`
    plan_only: bool = False  # its data are not here: budgets come from the configs alone, and --really runs it

    def __post_init__(self):
        config.one_of("match", self.match, tuple(budget.MATCH))
        config.at_least(1, seeds=self.seeds)
        if self.reference:
            config.one_of("reference", self.reference, tuple(self.variants))

    @property
    def first(self) -> str:
        return self.reference or next(iter(self.variants), "")


def main(doc: str, sizes: Mapping[str, Sweep]) -> None:
    """What an experiment file ends with. doc: its docstring, whose first line is its question."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(doc)

    def start():
        config.one_of("--size", _SIZE.value, tuple(sizes))
        run(doc, _SIZE.value, sizes[_SIZE.value])

    command.run(start)


def run(doc: str, size: str, sweep: Sweep) -> None:
    """Plan, runs, results, as the flags say. Raises InputError for bad input, Leave where it ends early."""
    jax.config.update("jax_platforms", "cpu")  # of this process alone, which only counts: devices are the runs'
    if _SMOKE.value:
        sweep = dataclasses.replace(sweep, seeds=1, match="none")
    asked = configs(sweep, _SMOKE.value)
    question = results.question(sweep.metric, sweep.split, sweep.baselines)
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    data = not sweep.plan_only or _REALLY.value
    if _PLAN.value:
        console.print(plan_table(sweep, solve(sweep, asked, data)))
        return
    if _WORKDIR.value is None:
        raise config.InputError("--workdir is missing: name a folder, or look at the budgets with --plan")
    if sweep.plan_only and not _REALLY.value:
        console.print(plan_table(sweep, solve(sweep, asked, data)))
        raise config.InputError(f"--size={size} is there for its plan: run it with --really, on machines that can")
    folder, about = Path(_WORKDIR.value), definition(doc, size, sweep)
    if _REPORT.value:
        solved = load(folder, about, asked)
        finish(console, folder, sweep, question, solved, about)
        return
    workdir.create(folder)
    with lock.hold(folder):
        solved = load(folder, about, asked)
        if not solved:
            solved = solve(sweep, asked, data)
            save(folder, about, solved)
        console.print(plan_table(sweep, solved))
        left = train(console, folder, runs_of(sweep, solved), question.told)
        if left:
            raise command.Leave(f"asked to stop: {left} runs are left in {folder}; the same command goes on", PREEMPTED)
        finish(console, folder, sweep, question, solved, about)


def configs(sweep: Sweep, smoke: bool) -> dict[str, tuple[config.Config, ...]]:
    """-> {variant: the config of each of its stages}. A stage's own data set stays what it is also with --smoke."""
    common = variants.flat(sweep.common) | (variants.flat(sweep.smoke) if smoke else {})
    return variants.configs(sweep.base, sweep.variants, common, SMOKE if smoke else {})


def solve(sweep: Sweep, asked: dict[str, tuple[config.Config, ...]], data: bool) -> dict[str, budget.Solved]:
    key = budget.MATCH[sweep.match]
    fixed = {name: key in variants.flat(variants.stages(overrides)[-1]) for name, overrides in sweep.variants.items()}
    return budget.solve(asked, sweep.match, sweep.first, fixed, data)


def runs_of(sweep: Sweep, solved: dict[str, budget.Solved]) -> list[Run]:
    """One seed of every variant, then the next: what is there early can be compared."""

    def seeded(run: config.Config, k: int) -> config.Config:
        return dataclasses.replace(run, seed=run.seed + k)

    return [
        Run(name, seeded(one.run, k), one.budget.flops, tuple(seeded(run, k) for run in one.before))
        for k in range(sweep.seeds) for name, one in solved.items()
    ]  # fmt: skip


# ---- the sweep on disk


def definition(doc: str, size: str, sweep: Sweep) -> dict[str, Any]:
    """-> what the sweep is, beside its variants' configs; result.json begins with it."""
    return {
        "question": doc.strip().splitlines()[0].partition("   ")[0].strip(), "size": size, "smoke": _SMOKE.value,
        "base": sweep.base, "seeds": sweep.seeds, "match": sweep.match, "reference": sweep.first,
        "metric": sweep.metric, "split": sweep.split, "baselines": list(sweep.baselines),
    }  # fmt: skip


def save(folder: Path, about: dict, solved: dict[str, budget.Solved]) -> None:
    made = {name: dataclasses.asdict(one) for name, one in solved.items()}
    workdir.write(folder / "sweep.json", json.dumps(about | {"variants": made}, indent=1) + "\n")


def load(folder: Path, about: dict, asked: dict[str, tuple[config.Config, ...]]) -> dict[str, budget.Solved]:
    """-> the variants as the folder's sweep settled them; {} where it holds none.

    Raises InputError where it holds another sweep, naming every difference.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        if _REPORT.value:
            raise config.InputError(f"--workdir={folder} holds no sweep: run one there first")
        if (folder / "config.json").is_file():
            raise config.InputError(f"--workdir={folder} holds a run: a sweep needs a folder of its own")
        return {}
    there = json.loads(path.read_text())
    solved = {name: _solved(one) for name, one in there.pop("variants").items()}
    other = [f"{key}: {there.get(key)!r} there, {value!r} here" for key, value in about.items()
             if there.get(key) != value and key != "question"]  # fmt: skip
    for name in sorted(solved.keys() ^ asked.keys()):
        other.append(f"variant {name}: only {'there' if name in solved else 'here'}")
    for name in [name for name in asked if name in solved]:
        stages = [(*solved[name].before, solved[name].asked), asked[name]]
        if len(stages[0]) != len(stages[1]):
            other.append(f"variant {name}: {len(stages[0])} stages there, {len(stages[1])} here")
            continue
        for k, pair in enumerate(zip(*stages, strict=True), 1):
            of = f"{name}, stage {k}" if len(asked[name]) > 1 else name
            found = config.differences(*pair).items()
            other += [f"variant {of}: {key} is {a!r} there, {b!r} here" for key, (a, b) in found]
    if other:
        raise config.InputError("\n  ".join([f"--workdir={folder} holds another sweep; use another folder:", *other]))
    return solved


def _solved(values: dict) -> budget.Solved:
    made = {name: config.parse(values[name]) for name in ("asked", "run")}
    made["before"] = tuple(map(config.parse, values["before"]))
    made["spent"] = tuple(budget.Budget(**one) for one in values["spent"])
    return budget.Solved(**values | made | {"budget": budget.Budget(**values["budget"])})


# ---- what is seen while it runs


def plan_table(sweep: Sweep, solved: dict[str, budget.Solved]) -> rich.table.Table:
    """Budget of each variant, how far it is from the reference's, and what was changed for it."""
    title = f"budgets a run, {sweep.seeds} seeds; matched: {sweep.match}"
    if sweep.match != "none":
        title += f", with {sweep.first}, within {budget.LIMIT:.0%}"
    caption = "FLOPs forward and backward; full, which is matched: every query meets every key; causal: those before it"
    out = rich.table.Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
                           title_justify="left", caption_justify="left")  # fmt: skip
    out.add_column("variant", no_wrap=True)
    for name in ("parameters", "trained", "steps", "FLOPs\nfull", "FLOPs\ncausal", "text\ntokens", "pictures", "off"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("changed to match")
    for name, one in solved.items():
        out.add_row(name, *counted(one.budget), f"{one.off:+.2%}", changed(one))
        for k, spent in enumerate(one.spent, 1):
            out.add_row(f"  stage {k} of it", *counted(spent), "", "")
    return out


def counted(b: budget.Budget) -> list[str]:
    counts = ["not read" if n is None else f"{n:,}" for n in (b.text_tokens, b.images)]
    trained = "" if b.trained is None else f"{b.trained:,}"
    return [f"{b.params:,}", trained, f"{b.steps:,}", flops(b.flops), flops(b.causal), *counts]


def changed(one: budget.Solved) -> str:
    if one.own:
        return "nothing: it says this itself"
    said = {key: pair for key, pair in config.differences(one.asked, one.run).items() if pair[0] != pair[1]}
    return ", ".join(f"{key} {a:,} to {b:,}" for key, (a, b) in said.items())


def flops(count: float) -> str:
    name, size = plan.unit(count)
    return f"{count / size:,.1f} {name}"


def train(console, folder: Path, runs: list[Run], told: list[str]) -> int:
    """Runs what is not done -> how many are left, where it was asked to stop."""
    with Lanes(folder, runs, told, _JOBS.value) as lanes:
        before = {number: signal.signal(number, lambda *_: lanes.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            watch(console, lanes, folder)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return sum(run.state not in ("done", "failed") for run in runs)


def watch(console, lanes: Lanes, folder: Path) -> None:
    """A table on a terminal; elsewhere a line for each change."""
    if console.is_terminal:
        with rich.live.Live(table(lanes, folder), console=console, auto_refresh=False) as live:
            while lanes.busy():
                live.update(table(lanes, folder), refresh=True)
                time.sleep(1)
            live.update(table(lanes, folder), refresh=True)
        return
    states: dict[str, str] = {}
    while True:
        busy = lanes.busy()
        for one in lanes.runs:
            if one.state != states.get(one.name, "waiting"):
                states[one.name] = one.state
                console.print("  ".join(filter(None, row(one, folder))) + f"  {left(lanes)}")
        if not busy:
            return
        time.sleep(0.2)


def table(lanes: Lanes, folder: Path) -> rich.table.Table:
    out = rich.table.Table(title=left(lanes), box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left")
    for name in ("run", "state", "step", "loss", "minutes", "error"):
        out.add_column(name, justify="left" if name in ("run", "state", "error") else "right", no_wrap=name != "error")
    for one in lanes.runs:
        out.add_row(*row(one, folder), style=STATES[one.state])
    return out


def row(one: Run, folder: Path) -> list[str]:
    """-> name, state, step, loss, minutes, error."""
    lines = {name: last_line(folder, name) for name, _ in one.stages}
    k = max((k for k, line in enumerate(lines.values()) if line), default=0)  # the stage that it is at
    line, took = list(lines.values())[k], minutes(folder, one.stages)
    step = f"{line['step']:,} / {one.stages[k][1].steps:,}" if line else ""
    step += f" of stage {k + 1}" if line and k < len(one.before) else ""
    return [one.name, one.state, step, f"loss {line['loss']:.4f}" if line else "",
            f"{took:.1f} minutes" if took else "", one.error]  # fmt: skip


def left(lanes: Lanes) -> str:
    done, seconds = sum(one.state == "done" for one in lanes.runs), lanes.left()
    guess = "" if seconds is None else f", about {seconds / 60:,.0f} minutes left"
    return f"{done} of {len(lanes.runs)} runs done{guess if lanes.busy() else ''}"


# ---- results


def finish(console, folder: Path, sweep: Sweep, question: results.Question, solved, about: dict) -> None:
    """Writes the results and says them. Raises Leave where a run failed."""
    runs = runs_of(sweep, solved)
    found = results.result(folder, question, solved, runs, about)
    ablation_report.write(folder, found, question, solved, runs, _command())
    console.print(ablation_report.terminal(found, question))
    for line in [*ablation_report.verdicts(found), "", "the ledger's row:", ablation_report.ledger(found)]:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    if found["errors"]:
        told = "\n".join(f"{name}: {error}" for name, error in found["errors"].items())
        raise command.Leave(f"{len(found['errors'])} runs failed (logs/): the same command tries them again\n{told}", 1)


def _command() -> str:
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name if spec else 'experiments.NAME'}"
