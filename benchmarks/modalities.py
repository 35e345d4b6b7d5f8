"""docs/results/modalities.md from the workdirs of its runs: python -m benchmarks.modalities --runs runs

The workdirs are those that the configs' first lines name, each trained and evaluated (`make modalities` does it); what
has not run is said to be missing. Baselines that no run gives are computed here.
"""

import collections
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from benchmarks.runs import make_runs
from gpt4v_jax import command, config
from gpt4v_jax.data import sources
from gpt4v_jax.eval import common, retrieval

_RUNS = flags.DEFINE_string("runs", "runs", "the folder of the workdirs")
_TRAIN = flags.DEFINE_bool("train", False, "train and evaluate what is missing first: hours")
_OUT = flags.DEFINE_string("out", "docs/results", "where modalities.md goes", allow_override=True)

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TUNED_ON = ("george", "jackson", "nicolas")  # whose digits choices of configs/fsdd.py were made by: the ledger
LANGUAGES = ("de", "en", "fr", "ja", "zh")
BINS = 6  # of each colour in a histogram
RUNS = {  # workdir -> its config
    **{f"fsdd_{name}": f"configs/fsdd.py:speaker={name}" for name in SPEAKERS},
    **{name: f"configs/{name}.py" for name in ("mnist", "easyvqa", "moving_digits", "multi30k", "emoji", "poetry")},
    "moving_digits_still": "configs/moving_digits.py:frames=1",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One row: a number of a workdir's evaluation, and what it is to be compared with."""

    what: str
    workdir: str
    split: str
    evaluator: str
    metric: str  # "accuracy": the share right, with its interval
    bar: str
    context: str
    blind: str = ""  # by commas: another evaluator of the run, "workdir:evaluator" of another one, or of BASELINES


TASKS = (
    *(Task(f"spoken digits of {name}, never heard", f"fsdd_{name}", "test", "questions", "accuracy",
           "mean of 6 >= 0.75", "0.690 logistic regression on MFCC statistics, mean of 6", "counted")
      for name in SPEAKERS),
    *(Task(f"strings of 3 to 7 digits of {name}, WER", f"fsdd_{name}", "strings", "wer", "wer", "", "", "constant")
      for name in SPEAKERS),
    Task("handwritten digits (MNIST)", "mnist", "test", "questions", "accuracy", ">= 0.985",
         "0.992 a small convolution", "counted"),
    Task("questions about pictures (easy-VQA)", "easyvqa", "test", "questions", "accuracy", ">= 0.93",
         "0.670 question alone (TF-IDF), published 0.938 to 0.995", "permuted,counted"),
    Task("questions about clips of moving digits", "moving_digits", "test", "questions", "accuracy",
         "0.30 above one frame", "", "moving_digits_still:questions,counted"),
    Task("German to English (Multi30k, test 2016)", "multi30k", "test", "bleu", "bleu", ">= 25",
         "36.5 a transformer of 9.0 M, trained longer, lower-cased tokens", "copied"),
    Task("the same, chrF", "multi30k", "test", "bleu", "chrf", "", "", "copied"),
    Task("captions of emoji, retrieval at 1, five languages", "emoji", "test", "retrieval", "accuracy",
         ">= 5 x the colour neighbour", "chance 1/176", "neighbour"),
    Task("the same, likelihoods as they are", "emoji", "test", "retrieval", "plain", "", "chance 1/176"),
    Task("Tang poems, nats a character that is no white space (validation)", "poetry", "validation", "windows",
         "loss_a_letter", "< 5.39", "5.390 a 3-gram", "unigram"),
)  # fmt: skip


def found(folder: Path, split: str, evaluator: str) -> common.Result | None:
    """-> the newest result of an evaluation."""
    paths = sorted(folder.glob(f"eval/{split}-{evaluator}/*.json"), key=lambda path: int(path.stem))
    return common.Result(**json.loads(paths[-1].read_text())) if paths else None


def number(result: common.Result | None, metric: str) -> str:
    if result is None:
        return "not run"
    if metric == "accuracy":
        return "{:.3f} ({:.3f} to {:.3f})".format(*result.share())
    m = result.metrics
    interval = " ({:.3f} to {:.3f})".format(m[f"{metric}/low"], m[f"{metric}/high"]) if f"{metric}/low" in m else ""
    return f"{m[metric]:.3f}{interval}"


def made(folder: Path) -> str:
    """-> steps, minutes, commit and machine of a run."""
    if not (folder / "environment.json").is_file():
        return ""
    environment = json.loads((folder / "environment.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    minutes = max((line.get("minutes", 0) for line in lines), default=0)
    steps, cores = max((line["step"] for line in lines), default=0), environment["cores"]
    return f"{steps:,} steps, {minutes:.1f} min on {cores} core{'s' * (cores > 1)}, {environment['commit']}"


def neighbour(task: Task) -> str:
    """-> recall at 1, over all languages, of captions by the training picture whose colours are nearest (cosine of
    histograms on white): the caption of the split that is most like that picture's (cosine of TF-IDF of 1 to 3
    characters)."""
    right, records = [], []
    for kind in LANGUAGES:
        hits = _neighbour(config.Data(name="emoji"), kind, task.split)
        right, records = [*right, *hits], [*records, *range(len(hits))]
    ends = common.by_record(np.array(right), np.array(records))
    return "colour neighbour {:.3f} ({:.3f} to {:.3f})".format(np.mean(right), ends["low"], ends["high"])


def _neighbour(data: config.Data, kind: str, split: str) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer

    def read(split):
        captions, colours = [], []
        for record in sources.usable(sources.open_split(data, split), data):
            said = [answer for k, _, answer in sources.questions(record) if k == kind]
            if said:
                picture = Image.open(io.BytesIO(sources.bytes_of(record["image"]))).convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
                cells = np.asarray(picture).reshape(-1, 3).astype(int) * BINS // 256
                counts = np.bincount(cells @ [BINS**2, BINS, 1], minlength=BINS**3).astype(float)
                captions.append(said[0])
                colours.append(counts / np.linalg.norm(counts))
        return captions, np.array(colours)

    (seen, colours), (asked, wanted) = read("train"), read(split)
    nearest = (wanted @ colours.T).argmax(1)
    words = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit(seen)
    scores = (words.transform([seen[i] for i in nearest]) @ words.transform(asked).T).toarray()
    return retrieval.ranked(scores, asked) < 1


def _asked(data: config.Data, split: str) -> list[tuple[str, str, str]]:
    """-> (kind, question, answer) of a split."""
    return [one for record in sources.usable(sources.open_split(data, split), data) for one in sources.asked(record)]


def copied(task: Task) -> str:
    """-> BLEU or chrF of the source sentences as they are."""
    import sacrebleu

    data = config.Data(name="multi30k/de-en")
    asked = _asked(data, task.split)
    score = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[task.metric]
    return f"German as it is {score([q for _, q, _ in asked], [[answer for _, _, answer in asked]]).score:.3f}"


def constant(task: Task) -> str:
    """-> the word error rate of the training split's most frequent answer of this kind, whatever is said."""
    import jiwer

    data = config.Data(name=task.workdir.replace("_", "/"))
    train, asked = _asked(data, "train"), _asked(data, task.split)
    seen = collections.Counter(answer for kind, _, answer in train if kind == asked[0][0])
    guess = max(sorted(seen), key=seen.get)
    return f"one answer {jiwer.wer([answer for _, _, answer in asked], [guess] * len(asked)):.3f}"


def unigram(task: Task) -> str:
    """-> nats a character that is no white space where every character, white space too, has its share of the training
    text, with one added for each known one and for all unknown ones."""
    data = config.Data(name="poetry/tang")
    train, held_out = (
        "".join(sources.text_of(record["text"]) for record in sources.open_split(data, split))
        for split in ("train", task.split)
    )
    seen = collections.Counter(train)
    total = len(train) + len(seen) + 1
    nats = -sum(np.log((seen[character] + 1) / total) for character in held_out)
    return f"characters' shares {nats / sum(not character.isspace() for character in held_out):.3f}"


BASELINES = {"neighbour": neighbour, "copied": copied, "constant": constant, "unigram": unigram}
BY_HAND = "\nBy hand: "  # what stands behind it is kept when the page is written anew


def beside(task: Task, name: str, runs: Path) -> str:
    """-> one of the numbers that a task's blind names."""
    folder = runs / task.workdir
    if name in BASELINES:
        return BASELINES[name](task) if (folder / "eval").is_dir() else ""
    where, _, evaluator = name.rpartition(":")
    return f"{name} {number(found(runs / where if where else folder, task.split, evaluator), task.metric)}"


def page(runs: Path) -> str:
    lines = ["| task | measured (95 %) | bar | blind | context | run |", "|---|---|---|---|---|---|"]
    for task in TASKS:
        folder = runs / task.workdir
        blind = ", ".join(beside(task, name, runs) for name in task.blind.split(",") if name)
        result = number(found(folder, task.split, task.evaluator), task.metric)
        lines.append(f"| {task.what} | {result} | {task.bar} | {blind} | {task.context} | {made(folder)} |")
    others = tuple(name for name in SPEAKERS if name not in TUNED_ON)
    return "\n".join([
        "# Tasks of every modality, from scratch on a CPU", "",
        "One seed each, two shared cores. Written by `python -m benchmarks.modalities` from the configs' workdirs;",
        "the command of each run opens its config. \"not run\" is what is still to do.", "",
        "Bars are ours. Context: MNIST from fashion-mnist's README, easy-VQA from easy-VQA-keras', Multi30k",
        "from pytorch-seq2seq's notebook 6; logistic regression, TF-IDF and 3-gram were one untuned run each.",
        "Intervals are 95 %; the questions of a record, and in the mean the digits of a speaker, count as fewer where",
        "they go together. The colour neighbour: the caption that is most like the one of the training picture whose",
        "colours are nearest.",
        "", *lines, "", f"Spoken digits: {mean(runs, SPEAKERS)}. Choices of configs/fsdd.py were made by the digits of",
        f"{', '.join(TUNED_ON)} (experiments/README.md), so that of the others is the fairer: {mean(runs, others)}.",
    ]) + "\n"  # fmt: skip


def mean(runs: Path, speakers: tuple[str, ...]) -> str:
    """-> the mean over those speakers that were run, with its interval, as of speakers who are drawn."""
    heard = [found(runs / f"fsdd_{name}", "test", "questions") for name in speakers]
    heard = [np.array(result.right) for result in heard if result]
    if not heard:
        return f"none of {len(speakers)} speakers was run"
    right, of = np.concatenate(heard), np.repeat(np.arange(len(heard)), list(map(len, heard)))
    ends = common.by_record(right, of)
    return f"mean {right.mean():.3f} ({ends['low']:.3f} to {ends['high']:.3f}) of {len(heard)} speakers"


def main() -> None:
    path = Path(_OUT.value) / "modalities.md"
    if _TRAIN.value:
        make_runs(Path(_RUNS.value), {name: [f"--config={file}"] for name, file in RUNS.items()})
    _, _, by_hand = (path.read_text() if path.exists() else "").partition(BY_HAND)
    path.write_text(page(Path(_RUNS.value)) + (BY_HAND + by_hand if by_hand else ""))
    print(path)


if __name__ == "__main__":
    command.run(main)
