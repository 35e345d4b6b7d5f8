"""A sweep's results as files: result.json and result.md, which depend on what was computed alone, and report.html,
seconds.json and environment.json, which also say when, where and by what."""

import html
import json
import math
import re
import shlex
import string
import sys
from pathlib import Path

import rich.box
import rich.table

import gpt4v_jax
from experiments import ablation_plots, compare, results
from experiments.budget import LIMIT, Solved
from experiments.lanes import Run
from gpt4v_jax import config, plan
from gpt4v_jax.training import workdir

SIGNS = {compare.BETTER: "▲", compare.WORSE: "▼", compare.NEITHER: "≈", compare.ALONE: "?", compare.LOST: "?"}
CLASS = {compare.BETTER: "better", compare.WORSE: "worse", compare.NEITHER: "neither", compare.ALONE: "alone",
         compare.LOST: "alone"}  # fmt: skip
BASELINES = {"counted": "counted answers", "permuted": "permuted media", "blanked": "blanked media"}
HOW = """Differences are of runs with the same seed on the same {items}. Half an interval is the root of the sum of
squares of two: Student's t over the seeds' differences, and over {clusters} (mean over seeds); so it is for training
again <i>and</i> asking other questions. With few seeds it is wide, and what is called not
distinguishable may still differ. Better and worse: the interval leaves out 0. Were all variants the same, {chance:.2f}
of {pairs} such pairs would be called different by chance; * marks what stands at 5 % for all of them (Holm)."""


def write(folder: Path, found: dict, asked: results.Question, solved: dict[str, Solved], runs: list[Run],
          command: str) -> None:  # fmt: skip
    """Writes all five files into the sweep's folder, each whole or not at all."""
    spent, made = results.seconds(folder, runs), environment(folder, found, runs, command)
    workdir.write(folder / "result.json", json.dumps(_finite(found), indent=1, allow_nan=False) + "\n")
    workdir.write(folder / "result.md", markdown(found))
    workdir.write(folder / "seconds.json", json.dumps(spent, indent=1) + "\n")
    workdir.write(folder / "environment.json", json.dumps(made, indent=1) + "\n")
    workdir.write(folder / "report.html", page(folder, found, asked, solved, runs, spent, made))


def _finite(value):
    """-> the same with None in the place of what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(folder: Path, found: dict, runs: list[Run], command: str) -> dict:
    """-> the command, and of the runs every commit, version and machine that they name."""
    paths = [folder / "runs" / name / "environment.json" for run in runs for name, _ in run.stages]
    each = [json.loads(path.read_text()) for path in paths if path.is_file()]
    said = {name: list(dict.fromkeys(json.dumps(one.get(name)) for one in each)) for name in
            ("commit", "python", "packages", "devices", "cores")}  # fmt: skip
    again = f"{command} --workdir {shlex.quote(str(folder))} --size {found['size']}" + " --smoke" * found["smoke"]
    return {"command": again, "sweep": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])} | {
        name: [json.loads(text) for text in texts] for name, texts in said.items()
    }


# ---- text: the terminal, the ledger, result.md


def number(mean: list | None, sign: str = "") -> str:
    """[mean, low, high] -> "0.512 (0.480 to 0.544)"; without an interval only the mean."""
    if mean is None:
        return ""
    value, low, high = mean
    between = f" ({low:{sign}.3f} to {high:{sign}.3f})" if low is not None else ""
    return f"{value:{sign}.3f}{between}"


def rows(found: dict) -> list[tuple[str, list[str]]]:
    """-> (variant, cells) of the main table: seeds, the metric, then each baseline."""
    evaluator = found["metric"].rpartition("/")[0]
    names = _evaluators(found)
    out = []
    for name, one in found["variants"].items():
        mean = one.get("mean", {})
        cells = [f"{len(one['seeds'])} of {found['seeds']}", number(mean.get(evaluator))]
        out.append((name, cells + [number(mean.get(x)) for x in names]))
    return out


def _evaluators(found: dict) -> list[str]:
    """-> the baselines that were evaluated."""
    evaluator = found["metric"].rpartition("/")[0]
    all_of = {x: None for one in found["variants"].values() for x in one.get("mean", {})}
    return [x for x in all_of if x != evaluator]


def called(evaluator: str) -> str:
    return BASELINES.get(evaluator.partition("@")[0], evaluator)


def heads(found: dict) -> list[str]:
    return ["variant", "seeds", f"{found['split']} {found['metric']}", *map(called, _evaluators(found))]


def terminal(found: dict, asked: results.Question) -> rich.table.Table:
    out = rich.table.Table(title=found["question"], box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
                           title_justify="left")  # fmt: skip
    for k, name in enumerate(heads(found)):
        out.add_column(name, justify="right" if k else "left", no_wrap=not k)
    for name, cells in rows(found):
        out.add_row(name, *cells)
    return out


def verdicts(found: dict) -> list[str]:
    """-> a line for each pair."""
    out = []
    for pair in found["pairs"]:
        values = [pair["mean"], pair["low"], pair["high"]]
        p = "" if pair["p"] is None else ", p < 0.001" if pair["p"] < 0.001 else f", p = {pair['p']:.2g}"
        star = " *" if pair["stands_among_all"] else ""
        middle = "and" if pair["verdict"] in (compare.NEITHER, compare.ALONE, compare.LOST) else "against"
        out.append(f"{pair['one']} {middle} {pair['other']}: {pair['verdict']}{star}, {number(values, '+')}{p}")
    return out


def lede(found: dict) -> str:
    """The result in a sentence or two."""
    evaluator, reference = found["metric"].rpartition("/")[0], found["reference"]
    said = [f"{name} {number(one['mean'][evaluator])}" for name, one in found["variants"].items() if "mean" in one]
    if not said:
        return "No run is done yet."
    pairs = [p for p in found["pairs"] if reference in (p["one"], p["other"])]
    against = []
    for pair in pairs:
        pair = pair if pair["other"] == reference else results.turned(pair)
        is_ = {compare.ALONE: "was run with one seed and is not judged against",
               compare.LOST: "has a value that is not finite, or has its reference, and is not judged against"}.get(
            pair["verdict"], f"is {pair['verdict']} {'from' if pair['verdict'] == compare.NEITHER else 'than'}")
        by = f": {number([pair['mean'], pair['low'], pair['high']], '+')}" if pair["p"] is not None else ""
        against.append(f"{pair['one']} {is_} {reference}{by}")
    equal = "no budget was matched" if found["match"] == "none" else f"at equal {found['match'].replace('_', ' ')}"
    sentences = [f"{found['metric']} on {found['split']}, {equal}: {'; '.join(said)}", "; ".join(against)]
    return ". ".join(filter(None, sentences)) + "."


def ledger(found: dict) -> str:
    """-> the row for experiments/README.md."""
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    match = "unmatched" if found["match"] == "none" else f"equal {found['match'].replace('_', ' ')}"
    budget = found["variants"][found["reference"]]["budget"]
    what = f"{found['base']}, size {found['size']}: {budget['steps']:,} steps, {match}, {seeds}"
    return f"| {found['question']} | {what} | {lede(found)} | STATUS |"


def table(found: dict) -> list[str]:
    return _markdown([heads(found), ["---"] * len(heads(found)), *([name, *cells] for name, cells in rows(found))])


def _markdown(lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in lines]


def losses(found: dict) -> tuple[list[str], list[list[str]]]:
    """-> (head, rows) of the held-out loss with a record's own media, and of what the baselines say of theirs: whether
    exchanged media raise it."""
    there = {name: one["loss"] for name, one in found["variants"].items() if one.get("loss")}
    names = list(dict.fromkeys(x for one in there.values() for x in one))
    head = ["variant", *(f"{called(x)}, nats a token" for x in names)]
    return head, [[name, *(number(one.get(x)) for x in names)] for name, one in there.items()]


def kinds(found: dict) -> tuple[list[str], list[list[str]]]:
    """-> (head, rows) of the metric by kind of question, and of what counted answers have of each: a kind that is no
    better cannot tell variants apart. No rows where there is one kind."""
    evaluator = found["metric"].rpartition("/")[0]
    there = {name: one["kinds"][evaluator] for name, one in found["variants"].items() if "kinds" in one}
    of_reference = found["variants"][found["reference"]].get("kinds", {})
    there |= {called(x): values for x, values in of_reference.items() if x.partition("@")[0] == "counted"}
    names = sorted({kind for one in there.values() for kind in one})
    lines = [[kind, *(f"{one[kind]:.3f}" if kind in one else "" for one in there.values())] for kind in names]
    return ["kind", *there], lines if len(names) > 1 else []


BUDGET = ("parameters", "trained", "steps", "FLOPs, full", "FLOPs, causal", "text tokens", "pictures", "off")


def budget_cells(one: dict) -> list[str]:
    b = one["budget"]
    work = [f"{b[key] / size:,.1f} {name}" for key in ("flops", "causal") for name, size in [plan.unit(b[key])]]
    counts = ["" if b[key] is None else f"{b[key]:,}" for key in ("text_tokens", "images")]
    own = " (it says this itself)" if one["fixed_by_itself"] else ""
    before = ", ".join(f"{stage['budget']['steps']:,}" for stage in one["before"])
    steps = f"{b['steps']:,}" + (f" ({before} of them before)" if before else "")
    trained = "" if b["trained"] is None else f"{b['trained']:,}"
    return [f"{b['params']:,}", trained, steps, *work, *counts, f"{one['off']:+.2%}{own}"]


def markdown(found: dict) -> str:
    budgets = ["| variant | " + " | ".join(BUDGET) + " |", "|" + "---|" * (len(BUDGET) + 1)]
    budgets += ["| " + " | ".join([name, *budget_cells(one)]) + " |" for name, one in found["variants"].items()]
    differs = [f"- {name}: " + (", ".join(f"{key} {a!r} to {b!r}" for key, (a, b) in one["differs_in"].items()) or
               f"{found['reference']} itself") for name, one in found["variants"].items()]  # fmt: skip
    failed = [f"- {name}: {error}" for name, error in found["errors"].items()]
    head, of_loss = losses(found)
    lost = _markdown([head, ["---"] * len(head), *of_loss])
    kind_head, of_kinds = kinds(found)
    by_kind = _markdown([kind_head, ["---"] * len(kind_head), *of_kinds])
    return "\n".join([
        f"# {found['question']}", "", lede(found), "", *table(found), "",
        f"Intervals are 95 % of the mean over seeds. {found['runs_done']} of {found['runs']} runs are done.", "",
        *(["## Failed", "", *failed, ""] if failed else []),
        *([f"Loss on {found['split']}:", "", *lost, ""] if of_loss else []),
        *(["By kind of question:", "", *by_kind, ""] if of_kinds else []),
        "## Pairs", "", plain(how(found)), "", *(f"- {line}" for line in verdicts(found)), "",
        "## Budgets", "", plain(budget_note(found)), "", *budgets, "",
        f"## What differs from {found['reference']}", "", *differs, *(f"- {line}" for line in stages(found)), "",
        "## The ledger's row", "", ledger(found),
    ]) + "\n"  # fmt: skip


def stages(found: dict) -> list[str]:
    """-> a line for each stage before a variant's last: what it had otherwise."""
    return [
        f"{name}, stage {k}, beside its last: " + ", ".join(f"{key} {b!r}, not {a!r}" for key, (a, b) in
                                                            stage["differs_in"].items())
        for name, one in found["variants"].items() for k, stage in enumerate(one["before"], 1)
    ]  # fmt: skip


def plain(text: str) -> str:
    return re.sub(r"<.*?>", "", text)


def how(found: dict) -> str:
    pairs = len(found["pairs"])
    if not found["items"]:
        return ("Differences are of runs with the same seed, their intervals Student's t over the seeds: they say what "
                "training again would give, not what other test data would. * marks what stands at 5 % for all pairs "
                "together (Holm).")  # fmt: skip
    clusters = f"{found['records']:,} records" if found["records"] else "items, whose records are not known,"
    return HOW.format(items=f"{found['items']:,} items", clusters=clusters, seeds=found["seeds"], pairs=pairs,
                      chance=pairs * compare.LEVEL)  # fmt: skip


def budget_note(found: dict) -> str:
    match = (f"Matched: {found['match'].replace('_', ' ')}, with {found['reference']}, within {LIMIT:.0%}."
             if found["match"] != "none" else "Nothing was matched.")  # fmt: skip
    return (f"{match} FLOPs are those of the whole training, forward and backward, of matrix products and attention. "
            "full, which is matched: every query meets every key of its row; causal: those before it. Text tokens and "
            "pictures are counted in the row plan.")  # fmt: skip


# ---- the page


def page(folder: Path, found: dict, asked, solved: dict[str, Solved], runs: list[Run], spent, made: dict) -> str:
    template = string.Template(Path(__file__).with_name("ablation.html").read_text())
    look = (Path(gpt4v_jax.__file__).parent / "report.html").read_text()
    drawn, shown = ablation_plots.curves(folder, found, asked, runs)
    baselines = _evaluators(found)
    run = solved[found["reference"]].run
    failed = "".join(f"<div class='failed'><b>{_(name)} failed.</b> {_(error)}</div>"
                     for name, error in found["errors"].items())  # fmt: skip
    if missing := found["runs"] - found["runs_done"] - len(found["errors"]):
        failed += f"<div class='failed'>{missing} of {found['runs']} runs are not done yet.</div>"
    return template.substitute(
        title=_(found["question"]), lede=_(lede(found)), failed=failed,
        style=re.search(r"<style>(.*?)</style>", look, re.DOTALL)[1], shown=shown,
        metric=_(f"{found['metric']} on the {found['split']} split"), reference=_(found["reference"]),
        marks_note=f"; grey: {', '.join(map(called, baselines))}" if baselines else "",
        dots=ablation_plots.dots(found) or "", table=_table(heads(found), [[n, *c] for n, c in rows(found)]),
        how=how(found), matrix=matrix(found), verdicts="".join(f"<li>{_(line)}</li>" for line in verdicts(found)),
        losses=_table(*losses(found)) if losses(found)[1] else "",
        of_kinds="" if kinds(found)[1] else "hidden", kinds=_table(*kinds(found)),
        budget_note=_(budget_note(found)),
        budgets=_table(["variant", *BUDGET, "minutes a run"], [
            [name, *budget_cells(one), _minutes(name, runs, spent)] for name, one in found["variants"].items()]),
        held_out=_(f"{run.eval.split}, {f'{run.eval.limit} records' if run.eval.limit else 'all of it'}"),
        curves=drawn or "<p class='missing'>No step has been logged yet.</p>",
        differences=_differences(found), commands=_(commands(made, runs)), made=_made(made),
        runs=_table(["run", "steps", "minutes"], [
            [name, f"{one['steps']:,}", "" if one["minutes"] is None else f"{one['minutes']:.1f}"]
            for name, one in spent.items()]),
        config=_(config.to_json(run)),
    )  # fmt: skip


def _(text) -> str:
    return html.escape(str(text))


def _table(head: list[str], lines: list[list[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    names = "".join(f"<th>{_(name)}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def matrix(found: dict) -> str:
    """Row less column: the difference, its interval, and what it is called."""
    cells, body = {(p["one"], p["other"]): p for pair in found["pairs"] for p in (pair, results.turned(pair))}, ""
    for one in found["variants"]:
        body += f"<tr><th>{_(one)}</th>"
        for other in found["variants"]:
            if (one, other) not in cells:
                body += "<td></td>"
                continue
            pair = cells[one, other]
            verdict, stands = pair["verdict"], "*" * pair["stands_among_all"]
            between = "" if pair["low"] is None else f"<small>{pair['low']:+.3f} to {pair['high']:+.3f}</small>"
            body += (f'<td class="{CLASS[verdict]}"><b>{SIGNS[verdict]} {pair["mean"]:+.3f}{stands}</b>{between}'
                     f"<small>{verdict}</small></td>")  # fmt: skip
        body += "</tr>"
    head = "".join(f"<th>less {_(name)}</th>" for name in found["variants"])
    return f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _minutes(variant: str, runs: list[Run], spent: dict) -> str:
    each = [spent[run.name]["minutes"] for run in runs if run.variant == variant]
    there = [x for x in each if x is not None]
    return f"{min(there):.1f} to {max(there):.1f}" if there else ""


def _differences(found: dict) -> str:
    keys = sorted({key for one in found["variants"].values() for key in one["differs_in"]})
    reference = {key: one["differs_in"][key][0] for one in found["variants"].values() for key in one["differs_in"]}

    def cell(differs: dict, key: str):
        if key in differs:
            return differs[key][1]
        sections = (key.rsplit(".", k)[0] for k in range(1, key.count(".") + 1))
        return "" if any(section in differs for section in sections) else reference[key]

    lines = [[key, *(cell(one["differs_in"], key) for one in found["variants"].values())] for key in keys]
    out = _table(["key", *found["variants"]], lines) if keys else "<p>Nothing: the variants are the same.</p>"
    return out + "".join(f"<p>{_(line)}</p>" for line in stages(found))


def commands(made: dict, runs: list[Run]) -> str:
    lines = [f"python -m gpt4v_jax.train --config experiments/from_json.py:WORKDIR/configs/{name}.json "
             f"--workdir WORKDIR/runs/{name}" for name, _ in max(runs, key=lambda run: len(run.stages)).stages]
    return "\n".join([made["command"], "", "# one of its runs by itself", *lines])


def _made(made: dict) -> str:
    named = {"commit": ", ".join(map(str, made["commit"])), "python": ", ".join(map(str, made["python"])),
             "devices": "; ".join(", ".join(one or []) for one in made["devices"]),
             "cores of a run": ", ".join(map(str, made["cores"])),
             "packages": "; ".join(", ".join(f"{k} {v}" for k, v in (one or {}).items()) for one in made["packages"])}
    return "".join(f"<dt>{name}</dt><dd>{_(value)}</dd>" for name, value in named.items())
