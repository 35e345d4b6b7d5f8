"""A sweep whose runs are made up: what training and evaluation leave on disk, drawn from each run's config."""

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from experiments import lanes, sweep
from gpt4v_jax import config
from gpt4v_jax.eval import common
from gpt4v_jax.training import checksums, steps

DOC = "Does a wider model do better?   python -m tests.experiments.fake\n\nMore words."
BASE = "configs/tiny.py"
KINDS = ("count", "what", "where")


def made(data: config.Data, variants: dict, **more) -> sweep.Sweep:
    """-> a sweep of configs/tiny.py on a data set that is prepared."""
    common_ = {"data.cache": data.cache, "data.threads": 0, "steps": 4} | more.pop("common", {})
    return sweep.Sweep(BASE, variants, common_, **{"seeds": 2, "baselines": ("counted", "permuted")} | more)


class Runner:
    """In the place of processes. said: (command, run) in their order; cores: those of each; fails: {(command, run):
    exit status, once}."""

    def __init__(self, items: int):
        self.said, self.cores, self.fails, self._items = [], [], {}, items

    def __call__(self, lanes_, line: list[str], log: Path) -> int:
        command, told = line[2].rpartition(".")[2], dict(x.removeprefix("--").split("=", 1) for x in line[3:])
        folder = Path(told["workdir"])
        self.said.append((command, folder.name))
        self.cores.append(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set())
        if status := self.fails.pop((command, folder.name), 0):
            log.write_text(f"something\nerror: no luck in {folder}\n")
            return status
        if command == "train":
            self._train(folder, config.from_json(Path(told["config"].partition(":")[2]).read_text()))
        else:
            run = config.from_json((folder / "config.json").read_text())
            for k, evaluator in enumerate(told["evaluator"].split(",")):
                self._evaluate(folder, run, f"{told['split']}-{evaluator}", k)
        return 0

    def _train(self, folder: Path, run: config.Config) -> None:
        if run.init_from.run:  # as training has it: the stage before is whole, and its tokens are this one's
            before = Path(run.init_from.run)
            assert steps.finished(before / "checkpoints") and run.data.tokenizer == str(before / "tokenizer.json")
        at = folder / "checkpoints" / str(run.steps)
        at.mkdir(parents=True)
        (at / checksums.NAME).touch()
        (folder / "config.json").write_text(config.to_json(run))
        (folder / "environment.json").write_text(json.dumps(
            {"commit": "abc1234", "python": "3.11.9", "packages": {"jax": "0.10.2"}, "devices": ["cpu"], "cores": 2}))
        rng, lines = np.random.default_rng((run.seed, run.model.backbone.width)), []
        for step in range(1, run.steps + 1):
            share = step / run.steps
            loss = 6 * np.exp(-2 * share) + 20 / run.model.backbone.width + 0.05 * rng.standard_normal()
            lines.append({"step": step, "loss": loss, "accuracy": share / 2, "minutes": share * rng.uniform(3, 3.3)})
        for step in {max(run.steps // 2, 1), run.steps}:
            lines.append({"step": step, "questions/accuracy": step / run.steps * self._share(run), "minutes": 3.5})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def _share(run: config.Config) -> float:
        return 0.3 + 0.15 * np.log2(run.model.backbone.width / 16) + 0.012 * run.seed

    def _evaluate(self, folder: Path, run: config.Config, name: str, k: int) -> None:
        hard = np.random.default_rng(1).uniform(size=self._items)  # of each item, for all runs
        noise = np.random.default_rng((run.seed, k)).normal(0, 0.1, self._items)
        right = hard + noise < (self._share(run) if not k else 0.2)
        kinds = {kind: (int(right[i::3].sum()), len(right[i::3])) for i, kind in enumerate(KINDS)}
        result = common.Result({"accuracy": right.mean(), "loss": 1.0}, kinds, tuple(map(bool, right)))
        path = folder / "eval" / name / f"{run.steps}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"metrics": result.metrics, "kinds": kinds, "right": list(result.right)}))


def run(monkeypatch, made_: sweep.Sweep, folder: Path, runner: Runner, *args: str) -> int:
    """Runs the command in this process -> its exit status."""
    monkeypatch.setattr(lanes.Lanes, "_process", functools.partialmethod(lambda self, *a: runner(self, *a)))
    monkeypatch.setattr(sys, "argv", ["fake", f"--workdir={folder}", *args])
    try:
        sweep.main(DOC, {"toy": made_})
    except SystemExit as ended:
        return ended.code
    finally:
        flags.FLAGS.unparse_flags()
        for name in ("workdir", "size", "jobs", "plan", "report", "smoke", "really"):
            flags.FLAGS[name].value = flags.FLAGS[name].default
    return 0


if __name__ == "__main__":  # a page to look at
    with pytest.MonkeyPatch.context() as patch:
        wide = {f"width_{w}": {"model.backbone.width": w} for w in (32, 16, 36, 64)}
        sweep_ = made(config.Data(), wide, seeds=3, common={"steps": 40})
        print(run(patch, sweep_, Path(sys.argv[1]), Runner(600)))
