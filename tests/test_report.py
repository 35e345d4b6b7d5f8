"""The page of a run: self-contained, whole, and honest about what is missing."""

import base64
import html.parser
import io
import json
import re
import shutil
import string
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import config, evaluate, report, train
from gpt4v_jax.data import sources
from gpt4v_jax.data.datasets.digits_world import KINDS
from gpt4v_jax.eval import common, shown
from gpt4v_jax.generate import decode
from tests.test_evaluate import evaluated, folder, ran  # noqa: F401

SECTIONS = ["Training", "Accuracy by kind of question", "What it answers", "Where it looks", "How it was made"]
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, the visible text, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.open = [], "", []
        self.feed(text)
        assert not self.open or self.open == ["thead"], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data

    def of(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def page(folder):  # noqa: F811
    evaluated(folder)
    assert report.report(folder) == folder / "report.html"
    return Page((folder / "report.html").read_text())


def test_every_section_is_there(page):
    text = page.words.replace("\n", " ")
    at = [text.index(title) for title in SECTIONS]
    assert at == sorted(at) and not [a for a in page.of("section") if "hidden" in a]
    assert "Not here" not in text
    template = string.Template((Path(report.__file__).parent / "report.html").read_text())
    assert not [name for name in template.get_identifiers() if f"${name}" in text], "a place that was not filled"
    assert "digits_world/small" in text and '"steps": 4' in text


def test_nothing_is_loaded_from_elsewhere(page, folder):  # noqa: F811
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "base", "object")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#")), (tag, attributes[name][:80])
    text = (folder / "report.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_plots_are_drawn_in_the_colours_of_the_page(folder, page):  # noqa: F811
    text = (folder / "report.html").read_text()
    plots = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(plots) >= 5  # loss, accuracy, kinds over time, speed, two splits
    style = text[: text.index("</style>")]
    for plot in plots:
        xml.dom.minidom.parseString(plot.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert set(re.findall(r"var\(--(\w+)\)", plot)) >= {"ink", "line"}
        assert all(f"--{name}:" in style for name in re.findall(r"var\(--(\w+)\)", plot))
        assert not [c for c in re.findall(r"#[0-9a-f]{6}\b", plot) if c not in ("#000000", "#ffffff")]
    assert style.count("--ink:") == 2, "one for light, one for dark"


def test_numbers_of_the_table(folder, page):  # noqa: F811
    rows = re.findall(r"<tr class=.*?(?=<tr|</tbody)", (folder / "report.html").read_text())
    assert len(rows) == len(KINDS) + 1
    results = evaluated(folder)
    for row in rows:
        kind, *cells = re.findall(r"<td[^>]*>(.*?)(?:<small>(.*?)</small>)?</td>", row)
        expected = []
        for split in ("test", "compositional"):
            for name in ("questions", "permuted", "counted"):
                result = results[split][name]
                right, asked = result.kinds.get(kind[0], (sum(result.right), len(result.right)))
                low, high = common.interval(right, asked) if kind[0] != "all" else result.share()[1:]
                expected += [(f"{asked:,}", "")] if name == "questions" else []
                expected.append((f"{right / asked:.3f}", f"{low:.2f} to {high:.2f}"))
        assert cells == expected


def test_right_and_wrong_answers_are_marked(folder, monkeypatch, page):  # noqa: F811
    """The truth is said of two in three questions, and nonsense with a < in it of the others."""
    asked, real = [], shown.sources.Questions
    monkeypatch.setattr(shown.sources, "Questions", lambda source: asked.append(real(source)) or asked[0])

    def generate(trained, prompts, *rest):
        turns = [turn for _, turn in asked[0].items]
        chosen = np.random.default_rng(0).permutation(len(turns))[: len(prompts)]
        return [decode.Answer(turns[k].answer if i % 3 else "<i>", (), "stop") for i, k in enumerate(chosen)]

    monkeypatch.setattr(shown.decode, "generate", generate)
    text = report.report(folder).read_text()
    grid = text[text.index('class="pictures"') : text.index("Where it looks")]
    assert grid.count('<figure class="right">') == grid.count("✓ right") == 16
    assert grid.count('<figure class="wrong">') == grid.count("✗ wrong") == grid.count("truth: <b>") == 8
    assert grid.count("&lt;i&gt;") == 8 and "<i>" not in text
    assert "16 right" in text


def test_pictures_and_maps(page):
    sizes = {}
    for image in page.of("img"):
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        sizes[picture.size] = sizes.get(picture.size, 0) + 1
    depth = 2
    assert sizes == {(24, 24): shown.SHOWN + shown.EXPLAINED, (72, 72): shown.EXPLAINED * (depth + 1)}


def test_the_newest_result_is_shown(tmp_path):
    for step, right in ((2, 1), (10, 3), (9, 2)):
        path = tmp_path / "eval" / "my-split-questions" / f"{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"metrics": {}, "kinds": {"a": [right, 4], "b": [0, 4]}, "right": []}))
    found = report.read_results(tmp_path)["my-split"]["questions"]
    assert (found.step, found.result.counts("a"), found.result.counts()) == (10, (3, 4), (3, 8))
    assert found.result.share()[0] == 3 / 8


def test_each_data_set_of_a_mixture_has_its_own_kinds():
    def result(**kinds):
        return {"questions": report.Found(3, common.Result({}, kinds))}

    drawn = report._kinds({"a-test": result(what=(1, 2), where=(2, 2)), "b-test": result(digit=(3, 4)),
                           "a-validation": result(where=(1, 4))})  # fmt: skip
    tables = [part.partition("</table>")[0] for part in drawn.split("<table>")[1:]]
    assert [re.findall("<td>([a-z]+)</td>", table) for table in tables] == [["where", "what", "all"], ["digit", "all"]]
    assert "a-validation" in tables[0] and "b-test" in tables[1] and "nan" not in tables[1]


@pytest.fixture
def blank(folder, page, tmp_path):  # noqa: F811
    """-> the workdir of a run on blank pictures, with its own results, which answer nothing right."""
    run = json.loads((folder / "config.json").read_text())
    copy = tmp_path / "blank"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(run | {"data": run["data"] | {"blank": ["image"]}}))
    (copy / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    for split in ("test", "compositional"):
        kinds = {kind: [0, asked] for kind, (_, asked) in evaluated(folder)[split]["questions"].kinds.items()}
        path = copy / "eval" / f"{split}-questions" / "7.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"metrics": {"loss": 1.0}, "kinds": kinds, "right": []}))
    return copy


def test_a_model_trained_blind_stands_beside_the_model(folder, blank):  # noqa: F811
    results = report.read_results(folder, blank)
    assert results["test"]["blank"].step == 7 and "blank" not in report.read_results(folder)["test"]
    text = Page(report.report(folder, blank).read_text()).words
    assert "0.0% with blank training" in text and text.count("blank training") > 4


def test_what_is_no_blind_run_is_refused(folder, page, blank):  # noqa: F811
    with pytest.raises(config.InputError, match="was trained with its media: name a run with data.blank set"):
        report.report(folder, folder)
    run = json.loads((blank / "config.json").read_text())
    (blank / "config.json").write_text(json.dumps(run | {"steps": 3}))
    with pytest.raises(config.InputError, match="is another run: its steps is 3, not 4"):
        report.report(folder, blank)
    (blank / "config.json").write_text(json.dumps(run))
    lines = (blank / "metrics.jsonl").read_text()
    (blank / "metrics.jsonl").write_text(lines.replace("4", "3", 1))
    with pytest.raises(config.InputError, match="has trained 3 of 4 steps"):
        report.report(folder, blank)
    (blank / "metrics.jsonl").write_text(lines)
    shutil.rmtree(blank / "eval")
    with pytest.raises(config.InputError, match="has no results yet: run python -m gpt4v_jax.evaluate --workdir"):
        report.report(folder, blank)


@pytest.mark.parametrize("removed, named", [
    (["eval"], ["python -m gpt4v_jax.evaluate --workdir"]),
    (["checkpoints"], ["no checkpoint", "python -m gpt4v_jax.train --config CONFIG --workdir"]),
    (["metrics.jsonl"], ["no step has been logged", "python -m gpt4v_jax.train"]),
    (["eval", "checkpoints", "metrics.jsonl", "environment.json"], ["python -m gpt4v_jax.evaluate"]),
])  # fmt: skip
def test_what_is_missing_is_said(removed, named, folder, page, tmp_path):  # noqa: F811
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for name in removed:
        (shutil.rmtree if (copy / name).is_dir() else lambda path: path.unlink())(copy / name)
    part = Page(report.report(copy).read_text())
    assert "Not here" in part.words and all(text in part.words for text in named), part.words
    assert all(title in part.words for title in SECTIONS)


@pytest.mark.parametrize("beside", [False, True])
def test_the_terminal(beside, folder, page, blank, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(report, "report", lambda folder, blank: folder / "report.html")
    monkeypatch.setattr(report, "_WORKDIR", type("Flag", (), {"value": str(folder)}))
    monkeypatch.setattr(report, "_BLANK", type("Flag", (), {"value": str(blank) if beside else None}))
    report.main()
    out = capsys.readouterr().out
    for kind in KINDS:
        right, asked = evaluated(folder)["test"]["questions"].kinds[kind]
        assert re.search(rf"^ *{kind} +{asked} +{right / asked:.3f} 0\.\d+-", out, flags=re.MULTILINE), out
    for label, split in (("all", "test"), ("compositional", "compositional")):
        right = evaluated(folder)[split]["questions"].right
        assert re.search(rf"^ *{label} +{len(right)} +{np.mean(right):.3f} ", out, flags=re.MULTILINE), out
    assert ("blank" in out) == beside
    assert "tokens/s" in out and str(folder / "report.html") in out
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80


def test_nothing_is_left_half_written(folder, page, monkeypatch):  # noqa: F811
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(report, "_kinds", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.report(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_without_a_run(tmp_path, capsys):
    status, error = ran(capsys, report.main, f"--workdir={tmp_path / 'none'}")
    assert status == 2 and error.startswith("error: ") and "holds no run" in error
    assert not (tmp_path / "none").exists()


def test_a_run_on_text(tmp_path, monkeypatch):
    """Characters, windows, and samples in place of pictures."""
    text = "to be or not to be, that is <the> question. " * 40
    records = {"train": [{"text": text}], "validation": [{"text": text[:900]}]}
    monkeypatch.setattr(sources, "open_split", lambda data, split: records[split])
    monkeypatch.setattr(sources, "splits", lambda data: sorted(records))
    run = config.parse({
        "steps": 2, "batch": 2, "log_every": 1, "data": {"name": "tiny_shakespeare", "tokenizer": "char", "threads": 0},
        "model": {"context": 16, "backbone": {"depth": 1, "width": 16, "heads": 2}},
        "eval": {"batch": 8, "evaluators": ["windows"]},
    })  # fmt: skip
    train.train(run, tmp_path / "run")
    loss = evaluate.evaluate(tmp_path / "run", [], [])["validation"]["windows"].metrics["loss"]
    page = Page(report.report(tmp_path / "run").read_text())
    assert f"loss on the validation split is {loss:.3f} nats a token" in page.words
    assert len(page.of("pre", **{"class": "sample"})) == 4 and not page.of("img")
    assert len([a for a in page.of("section") if "hidden" in a]) == 2 and "What it writes" in page.words
    for given in re.findall(r'class="given">(.*?)</span>', (tmp_path / "run" / "report.html").read_text(), re.DOTALL):
        assert html.unescape(given) in text and len(html.unescape(given)) == 4
