"""The plots of a sweep's page: dots and whiskers, and curves against everything that a budget may be counted in."""

from pathlib import Path

import numpy as np

from experiments import lanes, results
from experiments.lanes import Run
from gpt4v_jax import plan, plots

COLOURS = (plots.A, plots.B, plots.D, plots.E, plots.F, plots.G)
MARKS = ("D", "x", "+")


def colour(found: dict, name: str) -> str:
    return COLOURS[list(found["variants"]).index(name) % len(COLOURS)]


def dots(found: dict) -> str:
    """-> the variants with their seeds and baselines, and beside them each one's difference to the reference."""
    evaluator, reference = found["metric"].rpartition("/")[0], found["reference"]
    there = {name: one for name, one in found["variants"].items() if "mean" in one}
    if not there:
        return ""
    rows = [(name, colour(found, name), *one["mean"][evaluator], [s[evaluator] for s in one["seeds"].values()])
            for name, one in there.items()]  # fmt: skip
    beside = [x for x in next(iter(there.values()))["mean"] if x != evaluator]
    marks = [(x, MARKS[k % 3], [one["mean"].get(x, [None])[0] for one in there.values()]) for k, x in enumerate(beside)]
    out = plots.dots(f"{found['split']} {found['metric']}", f"{found['metric'].rpartition('/')[2]}", rows, marks)
    less = []
    for pair in found["pairs"]:
        if reference not in (pair["one"], pair["other"]):
            continue
        pair = pair if pair["other"] == reference else results.turned(pair)
        own, its = (found["variants"][name]["seeds"] for name in (pair["one"], reference))
        each = [own[seed][evaluator] - its[seed][evaluator] for seed in own if seed in its]
        less.append((pair["one"], colour(found, pair["one"]), pair["mean"], pair["low"], pair["high"], each))
    return out + (plots.dots(f"less {reference}", "difference", less, zero=True) if less else "")


def curves(folder: Path, found: dict, asked: results.Question, runs: list[Run]) -> tuple[str, str]:
    """-> (the plots of each axis behind a button of its own, the style that shows those of the chosen one)."""
    held = f"{asked.evaluator}/{asked.metric}"
    lines = {(run.name, key): results.curve(folder, run, key) for run in runs for key in ("loss", held)}
    if not any(lines.values()):
        return "", ""
    took = {run.name: lanes.minutes(folder, run.stages[:-1]) or 0 for run in runs}
    buttons, panels, style = "", "", ""
    for axis, label, unit in _axes(found):
        drawn = ""
        for key, title in (("loss", "training loss (nats a token)"), (held, f"held out: {held}")):
            series = []
            for name in found["variants"]:
                of = [r for r in runs if r.variant == name]
                each = [[(_at(found, name, axis, line, took[r.name]) / unit, line[key]) for line in lines[r.name, key]
                         if axis != "seconds" or "minutes" in line] for r in of]  # fmt: skip
                if each := [points for points in each if points]:
                    series.append((name, each, colour(found, name)))
            if series:
                drawn += plots.families(title, label, series, log=key == "loss")
        checked = "" if buttons else " checked"
        buttons += f'<label><input type="radio" name="axis" id="by-{axis}"{checked}> {label}</label> '
        panels += f'<div class="charts against" id="against-{axis}">{drawn}</div>'
        style += f"section:has(#by-{axis}:checked) #against-{axis} {{ display: grid; }}\n"
    return f'<div class="axes">against {buttons}</div>{panels}', style


def _axes(found: dict) -> list[tuple[str, str, float]]:
    """-> (key, label, size of its unit) of what can be counted."""
    most = {key: max(one["budget"][key] or 0 for one in found["variants"].values())
            for key in ("steps", "text_tokens", "images", "flops")}  # fmt: skip
    name, size = plan.unit(most["flops"])
    labels = {"steps": ("steps", 1), "text_tokens": ("text tokens", 1), "images": ("pictures", 1),
              "flops": (f"{name}s", size)}  # fmt: skip
    return [(key, *labels[key]) for key, value in most.items() if value] + [("seconds", "seconds", 1)]


def _at(found: dict, variant: str, axis: str, line: dict, before: float) -> float:
    """before: minutes of the stages before, whose share of every budget the last one begins with."""
    if axis == "seconds":
        return 60 * (before + line["minutes"])
    budget, stages = found["variants"][variant]["budget"], found["variants"][variant]["before"]
    spent, steps = (sum(one["budget"][key] or 0 for one in stages) for key in (axis, "steps"))
    return spent + line["step"] * ((budget[axis] or np.nan) - spent) / (budget["steps"] - steps)
