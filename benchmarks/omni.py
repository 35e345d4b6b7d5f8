"""docs/results/omni.md: one model on four modalities beside a model for each: python -m benchmarks.omni --runs runs

The workdirs are those that the first lines of configs/omni_tiny.py name, each trained and evaluated (`make omni` does
it). What blanking and exchanging media does to the answers of the same and of other data sets is computed here, from
the joint model.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import modalities
from benchmarks.runs import make_runs
from gpt4v_jax import command
from gpt4v_jax.data import chat, mixture, packing, sources
from gpt4v_jax.eval import common, questions
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training import workdir

_RUNS = flags.DEFINE_string("runs", "runs", "the folder of the workdirs", allow_override=True)
_TRAIN = flags.DEFINE_bool("train", False, "train and evaluate what is missing first", allow_override=True)
_OUT = flags.DEFINE_string("out", "docs/results", "where omni.md goes", allow_override=True)

JOINT = "omni_tiny"
MODALITY = {"poetry/songci": "text", "easyvqa": "image", "moving_digits": "video", "fsdd/george": "audio"}
# data set -> the split, the evaluator, its metric and what the page calls it; least is best where it is a loss
METRICS = {
    "poetry/songci": ("validation", "windows", "loss_a_letter", "nats a character that is no white space"),
    "easyvqa": ("test", "questions", "accuracy", "exact answers"),
    "moving_digits": ("test", "questions", "accuracy", "exact answers"),
    "fsdd/george": ("validation", "questions", "accuracy", "exact answers, known speakers"),
}
RECORDS = 200  # of each data set, for blanking and exchanging


class Together:
    """The documents of several sources, in one drawn order, so that rows hold documents of all of them. owner [n]:
    whose each is."""

    def __init__(self, parts):
        self._parts = parts
        sizes = [len(part.needs(0)) for part in parts]
        order = np.random.default_rng(0).permutation(sum(sizes))
        self.owner = np.repeat(np.arange(len(parts)), sizes)[order]
        self._number = np.concatenate([np.arange(size) for size in sizes])[order]

    def needs(self, epoch: int) -> np.ndarray:
        by_part = [part.needs(0) for part in self._parts]
        return np.array([by_part[k][i] for k, i in zip(self.owner, self._number, strict=True)])

    def document(self, epoch: int, i: int) -> chat.Document:
        k = self.owner[i]
        made = self._parts[k].document(0, int(self._number[i]))
        media = tuple((at, dataclasses.replace(medium, key=(k, medium.key))) for at, medium in made.media)
        return dataclasses.replace(made, media=media)

    def read(self, medium: chat.Medium):
        k, key = medium.key
        return self._parts[k].read(dataclasses.replace(medium, key=key))


def losses(subject: common.Subject, opened: dict, changed: str = "", how: str = "") -> dict[str, float]:
    """-> nats a trained token of each data set's answers, all packed into the same rows; the media of the data set
    `changed` are blanked, or exchanged with another record's."""

    def asked(name: str, source):
        if not isinstance(source, sources.Conversations):
            return source
        moved = {"blank": True}
        if how == "exchanged":
            moved = {"media_of": questions.others(source.records).__getitem__}
        return sources.Questions(source, **moved) if name == changed else sources.Questions(source)

    together = Together([asked(name, source) for name, source in opened.items()])
    nats, tokens, _ = common.score(subject, together)
    return {name: nats[together.owner == k].sum() / tokens[together.owner == k].sum()
            for k, name in enumerate(opened)}  # fmt: skip


def isolation(trained: workdir.Trained) -> list[str]:
    """-> a table: by how many nats a token each change of media raises the loss on each data set's answers."""
    opened = {name: common.open_source(mixture.one(trained.run, name), "validation", trained.tokenizer, trained.layout,
                                       RECORDS) for name in MODALITY}  # fmt: skip
    subject = common.Subject(
        trained.run, trained.layout, trained.tokenizer, trained.mesh, jax.jit(step_lib.make_eval_step(trained.model)),
        trained.params, None, "validation",
    )  # fmt: skip
    plain = losses(subject, opened)
    lines = ["| media changed | " + " | ".join(f"{m} ({name})" for name, m in MODALITY.items()) + " |",
             "|---|" + "---|" * len(MODALITY),
             "| none: nats a token | " + " | ".join(f"{plain[name]:.3f}" for name in MODALITY) + " |"]  # fmt: skip
    for changed, modality in MODALITY.items():
        for how in ("blanked", "exchanged") if modality != "text" else ():
            now = losses(subject, opened, changed, how)
            cells = " | ".join(f"{now[name] - plain[name]:+.4f}" for name in MODALITY)
            lines.append(f"| {modality} {how} | {cells} |")
    return lines


def filled(trained: workdir.Trained) -> str:
    """-> which share of its rows' positions and patches the first epoch of a run uses."""
    run, layout = trained.run, trained.layout
    source = mixture.train_source(mixture.open_train(run.data), run.data, trained.tokenizer, layout, run.seed)
    needs = source.needs(0)
    used = packing.used(needs, layout, packing.plan_epoch(needs, layout, run.seed, epoch=0))
    return ", ".join(f"{share:.1%} of {name}" for name, share in used.items())


def tokens(folder: Path, name: str) -> float:
    """-> positions of a data set that a run was trained on."""
    if not (folder / "metrics.jsonl").is_file():
        return float("nan")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max((line.get(f"data/{name}/tokens", 0) for line in lines), default=0)


def alone(name: str) -> str:
    """-> the workdir of the model of one data set."""
    return f"omni_{name.partition('/')[0]}"


def page(runs: Path) -> str:
    trained = workdir.restore(runs / JOINT)
    lines = ["| modality | data set | metric | together | alone | positions together, alone | alone: run |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, modality in MODALITY.items():
        split, evaluator, metric, called = METRICS[name]
        by_itself = runs / alone(name)
        joint = modalities.found(runs / JOINT, f"{name.replace('/', '-')}-{split}", evaluator)
        results = joint, modalities.found(by_itself, split, evaluator)
        numbers = [modalities.number(result, metric) for result in results]
        seen = ", ".join(f"{tokens(folder, name):,.0f}" for folder in (runs / JOINT, by_itself))
        lines.append(f"| {modality} | {name}, {split} | {called} | {' | '.join(numbers)} | {seen} | "
                     f"{modalities.made(by_itself)} |")  # fmt: skip
    return "\n".join([
        "# One model for four modalities, and a model for each", "",
        "configs/omni_tiny.py, one seed, on a CPU; written by `python -m benchmarks.omni`. The same model and the same",
        "number of positions of each data set in both columns: what joint training costs or gives. Intervals are 95 %.",
        "The joint loss is a mean over all trained tokens of a batch, and most of them are the text's.",
        "", *lines, "", f"Together: {modalities.made(runs / JOINT)}. Its rows use {filled(trained)}.", "",
        "## Whose media an answer reads", "",
        f"The joint model, {RECORDS} validation records of each data set and the validation text, packed into the same",
        "rows: by how many nats a token the loss on each data set's answers rises when the media of one are made grey",
        "or silent, or exchanged with those of another record. Each question is a document with one medium, and",
        "documents do not see each other: what is off the diagonal checks the packing, not what the model has learnt.",
        "Bars: +0.3 or more on the diagonal and at most 0.02 off it; of rows, 95 % of positions and 85 % of patches.",
        "", *isolation(trained),
        "", "![What the joint model writes and answers, from its report](omni.png)",
    ]) + "\n"  # fmt: skip


def main() -> None:
    runs, path = Path(_RUNS.value), Path(_OUT.value) / "omni.md"
    if _TRAIN.value:
        whole = "--config=configs/omni_tiny.py"
        tokens = f"--config.data.tokenizer={runs / JOINT / 'tokenizer.json'}"
        # What the page shows: rows of all data sets hold few documents of one, and its evaluation takes long.
        shown = [[f"--split={split}", f"--evaluator={evaluator}@{name}"]
                 for name, (split, evaluator, _, _) in METRICS.items()]  # fmt: skip
        make_runs(runs, {JOINT: [whole]} | {alone(name): [f"{whole}:only={name}", tokens] for name in MODALITY},
                  {JOINT: shown})  # fmt: skip
    path.write_text(page(runs))
    print(path)


if __name__ == "__main__":
    command.run(main)
