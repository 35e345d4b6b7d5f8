"""Restore, run the config's evaluators, print a table a split: python -m gpt4v_jax.evaluate --workdir runs/digits_world

Results go to <workdir>/eval/<split>-<evaluator>/<step>.json.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import rich.box
import rich.console
import rich.table
from absl import flags

from gpt4v_jax import command, config, sharding
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.data import mixture, sources
from gpt4v_jax.eval import common
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training import workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_SPLITS = flags.DEFINE_list("split", None, "splits, comma-separated; otherwise all but train")
_EVALUATORS = flags.DEFINE_list("evaluator", None, "evaluators, comma-separated; otherwise the config's and `counted`")
_PROMPTS = flags.DEFINE_multi_string(
    "prompts", None, 'of zero_shot, such as "a picture of {}"; several: the mean of their vectors; else eval.prompts'
)
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; otherwise the best", allow_override=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "this is one of several processes: docs/cluster.md", allow_override=True
)


def evaluate(folder: Path, splits: list[str], evaluators: list[str], step: int | None = None,
             prompts: tuple[str, ...] = ()) -> dict[str, dict]:  # fmt: skip
    """-> {split: {evaluator: Result}}, each also written to the workdir. Empty lists: see the flags."""
    trained = workdir.restore(folder, step)
    run, results = trained.run, {}
    if prompts:
        run = dataclasses.replace(run, eval=dataclasses.replace(run.eval, prompts=prompts))
    names = [entry.name for entry in mixture.entries(run.data)]
    for evaluator in evaluators:
        mixture.one(run, eval_lib.named(evaluator)[1])  # it says so where there is no such data set
    for name in names:
        at = f"@{name}" if len(names) > 1 else ""  # of a mixture each evaluator names its data set
        wanted = [x for x in evaluators or run.eval.evaluators if x.endswith(at)]
        if not evaluators and f"questions{at}" in wanted:
            wanted.append(f"counted{at}")
        if wanted:
            results |= _one(folder, trained, mixture.one(run, name), name if at else "", splits, wanted)
    asked = evaluators or run.eval.evaluators
    if not asked:
        raise config.InputError("no evaluator is named, neither by the run's config nor by --evaluator: name one")
    if not results:
        of = f" of {', '.join(names)}" if len(names) > 1 else ""
        raise config.InputError(f"{', '.join(asked)}: none of them finds a data set{of} with a split of --split="
                                f"{','.join(splits) or 'all but train'}; of a mixture write questions@{names[0]}")
    return results


def _one(folder: Path, trained: workdir.Trained, run: config.Config, name: str, splits, evaluators):
    """The evaluators of one data set on its splits; of a mixture the splits are called NAME-SPLIT."""
    with sharding.first_alone("data"):
        there = sources.splits(run.data)
    splits = splits or [split for split in there if split != "train"]
    if name:  # not every data set of a mixture has each split
        splits = [split for split in splits if split in there]
    eval_step = jax.jit(step_lib.make_eval_step(trained.model))
    embed_step = jax.jit(step_lib.make_embed_step(trained.model))
    results: dict[str, dict] = {}
    for split in splits:
        source = common.open_source(run, split, trained.tokenizer, trained.layout)
        subject = common.Subject(
            run, trained.layout, trained.tokenizer, trained.mesh, eval_step, trained.params, source, split,
            embed_step=embed_step,
        )
        title = f"{name.replace('/', '-')}-{split}" if name else split
        results[title] = {}
        for evaluator in evaluators:
            eval_lib.check(evaluator, source, run.data.name, trained.run.data.kinds)
            result = eval_lib.run(evaluator, subject)
            short = eval_lib.named(evaluator)[0]
            results[title][short] = result
            text = json.dumps(dataclasses.asdict(result), default=float)
            if sharding.is_first():
                workdir.write(folder / "eval" / f"{title}-{short}" / f"{trained.step}.json", text)
    return results


def table(split: str, by_name: dict[str, common.Result]) -> rich.table.Table:
    """One row a kind, one column an evaluator: share right with its 95 % interval; and the loss."""
    style = {"title_justify": "left", "box": rich.box.SIMPLE_HEAD, "padding": (0, 0, 0, 1)}
    out = rich.table.Table(title=f"{split} split", **style)
    out.add_column("kind", no_wrap=True)
    for name in ("asked", *by_name):
        out.add_column(name, justify="right", no_wrap=True)
    kinds = sorted({kind for result in by_name.values() for kind in result.kinds})
    for kind in [*kinds, "all"] if kinds else []:
        cells = [
            "{:.3f} {:.3f}-{:.3f}".format(*result.share(kind)) if result.counts(kind)[1] else ""
            for result in by_name.values()
        ]
        asked = max(result.counts(kind)[1] for result in by_name.values())
        out.add_row(kind, f"{asked:,}", *cells)
    losses = [f"{result.metrics['loss']:.4f}" if "loss" in result.metrics else "" for result in by_name.values()]
    if any(losses):
        out.add_row("nats a token", "", *losses)
    for metric, label in common.OTHERS.items():
        cells = []
        for result in by_name.values():
            m = result.metrics
            interval = " {:.3f}-{:.3f}".format(m[f"{metric}/low"], m[f"{metric}/high"]) if f"{metric}/low" in m else ""
            cells.append(f"{m[metric]:.4f}{interval}" if metric in m else "")
        if any(cells):
            out.add_row(label, "", *cells)
    return out


def main() -> None:
    with sharding.distributed(_DISTRIBUTED.value):
        results = evaluate(Path(_WORKDIR.value), _SPLITS.value or [], _EVALUATORS.value or [], _STEP.value,
                           tuple(_PROMPTS.value or ()))  # fmt: skip
    width = None if sys.stdout.isatty() else 160  # a log has room for every number
    console = rich.console.Console(highlight=False, width=width, quiet=not sharding.is_first())
    for split, by_name in results.items():
        console.print(table(split, by_name))


if __name__ == "__main__":
    command.run(main, required=("workdir",))
