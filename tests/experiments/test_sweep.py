"""A sweep from its flags to its files, with runs that are made up; make soak has real ones that are killed."""

import concurrent.futures
import contextlib
import functools
import html
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import ablation_plots, ablation_report, child, lanes, results, sweep
from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.training import lock
from tests.experiments import fake
from tests.test_report import Page

VARIANTS = {"narrow": {}, "wide": {"model.backbone.width": 32}}
NOT_COMPARED = {"lock", "seconds.json", "environment.json", "report.html"}


@pytest.fixture
def ran(digits_world, monkeypatch):
    """-> ran(folder, *flags, runner=, variants=, ...) -> its exit status."""

    def run(folder: Path, *flags, runner=None, variants=None, plots=False, **more) -> int:
        if not plots:
            monkeypatch.setattr(ablation_plots, "curves", lambda *_: ("", ""))
            monkeypatch.setattr(ablation_plots, "dots", lambda *_: "")
        made = fake.made(digits_world, variants or VARIANTS, **{"match": "none"} | more)
        return fake.run(monkeypatch, made, folder, runner or fake.Runner(60), *flags)

    return run


def test_what_a_sweep_leaves(ran, tmp_path, capsys):
    runner = fake.Runner(2000)
    assert ran(tmp_path, runner=runner, match="flops", common={"steps": 300}) == 0
    names = ["narrow-0", "wide-0", "narrow-1", "wide-1"]
    assert runner.said == [(command, name) for name in names for command in ("train", "evaluate")]
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["question"], found["runs_done"], found["items"], found["errors"]) == (
        "Does a wider model do better?", 4, 2000, {})  # fmt: skip
    for name, one in found["variants"].items():
        run = json.loads((tmp_path / "configs" / f"{name}-1.json").read_text())
        assert (run["seed"], run["steps"]) == (1, one["budget"]["steps"])
        assert one["seeds"].keys() == {"0", "1"} and one["mean"].keys() == {"questions", "counted", "permuted"}
        for seed, values in one["seeds"].items():
            path = tmp_path / "runs" / f"{name}-{seed}" / "eval" / "test-questions" / f"{run['steps']}.json"
            assert values["questions"] == json.loads(path.read_text())["metrics"]["accuracy"]
    narrow, wide = found["variants"].values()
    assert (narrow["differs_in"], narrow["off"]) == ({}, 0) and abs(wide["off"]) <= 0.02
    assert wide["differs_in"]["steps"] == [300, wide["budget"]["steps"]]
    [pair] = found["pairs"]
    assert (pair["one"], pair["other"], pair["verdict"]) == ("narrow", "wide", "worse")
    assert pair["mean"] == pytest.approx(narrow["mean"]["questions"][0] - wide["mean"]["questions"][0])
    out = capsys.readouterr().out
    assert out.index("steps 300 to") < out.index("narrow-0"), "budgets are said before anything runs"
    assert "wide is better than narrow" in out and "| Does a wider model do better? |" in out
    text = (tmp_path / "result.md").read_text() + (tmp_path / "result.json").read_text()
    assert "wide is better than narrow" in text and str(tmp_path) not in text and "minutes" not in text


def test_a_sweep_goes_on_where_it_was(ran, tmp_path):
    assert ran(tmp_path / "whole") == 0
    runner, cut = fake.Runner(60), tmp_path / "cut"
    for at in [("train", "wide-0"), ("evaluate", "narrow-1"), ("train", "wide-1")]:
        runner.fails[at] = -9
    assert ran(cut, runner=runner) == 1
    assert ran(cut, runner=runner) == 0
    assert runner.said.count(("train", "narrow-0")) == 1 and runner.said.count(("train", "wide-0")) == 2
    assert runner.said.count(("train", "narrow-1")) == 1, "it was trained, only its evaluation was cut off"
    said = len(runner.said)
    assert ran(cut, runner=runner) == 0 and len(runner.said) == said, "what is done is not done again"
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    for path in files:
        if path.name not in NOT_COMPARED and "logs" not in path.parts:
            assert (cut / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    assert {Path("result.json"), Path("result.md"), Path("report.html")} <= files


STAGED = {"plain": {}, "staged": {"before": ({"data.turns": 0, "steps": 60}, {"steps": 30}), "data.turns": 1}}
RUNS = ["staged-0.stage1", "staged-0.stage2", "staged-0"]


def test_stages(ran, tmp_path, capsys):
    """Each stage is a run that begins with the one before; only the last is scored; the budget is that of all."""
    runner = fake.Runner(60)
    assert ran(tmp_path, runner=runner, variants=STAGED, match="flops", common={"steps": 300}, seeds=1) == 0
    assert runner.said[2:] == [*(("train", name) for name in RUNS), ("evaluate", "staged-0")]
    first, second, last = (config.from_json((tmp_path / "configs" / f"{name}.json").read_text()) for name in RUNS)
    at = [str(tmp_path.resolve() / "runs" / name) for name in RUNS]
    assert [run.init_from.run for run in (first, second, last)] == ["", *at[:2]]
    assert (first.steps, first.data.turns, second.steps, last.data.turns) == (60, 0, 30, 1)
    found = json.loads((tmp_path / "result.json").read_text())
    plain, staged = found["variants"].values()
    assert plain["before"] == [] and [one["budget"]["steps"] for one in staged["before"]] == [60, 30]
    assert staged["budget"]["steps"] == 90 + last.steps == pytest.approx(300, rel=0.02)
    assert staged["before"][0]["differs_in"]["data.turns"] == [1, 0]
    assert json.loads((tmp_path / "seconds.json").read_text())["staged-0"]["steps"] == staged["budget"]["steps"]
    for text in (capsys.readouterr().out, (tmp_path / "result.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "stage 1" in text and "stage 2" in text and "stage 3" not in text
    page = (tmp_path / "report.html").read_text()
    assert page.count(f"{staged['budget']['steps']} (60, 30 of them before)") == 1
    assert str(tmp_path) not in (tmp_path / "result.md").read_text() + (tmp_path / "result.json").read_text()


def test_a_stage_that_is_done_is_not_done_again(ran, tmp_path, capsys):
    more = {"variants": STAGED, "match": "flops", "common": {"steps": 300}}
    assert ran(tmp_path / "whole", **more) == 0
    runner, cut = fake.Runner(60), tmp_path / "cut"
    for at in [("train", RUNS[1]), ("train", RUNS[2]), ("evaluate", RUNS[2])]:
        runner.fails[at] = -9
    for k in range(3):
        assert ran(cut, runner=runner, **more) == 1
        assert list(json.loads((cut / "result.json").read_text())["errors"]) == ["staged-0"], k
    assert ran(cut, runner=runner, **more) == 0
    assert [runner.said.count(("train", name)) for name in RUNS] == [1, 2, 2]
    assert runner.said.count(("train", "staged-1")) == 1
    for name in ("result.json", "result.md", "sweep.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = {"plain": {"before": {"steps": 3}}, "staged": {"before": ({"steps": 60}, {"steps": 31}), "data.turns": 1}}
    capsys.readouterr()
    assert ran(cut, **more | {"variants": other}) == 2
    said = capsys.readouterr().err
    for text in ("variant plain: 1 stages there, 2 here", "variant staged, stage 1: data.turns is 0 there, 2 here",
                 "variant staged, stage 2: steps is 30 there, 31 here"):  # fmt: skip
        assert text in said


def test_a_stage_keeps_its_data_set_with_smoke():
    own = {"staged": {"before": {"data.name": "digits_world/text", "steps": 9}}}
    made = sweep.Sweep(fake.BASE, own, {"data.name": "digits_world"}, smoke={"data.name": "digits_world/small"})
    for smoke, last, steps in ((False, "digits_world", 9), (True, "digits_world/small", 2)):
        stages = sweep.configs(made, smoke)["staged"]
        assert [run.data.name for run in stages] == ["digits_world/text", last] and stages[0].steps == steps


def test_curves_begin_where_the_stages_before_end():
    def budget(steps, images):
        return {"budget": {"steps": steps, "images": images, "text_tokens": 0}}

    found = {"variants": {"a": budget(100, 40) | {"before": [budget(20, 0), budget(30, 15)]}}}
    at = functools.partial(ablation_plots._at, found, "a", line={"step": 10, "minutes": 2.0}, before=7.0)
    assert (at(axis="steps"), at(axis="images"), at(axis="seconds")) == (50 + 10, 15 + 10 * 25 / 50, 60 * 9)


def test_a_failing_variant_does_not_stop_the_others(ran, tmp_path, capsys):
    runner = fake.Runner(60)
    runner.fails = {("train", "wide-0"): 2, ("evaluate", "wide-1"): 1}
    assert ran(tmp_path, "--jobs=2", runner=runner) == 1
    found = json.loads((tmp_path / "result.json").read_text())
    error = "exit status 2: error: no luck in WORKDIR/runs/wide-0"
    assert found["errors"] == {"wide-0": error, "wide-1": error.replace("2:", "1:").replace("wide-0", "wide-1")}
    assert len(found["variants"]["narrow"]["seeds"]) == 2 and not found["variants"]["wide"]["seeds"]
    assert not found["pairs"]
    assert error in html.unescape((tmp_path / "report.html").read_text()) and error in capsys.readouterr().err
    assert error in (tmp_path / "result.md").read_text()


def test_another_sweep_is_refused(ran, tmp_path, capsys):
    assert ran(tmp_path) == 0
    before = (tmp_path / "sweep.json").read_bytes()
    other = {"narrow": {"optim.lr": 0.5}, "deep": {"model.backbone.depth": 3}}
    assert ran(tmp_path, variants=other, seeds=3) == 2
    said = capsys.readouterr().err
    for text in ("holds another sweep", "seeds: 2 there, 3 here", "variant wide: only there", "variant deep: only here",
                 "variant narrow: optim.lr is 0.001 there, 0.5 here"):  # fmt: skip
        assert text in said
    assert (tmp_path / "sweep.json").read_bytes() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    assert ran(tmp_path / "run") == 2 and "holds a run: a sweep needs a folder" in capsys.readouterr().err


def test_two_sweeps_in_one_folder(ran, tmp_path, capsys):
    runner = fake.Runner(60)
    with lock.hold(tmp_path):
        assert ran(tmp_path, runner=runner) == 2
    assert f"--workdir={tmp_path} is in use by pid {os.getpid()}" in capsys.readouterr().err and not runner.said


def test_plan_report_smoke_and_what_is_there_for_its_plan(ran, tmp_path, capsys):
    runner = fake.Runner(60)
    assert ran(tmp_path / "x", "--plan", runner=runner, match="flops", common={"steps": 300}) == 0
    assert "300" in capsys.readouterr().out and not (tmp_path / "x").exists()
    assert ran(tmp_path / "x", runner=runner, plan_only=True) == 2
    said = capsys.readouterr()
    assert "run it with --really" in said.err and "not read" in said.out and not runner.said
    assert ran(tmp_path / "x", "--report", runner=runner) == 2 and "holds no sweep" in capsys.readouterr().err
    runner.fails["train", "wide-1"] = 1
    ran(tmp_path / "x", runner=runner)
    (tmp_path / "x" / "result.json").unlink(), capsys.readouterr()
    said = len(runner.said)
    assert ran(tmp_path / "x", "--report", runner=runner) == 1 and len(runner.said) == said
    assert json.loads((tmp_path / "x" / "result.json").read_text())["runs_done"] == 3
    smoke = fake.Runner(60)
    assert ran(tmp_path / "s", "--smoke", runner=smoke, seeds=3, match="flops", smoke={"model.context": 64}) == 0
    run = json.loads((tmp_path / "s" / "configs" / "wide-0.json").read_text())
    assert (run["steps"], run["data"]["limit"], run["model"]["context"]) == (2, 64, 64)
    assert {name for _, name in smoke.said} == {"narrow-0", "wide-0"}


def test_bad_input_is_said_before_anything_runs(ran, tmp_path, capsys):
    runner = fake.Runner(60)
    bad = {"a": {"model.fusoin.kind": 1}, "b": {"optim.rl": 1}}
    assert ran(tmp_path / "x", runner=runner, variants=bad) == 2
    assert "fusoin" in (said := capsys.readouterr().err) and "optim.rl" in said
    assert ran(tmp_path / "x", "--size=smal", runner=runner) == 2
    assert ran(tmp_path / "x", runner=runner, metric="questoins/accuracy") == 2
    assert "did you mean 'questions'" in capsys.readouterr().err
    assert ran(tmp_path / "x", runner=runner, match="flops", common={"steps": 3}) == 2
    assert "is the nearest" in capsys.readouterr().err
    assert not runner.said and not (tmp_path / "x" / "sweep.json").exists()


def test_the_page(ran, tmp_path):
    wide = {f"w{w}": {"model.backbone.width": w} for w in (32, 16, 64, 24, 40, 48, 56)}  # one more than colours
    assert ran(tmp_path, variants=wide, seeds=3, common={"steps": 20}, plots=True) == 0
    text = (tmp_path / "report.html").read_text()
    page, found = Page(text), json.loads((tmp_path / "result.json").read_text())
    words = " ".join(page.words.split())
    for title in ("Result", "Which differ", "By kind of question", "Budgets", "Curves", "What differs in the configs",
                  "How to run it again"):  # fmt: skip
        assert title in words
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "base", "object", "img")
        assert all(attributes.get(name, "#").startswith("#") for name in ("src", "href", "xlink:href", "srcset"))
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    plots = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == 2 + 2 * 5, "dots, differences; loss and accuracy against five axes"
    style = text[: text.index("</style>")]
    assert all(f"--{name}:" in style for plot in plots for name in re.findall(r"var\(--(\w+)\)", plot))
    assert page.words.count("less w16") == 1 and text.count('class="better"') == text.count('class="worse"') > 9
    assert "nats a token" in words and "1.000 (1.000 to 1.000)" in words
    for name, one in found["variants"].items():
        mean, low, high = one["mean"]["questions"]
        assert f"{mean:.3f} ({low:.3f} to {high:.3f})" in words
        assert f"{one['budget']['params']:,}" in words and name in words
    of_kinds = (tmp_path / "result.md").read_text().partition("By kind of question:")[2]
    assert of_kinds.split("\n")[2].endswith("| w48 | w56 | counted answers |"), "what can be had blind, too"
    for shown in ("python -m", "abc1234", "jax 0.10.2", "model.backbone.width", "counted answers", "Student's t"):
        assert shown in words
    template = string.Template(Path(ablation_report.__file__).with_name("ablation.html").read_text())
    assert not [name for name in template.get_identifiers() if f"${name}" in text], "a place that was not filled"


def test_a_value_that_is_not_finite(ran, tmp_path, monkeypatch):
    """It is neither better nor worse, and result.json stays JSON."""
    evaluate = fake.Runner._evaluate

    def lost(self, folder, run, name, k):
        evaluate(self, folder, run, name, k)
        path = folder / "eval" / name / f"{run.steps}.json"
        if folder.name == "wide-1":
            path.write_text(path.read_text().replace('"loss": 1.0', '"loss": NaN'))

    monkeypatch.setattr(fake.Runner, "_evaluate", lost)
    assert ran(tmp_path, metric="questions/loss") == 0
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    [pair] = found["pairs"]
    assert (pair["verdict"], pair["p"], pair["stands_among_all"]) == ("not finite: not judged", None, False)
    assert found["variants"]["wide"]["mean"]["questions"] == [None] * 3
    assert "not finite" in (tmp_path / "result.md").read_text()


def test_what_differs_in_a_section_that_is_not_there():
    """A variant without the encoder has not the reference's depth of it."""
    differs = {"deep": {}, "none": {"encoder": [{"depth": 2}, None]}, "deeper": {"encoder.depth": [2, 4]}}
    found = {"variants": {name: {"differs_in": one, "before": []} for name, one in differs.items()}}
    lines = re.findall(r"<tr>(<td>.*?)</tr>", ablation_report._differences(found))
    cells = [re.findall("<td>(.*?)</td>", line) for line in lines]
    assert cells[1] == ["encoder.depth", "2", "", "4"]


def test_items_that_go_by_kinds_are_in_no_records_order(digits_world):
    items = sum(len(sources.asked(record)) for record in sources.open_split(digits_world, "test"))
    for metric, known in (("questions/accuracy", True), ("retrieval/accuracy", False)):
        whose = results.records(config.Config(data=digits_world), results.question(metric, "test", ()), items)
        assert (whose is not None) == known


def test_lanes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    assert lanes.pinned(2) == [{0, 1}, {2, 5}]
    assert lanes.pinned(1) == lanes.pinned(6) == []


def test_what_is_asked_of_a_mixture():
    asked = results.question("questions@poetry/songci/accuracy", "test", ("counted",))
    assert (asked.evaluator, asked.metric, asked.baselines) == (
        "questions@poetry/songci", "accuracy", ("counted@poetry/songci",))  # fmt: skip
    assert asked.told == ["--split=test", "--evaluator=questions@poetry/songci,counted@poetry/songci"]
    loss = results.question("windows/loss_a_letter", "validation", ("counted",))
    assert loss.least_is_best and not asked.least_is_best and not loss.baselines


def test_a_pair_from_its_other_side():
    pair = {"one": "a", "other": "b", "mean": 0.2, "low": 0.1, "high": 0.4, "verdict": "better", "p": 0.01}
    other = {"one": "b", "other": "a", "mean": -0.2, "low": -0.4, "high": -0.1, "verdict": "worse", "p": 0.01}
    assert results.turned(pair) == other and results.turned(other) == pair
    alone = pair | {"low": None, "high": None, "verdict": "not distinguishable"}
    assert results.turned(results.turned(alone)) == alone and results.turned(alone)["verdict"] == alone["verdict"]


def test_a_lane_keeps_to_its_cores(ran, tmp_path):
    runner = fake.Runner(60)
    mine = getattr(os, "sched_getaffinity", lambda pid: set())(0)
    assert ran(tmp_path, "--jobs=2", runner=runner) == 0
    assert {frozenset(cores) for cores in runner.cores} <= set(map(frozenset, lanes.pinned(2) or [mine]))
    assert getattr(os, "sched_getaffinity", lambda pid: set())(0) == mine, "it is the lanes' threads that are pinned"


def test_lines_that_a_resumed_run_adds_are_no_part_of_its_curve(tmp_path):
    run = lanes.Run("a", config.Config(steps=9, log_every=4), work=1)
    (tmp_path / "runs" / "a-0").mkdir(parents=True)
    lines = [{"step": step, "loss": 1.0} for step in (1, 4, 6, 8, 9)] + [{"step": 6, "questions/accuracy": 0.5}]
    (tmp_path / "runs" / "a-0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in results.curve(tmp_path, run, "loss")] == [1, 4, 8, 9]
    assert [line["step"] for line in results.curve(tmp_path, run, "questions/accuracy")] == [6]


def test_a_run_ends_with_its_sweep():
    """The sweep is killed: the kernel ends what it had started. Reading to the end of its output waits for that."""
    if sys.platform != "linux":
        pytest.skip("Linux alone")
    code = f"""
import os, subprocess, sys
waits = "import sys; print('up', flush=True); sys.stdin.read()"
subprocess.run([sys.executable, {child.__file__!r}, str(os.getpid()), sys.executable, "-c", waits])
"""
    read, write = os.pipe()  # keeps the grandchild's stdin open whatever becomes of its parent
    with subprocess.Popen([sys.executable, "-c", code], stdin=read, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
        assert parent.stdout.read() == b"", "it ends only when the grandchild, who has it too, is gone"
    os.close(read), os.close(write)


def test_a_run_that_stands_still_hears_that_it_is_asked_to_stop(tmp_path):
    """Stopped (SIGSTOP), it would be waited for without an end."""
    made = lanes.Lanes(tmp_path, [], [], jobs=1)
    line = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        status = pool.submit(made._process, line, tmp_path / "log")
        while not made._children and not status.done():
            os.sched_yield()
        [process] = made._children
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            made.stop()
            assert status.result(timeout=60) == -signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.soak
def test_killed_three_times(tmp_path, shown):
    """Real runs: result.json and result.md of a sweep that was killed are those of one that was not, byte for byte."""
    line = [sys.executable, "-m", "tests.experiments.two", "--jobs=2"]
    env = os.environ | {"GPT4V_CACHE_DIR": str(tmp_path / "cache")}
    log = (tmp_path / "log").open("w")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert subprocess.run([*line, f"--workdir={whole}"], env=env, stdout=log, stderr=log).returncode == 0

    def sizes():
        with contextlib.suppress(FileNotFoundError):  # a file that was renamed meanwhile
            return [(path, path.stat().st_size) for path in sorted(cut.rglob("*")) if path.is_file()]

    rng = np.random.default_rng(0)
    for _ in range(3):  # at random: after so many looks at which something in the folder was new
        seen, left = sizes(), rng.integers(1, 20)
        process = subprocess.Popen([*line, f"--workdir={cut}"], env=env, stdout=log, stderr=log)
        while left and process.poll() is None:
            time.sleep(0.05)
            now = sizes()
            seen, left = now, left - (now != seen)
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run([*line, f"--workdir={cut}"], env=env, stdout=log, stderr=log).returncode == 0
    for name in ("result.json", "result.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    found = json.loads((cut / "result.json").read_text())
    assert found["runs_done"] == found["runs"] == 4 and found["records"] == 32
    shown("sweep of 4 runs killed 3 times, bytes of result.json that differ", 0, "0")
