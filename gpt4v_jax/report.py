"""One run -> one self-contained page, and a short table: python -m gpt4v_jax.report --workdir runs/digits_world

The page is <workdir>/report.html. It shows what is there: metrics.jsonl, the results that `gpt4v_jax.evaluate` wrote,
and what the best checkpoint answers; where something is missing it says which command makes it.
"""

import base64
import html
import io
import json
import math
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
from absl import flags
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.eval import common
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.interpret import attention
from gpt4v_jax.model import flops
from gpt4v_jax.training import metrics, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run")

SHOWN, EXPLAINED = 24, 4  # questions in the grid, and with maps of attention
ANSWERS = {"questions": "model", "permuted": "pictures permuted", "counted": "answers counted"}  # evaluator -> its name here
# Colours that matplotlib draws with -> the page's own, so that plots follow light and dark.
COLOURS = {"#010101": "ink", "#020202": "faint", "#030303": "line", "#0a0a0a": "a", "#0b0b0b": "b", "#0c0c0c": "c",
           "#0d0d0d": "d"}  # fmt: skip
INK, FAINT, LINE, A, B, C, D = COLOURS


class Found(NamedTuple):
    step: int
    result: common.Result

    def counts(self, kind: str) -> tuple[int, int]:
        """-> (right, asked); kind "all" is all of them."""
        kinds = self.result.kinds
        return tuple(map(sum, zip(*kinds.values(), strict=True))) if kind == "all" else kinds.get(kind, (0, 0))


def report(folder: Path) -> Path:
    """Writes <workdir>/report.html -> its path."""
    run = workdir.load_config(folder)
    environment = folder / "environment.json"
    environment = json.loads(environment.read_text()) if environment.is_file() else {}
    lines, results = sorted(metrics.read(folder), key=lambda line: line["step"]), read_results(folder)
    try:
        trained = workdir.restore(folder)
        shown = _pictures(trained) if run.model.image.size else _samples(trained)
    except config.InputError as error:
        trained, shown = None, _section("What it answers", _missing(str(error), _command("train", folder)))
    body = [_headline(run, environment, lines, results, trained), _curves(lines, trained, folder)]
    if run.model.image.size:
        body.append(_kinds(results, folder))
    body += [shown, _details(run, environment)]
    template = string.Template(Path(__file__).with_suffix(".html").read_text())
    page = template.substitute(title=html.escape(f"{run.data.name}: {folder.name}"), body="\n".join(body))
    workdir.write(folder / "report.html", page)
    return folder / "report.html"


def read_results(folder: Path) -> dict[str, dict[str, Found]]:
    """-> {split: {evaluator: its newest result}} of <workdir>/eval/<split>-<evaluator>/<step>.json."""
    results: dict[str, dict[str, Found]] = {}
    for path in sorted(folder.glob("eval/*-*/*.json"), key=lambda path: int(path.stem)):
        split, _, name = path.parent.name.rpartition("-")
        values = json.loads(path.read_text())
        kinds = {kind: tuple(counts) for kind, counts in values["kinds"].items()}
        found = Found(int(path.stem), common.Result(values["metrics"], kinds, tuple(values["right"])))
        results.setdefault(split, {})[name] = found
    return results


# ---- the sections, each -> HTML


def _headline(run, environment, lines, results, trained) -> str:
    rate, minutes = _last(lines, "tokens_per_second"), _last(lines, "minutes")
    backbone, steps = run.model.backbone, max((line["step"] for line in lines), default=0)
    tiles, size = [], "A model"
    if trained:
        parameters = sum(flops.parameters(trained.params).values())
        tiles.append((f"{parameters / 1e6:.2f} M", f"parameters; {backbone.depth} layers of width {backbone.width}"))
        size = f"A transformer with {parameters:,} parameters"
    if rate:
        tiles.append((f"{rate:,.0f}", "stream positions a second in training"))
    if minutes:
        tiles.append((f"{minutes:.1f} min", "of training, evaluations included"))
    words = f"{size}, trained for {steps:,} steps of {run.batch} rows x {run.model.context} positions"
    words += f" on {run.data.name}" + (f" in {minutes:.0f} minutes" if minutes else "")
    words += f" on {len(environment['devices'])} x {environment['devices'][0]}" if environment.get("devices") else ""
    main = []
    for split, by_name in results.items():
        if "windows" in by_name:
            main.append((f"{by_name['windows'].result.metrics['loss']:.3f}", f"nats a token, whole {split} split"))
    for split in _order(results):
        at = {name: found.counts("all") for name, found in results[split].items() if found.result.kinds}
        if "questions" not in at:
            continue
        share, low, high = _share(*at["questions"])
        main.append((f"{share:.1%}", f"of {at['questions'][1]:,} {split} questions right, 95 % interval {low:.1%} to {high:.1%}"))
        if split == "test":
            beside = [f"{_share(*at[name])[0]:.1%} ({ANSWERS[name]})" for name in ("permuted", "counted") if name in at]
            words += f", answers {share:.1%} of the test questions exactly" + (
                f"; blind, that would be {' or '.join(beside)}" if beside else "")  # fmt: skip
            for name in ("permuted", "counted"):
                if name in at:
                    share, low, high = _share(*at[name])
                    main.append((f"{share:.1%}", f"blind, {ANSWERS[name]}: {low:.1%} to {high:.1%}"))
    cells = [f'<div class="main"><b>{b}</b><span>{s}</span></div>' for b, s in main[:1]]
    cells += [f"<div><b>{b}</b><span>{s}</span></div>" for b, s in main[1:] + tiles]
    return f'<h1>{html.escape(run.data.name)}</h1><p class="lede">{html.escape(words)}.</p><div class="tiles">{"".join(cells)}</div>'


def _curves(lines, trained, folder) -> str:
    def series(name):
        return [(line["step"], line[name]) for line in lines if name in line]

    if not series("loss"):
        return _section("Training", _missing("metrics.jsonl holds no step yet", _command("train", folder)))
    first, text = series("loss")[0], ""
    if first[0] == 1 and trained:
        text = f"The first loss is {first[1]:.3f}; guessing evenly among {trained.layout.vocab} tokens is ln V = {math.log(trained.layout.vocab):.3f}. "
    plots = []
    losses = [("training, a batch", series("loss"), A)]
    names = {"questions": "validation, answers", "permuted": "the same, pictures permuted", "windows": "validation"}
    losses += [(names[n], series(f"{n}/loss"), c) for n, c in (("questions", B), ("windows", B), ("permuted", C))]
    plots.append(_plot("loss (nats a token)", losses, log=True))
    right = [("training, tokens of a batch", series("accuracy"), A), (f"{names['questions']}", series("questions/accuracy"), B)]
    right.append((names["permuted"], series("permuted/accuracy"), C))
    plots.append(_plot("right (share)", right, top=1.0))
    kinds = sorted({key for line in lines for key in line if key.startswith("questions/accuracy/")})
    if kinds and len(series(kinds[0])) > 1:
        ends = [(key.rpartition("/")[2], series(key), INK) for key in kinds]
        plots.append(_plot("right on validation, by kind (share)", ends, top=1.0, direct=True))
    if len(series("tokens_per_second")) > 1:
        plots.append(_plot("stream positions a second, mean so far", [("", series("tokens_per_second"), A)], bottom=0))
    text += "Validation asks whole answers: one counts as right when all of its tokens are."
    charts = "".join(f"<figure>{plot}</figure>" for plot in plots)
    return _section("Training", f'<p class="note">{text}</p><div class="charts">{charts}</div>')


def _kinds(results, folder) -> str:
    splits = [split for split in _order(results) if "questions" in results[split]]
    splits = [split for split in splits if split != "validation"] or splits
    if not splits:
        return _section("Accuracy by kind of question", _missing("no results yet", _command("evaluate", folder)))
    names = [name for name in ANSWERS if any(name in results[split] for split in splits)]
    first = results[splits[0]]["questions"]
    kinds = sorted(first.result.kinds, key=lambda kind: -_share(*first.counts(kind))[0])
    charts = "".join(f"<figure>{_bars(split, results[split], kinds, names)}</figure>" for split in splits)
    head = "".join(f'<th class="split" colspan="{len(names) + 1}">{html.escape(split)}</th>' for split in splits)
    under = "".join(f'<th class="split">asked</th>{"".join(f"<th>{ANSWERS[name]}</th>" for name in names)}' for _ in splits)
    rows = []
    for kind in [*kinds, "all"]:
        cells = [f"<td>{html.escape(kind)}</td>"]
        for split in splits:
            cells.append(f'<td class="split">{results[split]["questions"].counts(kind)[1]:,}</td>')
            for name in names:
                share, low, high = _share(*results[split][name].counts(kind)) if name in results[split] else (None,) * 3
                cells.append("<td>-</td>" if share is None else f"<td>{share:.3f} <small>{low:.2f}-{high:.2f}</small></td>")
        rows.append(f'<tr class="{"all" if kind == "all" else ""}">{"".join(cells)}</tr>')
    steps = sorted({found.step for split in splits for found in results[split].values()})
    text = (
        f"Share of questions answered exactly, greedy decoding, with 95 % score intervals (Wilson); checkpoint of step "
        f"{', '.join(f'{step:,}' for step in steps)}. <b>Pictures permuted</b>: the same model, each question asked of "
        "another scene's picture. <b>Answers counted</b>: no model, the training split's most frequent answer to the "
        "question's words. "
    )
    if "compositional" in splits:
        text += "In <b>compositional</b> the questions turn on pairs of object and colour that training never shows. "
    table = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr><tr><th>kind</th>{under}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _section("Accuracy by kind of question", f'<p class="note">{text}</p><div class="charts">{charts}</div>{table}')


def _pictures(trained: workdir.Trained) -> str:
    """The grid of answers, and where the model looked for some of them."""
    splits = sources.splits(trained.run.data)
    split = "test" if "test" in splits else splits[-1]
    source = common.open_source(trained.run, split, trained.tokenizer, trained.layout)
    items = sources.Questions(source).items
    chosen = np.random.default_rng(0).choice(len(items), min(SHOWN, len(items)), replace=False)
    asked = [items[i] for i in chosen]
    pictures = [source.picture(record) for record, _ in asked]
    prompts = [decode.prompt(trained, turn.question, [i]) for i, (_, turn) in enumerate(asked)]
    answers = [answer.text for answer in decode.generate(trained, prompts, pictures, max_new_tokens=16)]

    def verdict(i):
        turn, right = asked[i][1], answers[i] == asked[i][1].answer
        mark = "✓ right" if right else "✗ wrong"
        said = f'<b>{html.escape(answers[i]) or "(nothing)"}</b> <span class="mark">{mark}</span>'
        return "right" if right else "wrong", html.escape(turn.question), said + (
            "" if right else f"<br>truth: <b>{html.escape(turn.answer)}</b>")  # fmt: skip

    cards = []
    for i, picture in enumerate(pictures):
        which, question, said = verdict(i)
        cards.append(f'<figure class="{which}">{_img(picture, question)}<span>{question}</span><span>{said}</span></figure>')
    right = sum(answers[i] == turn.answer for i, (_, turn) in enumerate(asked))
    grid = _section("What it answers", f'<p class="note">{len(asked)} questions of the {split} split drawn at random (seed 0; '
                    f"not picked by hand), answered greedily by the checkpoint of step {trained.step:,}: {right} right.</p>"
                    f'<div class="pictures">{"".join(cards)}</div>')  # fmt: skip

    first_of_kind = list({asked[i][1].kind: i for i in reversed(range(len(asked)))}.values())
    parts = []
    for i in sorted(first_of_kind)[:EXPLAINED]:
        maps = attention.over_picture(trained, prompts[i], pictures[i], len(prompts[i]) - 1)
        which, question, said = verdict(i)
        panels = [f"<figure>{_img(pictures[i], 'the picture')}<figcaption>the picture</figcaption></figure>"]
        for name, heat in [*((f"layer {k}", m) for k, m in enumerate(maps, 1)), ("mean of layers", maps.mean(0))]:
            panels.append(f"<figure>{_img(_heat(pictures[i], heat), name)}<figcaption>{name}: {heat.sum():.0%} on the "
                          f"picture, at most {heat.max():.1%}</figcaption></figure>")  # fmt: skip
        parts.append(f'<div class="looks {which}"><p>{question} {said}</p><div class="maps">{"".join(panels)}</div></div>')
    looks = _section("Where it looks", '<p class="note">Attention from the position that outputs the first token of the answer '
                     "to each patch, mean over heads; the first questions above of different kinds. Each map is scaled to its "
                     "own largest weight, given below it; the rest of the attention is on text. Attention weights show what "
                     "a layer reads, not why the answer comes out.</p>" + "".join(parts))  # fmt: skip
    return grid + looks


def _samples(trained: workdir.Trained) -> str:
    """How the model goes on with the beginnings of some windows of the held-out text."""
    split = [split for split in sources.splits(trained.run.data) if split != "train"][-1]
    source = common.open_source(trained.run, split, trained.tokenizer, trained.layout)
    windows = np.random.default_rng(0).choice(len(source.sizes(0)[0]), 4, replace=False)
    given = [trained.tokenizer.decode(source.document(0, int(i)).tokens[: trained.layout.context // 4]) for i in windows]
    prompts = [decode.prompt(trained, text) for text in given]
    sampling = sample.Sampling(temperature=0.8)
    answers = decode.generate(trained, prompts, (), trained.layout.context, sampling, seeds=range(4))
    texts = [f'<figure><pre class="sample"><span class="given">{html.escape(text)}</span>{html.escape(answer.text)}</pre></figure>'
             for text, answer in zip(given, answers, strict=True)]  # fmt: skip
    return _section("What it writes", f'<p class="note">Beginnings of four windows of the {split} split drawn at random (seed 0; '
                    "not picked by hand), in grey, and how the model goes on to the end of its context of "
                    f"{trained.layout.context} tokens at temperature {sampling.temperature}.</p>"
                    f'<div class="charts">{"".join(texts)}</div>')  # fmt: skip


def _details(run, environment) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    rows = {
        "command": f"<code>{html.escape(environment.get('command', 'unknown'))}</code>",
        "commit": f"<code>{html.escape(environment.get('commit', 'unknown'))}</code>",
        "devices": html.escape(", ".join(environment.get("devices", []))) or "unknown",
        "processor cores": environment.get("cores", "unknown"),
        "Python": environment.get("python", "unknown"),
        "packages": html.escape(versions) or "unknown",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    settings = f"<details><summary>the whole config</summary><pre>{html.escape(config.to_json(run))}</pre></details>"
    return _section("How it was made", f"<dl>{listed}</dl>{settings}")


# ---- plots and pictures


def _plot(label: str, series, log=False, bottom=None, top=None, direct=False) -> str:
    """Curves against steps -> SVG. series: (name, [(step, value)], colour); direct: names stand at the ends of curves."""
    figure, axes = _figure(5.0, 3.1)
    series = [(name, points, colour) for name, points, colour in series if points]
    for name, points, colour in series:
        few = len(points) < 30
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, label=name, marker="o" if few else None, ms=3)
    values = [value for _, points, _ in series for _, value in points]
    if log and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        ticks = [d * 10.0**k for k in range(-5, 4) for d in (1, 2, 5)]
        axes.set_yticks([t for t in ticks if min(values) / 1.6 <= t <= max(values) * 1.3])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0 if top else bottom, top)
    axes.set_title(label, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if direct:
        ends = _apart([points[-1][1] for _, points, _ in series], 0.055)
        for (name, points, colour), height in zip(series, ends, strict=True):
            axes.annotate(name, (points[-1][0], height), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8,
                          color=colour, annotation_clip=False)  # fmt: skip
    elif len(series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _svg(figure, label)


def _bars(split: str, by_name: dict[str, Found], kinds: list[str], names: list[str]) -> str:
    """Accuracy by kind beside the baselines, with intervals -> SVG."""
    rows = [*kinds, "all"]
    figure, axes = _figure(5.0, 0.5 * len(rows) + 0.9)
    high, colours = 0.8 / len(names), dict(zip(ANSWERS, (A, B, C), strict=True))
    for k, name in enumerate(n for n in names if n in by_name):
        at = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * high
        share, low, top = np.array([_share(*by_name[name].counts(kind)) for kind in rows]).T
        axes.barh(at, share, high * 0.9, color=colours[name], label=ANSWERS[name], alpha=1 if name == "questions" else 0.75)
        axes.errorbar(share, at, xerr=(share - low, top - share), fmt="none", ecolor=INK, elinewidth=1, capsize=0)
        if name == "questions":
            for y, value, end in zip(at, share, top, strict=True):
                axes.text(end + 0.015, y, f"{value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.replace("_", "/") for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.axhline(len(rows) - 1.5, color=FAINT, lw=0.8)
    axes.set_xlim(0, 1.08)
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    asked = by_name["questions"].counts("all")[1]
    axes.set_title(f"{split}: right (share of {asked:,} questions)", loc="left", fontsize=10, pad=24)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.995), handlelength=1,
                columnspacing=1.2, borderpad=0.2, labelcolor=INK)  # fmt: skip
    return _svg(figure, f"accuracy by kind, {split} split")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # heavy; without pyplot there is no window and no state to close

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    axes.spines[:].set_color(LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set(color=INK, size=9)
    axes.title.set_color(INK)
    return figure, axes


def _svg(figure, label: str) -> str:
    """-> the figure as inline SVG in the page's colours and font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}">',
                 svg[svg.index("<svg") :], count=1)  # fmt: skip
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for drawn, name in COLOURS.items():
        svg = svg.replace(drawn, f"var(--{name})")
    return svg


def _apart(heights: list[float], least: float) -> list[float]:
    """-> the heights, moved so that any two are `least` apart, in the same order."""
    moved, order = list(heights), sorted(range(len(heights)), key=lambda i: heights[i])
    for before, i in zip(order, order[1:], strict=False):
        moved[i] = max(moved[i], moved[before] + least)
    excess = max(max(moved, default=0) - max(1.0, max(heights, default=0)), 0)
    for i in order[::-1]:
        moved[i] = moved[i] - excess if moved[i] - excess >= heights[i] - excess else moved[i]
    return moved


def _heat(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A picture in dark grey, and over it the weights of its patches, from violet to yellow."""
    import matplotlib

    times = 3
    large = np.asarray(Image.fromarray(picture).resize((picture.shape[1] * times,) * 2, Image.Resampling.BICUBIC))
    grey = large.mean(-1, keepdims=True).repeat(3, -1)
    side = large.shape[0] // weights.shape[0]
    heat = np.kron(weights / max(weights.max(), 1e-12), np.ones((side, side)))
    colour = matplotlib.colormaps["inferno"](0.15 + 0.8 * heat)[..., :3] * 255
    return (0.42 * grey + 0.58 * colour).astype(np.uint8)


def _img(picture: np.ndarray, label: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(label)}">'


# ---- small pieces


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">Not here: {html.escape(what)}. <code>{html.escape(command)}</code> makes it.</p>'


def _command(name: str, folder: Path) -> str:
    return f"python -m gpt4v_jax.{name} {'--config ... ' if name == 'train' else ''}--workdir {folder}"


def _order(results) -> list[str]:
    """Splits, test first."""
    return sorted(results, key=lambda split: ({"test": 0, "compositional": 1, "validation": 2}.get(split, 3), split))


def _share(right: int, asked: int) -> tuple[float, float, float]:
    """-> (share right, low and high end of its 95 % interval)."""
    return right / asked if asked else math.nan, *common.interval(right, asked)


def _last(lines: list[dict], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


def table(folder: Path) -> rich.table.Table | str:
    """Accuracy by kind on the test split beside the blind baselines, overall, and overall on compositional."""
    results = read_results(folder)
    splits = [split for split in _order(results) if "questions" in results[split]]
    losses = [f"{split} loss {by_name['windows'].result.metrics['loss']:.4f} nats a token"
              for split, by_name in results.items() if "windows" in by_name]  # fmt: skip
    if not splits:
        return "\n".join(losses) or f"no results yet: {_command('evaluate', folder)}"
    names = [name for name in ANSWERS if name in results[splits[0]]]
    out = rich.table.Table("kind", "asked", *(ANSWERS[name] for name in names), title=f"right, {splits[0]} split, 95 % interval")

    def row(split, kind, label):
        cells = []
        for name in names:
            found = results[split].get(name)
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*_share(*found.counts(kind))) if found else "-")
        out.add_row(label, str(results[split]["questions"].counts(kind)[1]), *cells)

    for kind in sorted(results[splits[0]]["questions"].result.kinds):
        row(splits[0], kind, kind)
    out.add_section()
    for split in splits:
        row(split, "all", "all" if split == splits[0] else f"{split}, all")
    return out


def main() -> None:
    folder = Path(_WORKDIR.value)
    path, console = report(folder), rich.console.Console(highlight=False, soft_wrap=True)
    console.print(table(folder))
    lines = sorted(metrics.read(folder), key=lambda line: line["step"])
    rate, minutes = _last(lines, "tokens_per_second"), _last(lines, "minutes")
    console.print(f"{rate:,.0f} tokens/s in training" if rate else "", f"  {minutes:.1f} minutes" if minutes else "")
    console.print(str(path))


if __name__ == "__main__":
    config.run(main, required=("workdir",))
