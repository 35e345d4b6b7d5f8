"""One run -> one self-contained page, and a short table: python -m gpt4v_jax.report --workdir runs/digits_world

The page is <workdir>/report.html, filled into the template beside this file. It shows metrics.jsonl, the results of
gpt4v_jax.evaluate, and what the best checkpoint answers; where something is missing it says which command makes it.
"""

import html
import json
import math
import re
import string
from pathlib import Path
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
from absl import flags

from gpt4v_jax import command, config, plots
from gpt4v_jax.data import datasets, mixture
from gpt4v_jax.eval import common, shown
from gpt4v_jax.model import flops
from gpt4v_jax.plots import FAINT, A, B, C, D
from gpt4v_jax.training import metrics, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_BLANK = flags.DEFINE_string("blank", None, "of the same model trained on blank pictures: a blind baseline")

EVALUATORS = {"questions": "model", "permuted": "permuted pictures", "blank": "blank training",
              "counted": "counted answers"}  # as the page calls them  # fmt: skip
SCORES = {"wer": "wer", "bleu": "bleu", "retrieval": "accuracy"}  # evaluator -> its main metric
RECALL = "recall at 1 by likelihood"
BAR = dict(zip(EVALUATORS, (A, B, D, C), strict=True))


class Found(NamedTuple):
    """A result of an evaluator, and the checkpoint it is of."""

    step: int
    result: common.Result


def report(folder: Path, blank: Path | None = None) -> Path:
    """Writes <workdir>/report.html -> its path. `blank`: the workdir of the model trained without pictures."""
    run, trained = workdir.load_config(folder), None
    environment = folder / "environment.json"
    environment = json.loads(environment.read_text()) if environment.is_file() else {}
    lines, results = read_metrics(folder), read_results(folder, blank)
    try:
        trained = workdir.restore(folder)
        answers, looks = shown.told(trained)
    except config.InputError as error:
        answers = looks = _missing(str(error), _command("train", folder))
    texts = all(datasets.is_text(entry.name) for entry in mixture.entries(run.data))
    chats = trained.chats if trained else not texts
    lede, tiles = _headline(run, environment, lines, results, trained)
    vocab, first = run.model.vocab, next((line for line in lines if line["step"] == 1 and "loss" in line), None)
    template = string.Template(Path(__file__).with_suffix(".html").read_text())
    page = template.substitute(
        name=html.escape(f"{', '.join(run.data.mixture) or run.data.name}: {folder.resolve().name}"),
        lede=html.escape(lede),
        tiles="".join(f"<div><b>{value}</b><span>{html.escape(text)}</span></div>" for value, text in tiles),
        first_loss=f"The first loss is {first['loss']:.3f}; a guess at random costs ln {vocab} = {math.log(vocab):.3f}."
        if first and vocab else "",
        of_pictures="" if run.model.image else "hidden",
        verb="answers" if chats else "writes",
        training=_curves(lines) or _missing("no step has been logged yet", _command("train", folder)),
        kinds=_kinds(results) or _missing("no results of evaluations yet", _command("evaluate", folder)),
        answers=answers,
        looks=looks,
        made="".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in _made(environment)),
        config=html.escape(config.to_json(run)),
    )  # fmt: skip
    workdir.write(folder / "report.html", page)
    return folder / "report.html"


def read_metrics(folder: Path) -> list[dict]:
    return sorted(metrics.read(folder), key=lambda line: line["step"])


def read_results(folder: Path, blank: Path | None = None) -> dict[str, dict[str, Found]]:
    """-> {split: {evaluator: its result}} of <workdir>/eval/<split>-<evaluator>/<step>.json; test first.

    All are of one step, the newest that was evaluated; `counted` knows no step. The results of
    `blank`'s "questions" are called "blank".
    """
    paths: dict[str, dict[str, dict[int, Path]]] = {}  # of a split, of an evaluator, at a step
    for path in folder.glob("eval/*-*/*.json"):
        split, _, name = path.parent.name.rpartition("-")
        paths.setdefault(split, {}).setdefault(name, {})[int(path.stem)] = path
    results: dict[str, dict[str, Found]] = {}
    for split, by_name in paths.items():
        step = max((max(at) for name, at in by_name.items() if name != "counted"), default=0)
        for name, at in by_name.items():
            step_here = max(at) if name == "counted" else step
            if step_here in at:
                result = common.Result(**json.loads(at[step_here].read_text()))
                results.setdefault(split, {})[name] = Found(step_here, result)
    if blank:
        for key, (mine, its) in config.differences(workdir.load_config(folder), workdir.load_config(blank)).items():
            if not re.fullmatch(rf"data\.blank|eval\..*|{workdir.MAY_CHANGE}", key) or key == "steps":
                raise config.InputError(f"--blank {blank} is another run: its {key} is {its!r}, not {mine!r}")
        if not workdir.load_config(blank).data.blank:
            raise config.InputError(f"--blank {blank} was trained with its media: name a run with data.blank set")
        trained, steps = _last(read_metrics(blank), "step") or 0, workdir.load_config(blank).steps
        if trained < steps:
            raise config.InputError(f"--blank {blank} has trained {trained} of {steps} steps: let it end first")
        found = {split: one["questions"] for split, one in read_results(blank).items() if "questions" in one}
        if not found:
            raise config.InputError(f"--blank {blank} has no results yet: run {_command('evaluate', blank)}")
        for split, one in found.items():
            results.setdefault(split, {})["blank"] = one
    order = {"test": 0, "compositional": 1}
    return dict(sorted(results.items(), key=lambda item: (order.get(item[0], 2), item[0])))


# ---- the parts of the page


def _headline(run, environment, lines, results, trained) -> tuple[str, list[tuple[str, str]]]:
    """-> (what was trained, on what, with which result, in a sentence; the main numbers, each with its meaning)."""
    tiles, found, size = [], "", "a model"
    for split, by_name in results.items():
        if "windows" in by_name:
            loss = by_name["windows"].result.metrics["loss"]
            tiles.append((f"{loss:.3f}", f"loss on {split}, nats a token, all windows"))
            found += f" Its loss on the {split} split is {loss:.3f} nats a token."
        for name, metric in SCORES.items():
            if name in by_name and metric in by_name[name].result.metrics:
                m, label = by_name[name].result.metrics, common.OTHERS.get(metric, RECALL)
                low, high = (m.get(f"{metric}/{end}", m.get(end)) for end in ("low", "high"))
                between = f" (95 %: {low:.3f} to {high:.3f})" if low is not None else ""
                tiles.append((f"{m[metric]:.3f}", f"{label} on {split}{between}"))
                found += f" Its {label} on the {split} split is {m[metric]:.3f}."
        for name in EVALUATORS if "questions" in by_name else ():
            if name in by_name and (name == "questions" or split == "test"):
                share, low, high = by_name[name].result.share()
                what = f"{split} questions right" if name == "questions" else f"blind: {EVALUATORS[name]}"
                tiles.append((f"{share:.1%}", f"{what} (95 %: {low:.1%} to {high:.1%})"))
        if split == "test" and "questions" in by_name:
            right, others = by_name["questions"], [name for name in list(EVALUATORS)[1:] if name in by_name]
            blind = [f"{by_name[name].result.share()[0]:.1%} with {EVALUATORS[name]}" for name in others]
            found += f" It answers {right.result.share()[0]:.1%} of {right.result.counts()[1]:,} test questions exactly"
            found += f"; blind, that would be {' or '.join(blind)}." if blind else "."
    if trained:
        count, backbone = sum(flops.parameters(trained.params).values()), run.model.backbone
        size = f"a transformer of {count:,} parameters"
        tiles.append((f"{count / 1e6:.2f} M", f"parameters, {backbone.depth} layers of width {backbone.width}"))
    if rate := _last(lines, "tokens_per_second"):
        tiles.append((f"{rate:,.0f}", "tokens a second in training, all positions counted"))
    if minutes := _last(lines, "minutes"):
        tiles.append((f"{minutes:.1f} min", "of training, evaluations included"))
    steps, devices = max((line["step"] for line in lines), default=0), environment.get("devices", [])
    where = f" on {len(devices)} x {devices[0]} ({environment.get('cores')} cores)" if devices else ""
    data = ", ".join(run.data.mixture) or run.data.name
    return f"Here {size} was trained on {data} for {steps:,} of {run.steps:,} steps{where}.{found}", tiles


def _curves(lines: list[dict]) -> str:
    def series(name):
        return [(line["step"], line[name]) for line in lines if name in line]

    if not series("loss"):
        return ""
    held_out = [(name, "held out", B) for name in ("questions", "windows")]
    held_out.append(("permuted", "held out, permuted media", C))
    # Of a mixture, each data set by its name.
    of_sets = sorted({key.partition("/loss")[0] for line in lines for key in line if re.match(r"\w+@.*/loss$", key)})
    sets = [name for name in of_sets if not name.startswith(("permuted", "blanked"))]
    held_out += [(name, name.partition("@")[2], (B, C, D, FAINT)[k % 4]) for k, name in enumerate(sets)]
    drawn = []
    both = (("loss (nats a token)", "loss", {"log": True}), ("right (share)", "accuracy", {"top": 1}))
    for title, key, scale in both:
        beside = [(name, series(f"{evaluator}/{key}"), colour) for evaluator, name, colour in held_out]
        drawn.append(plots.curves(title, [("training", series(key), A), *beside], **scale))
    kinds = sorted({key for line in lines for key in line if key.startswith("questions/accuracy/")})
    if kinds and len(series(kinds[0])) > 1:
        colours = (A, B, D, FAINT)
        named = [(key.split("/")[2], series(key), colours[i % 4]) for i, key in enumerate(kinds)]
        drawn.append(plots.curves("held-out questions right, by kind (share)", named, top=1))
    for name, metric in SCORES.items():
        if len(series(f"{name}/{metric}")) > 1:
            label = common.OTHERS.get(metric, RECALL)
            drawn.append(plots.curves(f"held out, {label}", [("", series(f"{name}/{metric}"), B)]))
    if len(series("tokens_per_second")) > 1:
        drawn.append(plots.curves("tokens a second, mean since the start", [("", series("tokens_per_second"), A)]))
    return f'<div class="charts">{"".join(drawn)}</div>'


def _kinds(results: dict[str, dict[str, Found]]) -> str:
    """Plots side by side and their table, of the splits that share kinds: each data set of a mixture has its own."""
    splits = [split for split in results if "questions" in results[split]]
    splits = [split for split in splits if split in ("test", "compositional")] or splits
    kinds = {split: results[split]["questions"].result.kinds.keys() for split in splits}
    groups: list[list[str]] = []
    for split in splits:
        like = next((group for group in groups if kinds[group[0]] & kinds[split]), None)
        if like:
            like.append(split)
        else:
            groups.append([split])
    if not groups:
        return ""
    drawn, tables = zip(*(_of_kinds(results, group) for group in groups), strict=True)
    return f'<div class="charts">{"".join(drawn)}</div>{"".join(tables)}'


def _of_kinds(results: dict[str, dict[str, Found]], splits: list[str]) -> tuple[str, str]:
    """-> (a plot of each split, the table of all)."""
    names = [name for name in EVALUATORS if any(name in results[split] for split in splits)]
    first = results[splits[0]]["questions"]
    rows = [*sorted(first.result.kinds, key=lambda kind: -first.result.share(kind)[0]), "all"]
    above, below, body = "<th></th>", "<th>kind</th>", ""
    for split in splits:
        step = results[split]["questions"].step
        above += f'<th class="split" colspan="{len(names) + 1}">{html.escape(split)} split, step {step:,}</th>'
        below += '<th class="split">asked</th>' + "".join(f"<th>{EVALUATORS[name]}</th>" for name in names)
    for kind in rows:
        body += f'<tr class="{"all" if kind == "all" else ""}"><td>{html.escape(kind)}</td>'
        for found in (results[split] for split in splits):
            body += f'<td class="split">{found["questions"].result.counts(kind)[1]:,}</td>'
            for name in names:
                cell = "{:.3f}<small>{:.2f} to {:.2f}</small>"
                cell = cell.format(*found[name].result.share(kind)) if name in found else ""
                body += f"<td>{cell}</td>"
    drawn = ""
    for split in splits:
        found = {name: results[split][name].result for name in names if name in results[split]}
        series = [(EVALUATORS[n], [one.share(kind) for kind in rows], BAR[n]) for n, one in found.items()]
        drawn += plots.bars(split, rows, series)
    table = f"<table><thead><tr>{above}<tr>{below}</thead><tbody>{body}</tbody></table>"
    return drawn, f'<div class="scroll">{table}</div>'


def _made(environment: dict) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    devices = f"{', '.join(environment.get('devices', []))}; {environment.get('cores', '?')} processor cores"
    named = [(name, environment.get(name, "unknown")) for name in ("command", "commit", "python")]
    return [*named, ("devices", devices), ("packages", versions)]


# ---- small pieces


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">Not here: {html.escape(what)}. This makes it: <code>{html.escape(command)}</code></p>'


def _command(name: str, folder: Path) -> str:
    return f"python -m gpt4v_jax.{name} {'--config CONFIG ' if name == 'train' else ''}--workdir {folder}"


def _last(lines: list[dict], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


# ---- the terminal


def table(results: dict[str, dict[str, Found]]) -> rich.table.Table:
    """The test split by kind beside the blind baselines, then it and every other split as a whole."""
    splits = [split for split in results if "questions" in results[split]]
    names = [name for name in EVALUATORS if any(name in results[split] for split in splits)]
    title = f"{splits[0]} split: share of questions right, the model's with its 95 % interval"
    out = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left")
    out.add_column("kind", no_wrap=True)
    for name in ("asked", *(EVALUATORS[name].replace(" ", "\n") for name in names)):
        out.add_column(name, justify="right", no_wrap=True)
    kinds = sorted(results[splits[0]]["questions"].result.kinds)
    rows = [(splits[0], kind, kind) for kind in (*kinds, "all")] + [(split, "all", split) for split in splits[1:]]
    for split, kind, label in rows:
        found = results[split]
        shares = [found[name].result.share(kind) if name in found else () for name in names]
        cells = [("{:.3f} {:.3f}-{:.3f}" if i == 0 else "{:.3f}").format(*s) if s else "" for i, s in enumerate(shares)]
        out.add_row(label, f"{found['questions'].result.counts(kind)[1]:,}", *cells, end_section=label == kinds[-1])
    return out


def main() -> None:
    folder, blank = Path(_WORKDIR.value), Path(_BLANK.value) if _BLANK.value else None
    path, lines, results = report(folder, blank), read_metrics(folder), read_results(folder, blank)
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if any("questions" in by_name for by_name in results.values()):
        console.print(table(results))
    for split, by_name in results.items():
        if "windows" in by_name:
            console.print(f"loss on {split}: {by_name['windows'].result.metrics['loss']:.4f} nats a token")
    rate, minutes = _last(lines, "tokens_per_second"), _last(lines, "minutes")
    said = [f"{rate:,.0f} tokens/s" if rate else "", f"{minutes:.1f} minutes" if minutes else ""]
    console.print("training: " + (", ".join(filter(None, said)) or "no step has been logged yet"))
    console.print(f"report: {path}")


if __name__ == "__main__":
    command.run(main, required=("workdir",))
