"""Restore, run the config's evaluators, print one table: python -m gpt4v_jax.evaluate --workdir runs/digits_world

Results go to <workdir>/eval/<split>-<evaluator>/<step>.json.
"""

import dataclasses
import json
from pathlib import Path

import jax
import rich.console
import rich.table
from absl import flags

from gpt4v_jax import config
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.data import sources
from gpt4v_jax.eval import common
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training import workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_SPLITS = flags.DEFINE_list("split", None, "splits, comma-separated; otherwise all but train")
_EVALUATORS = flags.DEFINE_list("evaluator", None, "evaluators, comma-separated; otherwise the config's and `counted`")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; otherwise the best", allow_override=True)


def evaluate(folder: Path, splits: list[str], evaluators: list[str], step: int | None = None) -> dict[str, dict]:
    """-> {split: {evaluator: Result}}, each also written to the workdir. Empty lists: see the flags."""
    trained = workdir.restore(folder, step)
    run = trained.run
    splits = splits or [name for name in sources.splits(run.data) if name != "train"]
    evaluators = evaluators or [*run.eval.evaluators, *(["counted"] if run.model.image.size else [])]
    for name in evaluators:
        config.one_of("evaluator", name, tuple(eval_lib.EVALUATORS))
    eval_step = jax.jit(step_lib.make_eval_step(trained.model))
    results: dict[str, dict] = {}
    for split in splits:
        source = common.open_source(run, split, trained.tokenizer, trained.layout)
        subject = common.Subject(
            run, trained.layout, trained.tokenizer, trained.mesh, eval_step, trained.params, source, split
        )
        results[split] = {}
        for name in evaluators:
            result = results[split][name] = eval_lib.EVALUATORS[name](subject)
            text = json.dumps(dataclasses.asdict(result), default=float)
            workdir.write(folder / "eval" / f"{split}-{name}" / f"{trained.step}.json", text)
    return results


def table(results: dict[str, dict], step: int | str = "") -> rich.table.Table:
    """One row a split and kind, one column an evaluator: share right with its 95 % interval; or the loss."""
    names = list(next(iter(results.values())))
    out = rich.table.Table("split", "kind", "asked", *names, title=f"step {step}" if step else None)
    for split, by_name in results.items():
        kinds = next(iter(by_name.values())).kinds
        for kind in [*sorted(kinds), "all"] if kinds else []:
            cells = [_share(*_counts(by_name[name], kind)) for name in names]
            out.add_row(split, kind, str(_counts(by_name[names[0]], kind)[1]), *cells, end_section=kind == "all")
        if any("loss" in by_name[name].metrics for name in names):
            losses = [f"{by_name[n].metrics['loss']:.4f}" if "loss" in by_name[n].metrics else "" for n in names]
            out.add_row(split, "loss (nats a token)", "", *losses, end_section=True)
    return out


def _counts(result: common.Result, kind: str) -> tuple[int, int]:
    if kind != "all":
        return result.kinds.get(kind, (0, 0))
    return sum(right for right, _ in result.kinds.values()), sum(asked for _, asked in result.kinds.values())


def _share(right: int, asked: int) -> str:
    if not asked:
        return ""
    low, high = common.interval(right, asked)
    return f"{right / asked:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    results = evaluate(Path(_WORKDIR.value), _SPLITS.value or [], _EVALUATORS.value or [], _STEP.value)
    rich.console.Console().print(table(results))


if __name__ == "__main__":
    config.run(main, required=("workdir",))
