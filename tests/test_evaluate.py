"""Evaluating a run on disk: every split, every evaluator, one table; and names that do not exist."""

import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import rich.console
from absl import flags

from gpt4v_jax import command, config, evaluate, train
from gpt4v_jax.data import sources
from gpt4v_jax.data.datasets.digits_world import KINDS
from gpt4v_jax.eval import common, questions
from gpt4v_jax.training import metrics, workdir


@functools.cache
def trained(data: config.Data, folder: Path) -> Path:
    """A run of four steps: it has learnt nothing, but it is whole."""
    run = config.parse({
        "steps": 4, "batch": 4, "log_every": 1,
        "data": dataclasses.asdict(dataclasses.replace(data, limit=32, turns=4)),
        "model": {"context": 128, "image": {"size": 24, "patch": 12},
                  "backbone": {"depth": 2, "width": 16, "heads": 2}},
        "eval": {"every": 2, "evaluators": ["questions", "permuted"], "best": "questions/loss",
                 "best_mode": "min"},
    })  # fmt: skip
    train.train(run, folder)
    return folder


@pytest.fixture(scope="session")
def folder(digits_world, tmp_path_factory):
    """-> a trained run. (test_report asks for the same one.)"""
    return trained(digits_world, tmp_path_factory.getbasetemp() / "evaluated")


@functools.cache
def evaluated(folder: Path):
    return evaluate.evaluate(folder, [], [])


def ran(capsys, main, *args) -> tuple[int, str]:
    """Runs a command in this process -> (exit status, what it wrote to stderr)."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        try:
            command.run(main, required=("workdir",))
        finally:
            flags.FLAGS.unparse_flags()
            for name in ("workdir", "split", "evaluator", "step"):
                flags.FLAGS[name].value = None
    return ended.value.code, capsys.readouterr().err


def printed(table) -> str:
    console = rich.console.Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_every_split_and_evaluator(folder):
    results = evaluated(folder)
    assert set(results) == {"validation", "test", "compositional"}
    run = config.from_json((folder / "config.json").read_text())
    for split, by_name in results.items():
        assert set(by_name) == {"questions", "permuted", "counted"}
        asked = [q for record in sources.open_split(run.data, split) for q in sources.questions(record)]
        # config.limit bounds training records; a split is evaluated whole.
        for result in by_name.values():
            assert len(result.right) == len(asked) == sum(count for _, count in result.kinds.values())
            assert result.metrics["accuracy"] == pytest.approx(np.mean(result.right))
            for kind, (right, count) in result.kinds.items():
                hits = [hit for hit, question in zip(result.right, asked, strict=True) if question[0] == kind]
                assert (right, count) == (sum(hits), len(hits))


def test_permuted_asks_of_another_picture(folder):
    """Every scene's questions, in their order, with a picture that is another scene's; and every picture is used."""
    trained = workdir.restore(folder)
    source = common.open_source(trained.run, "test", trained.tokenizer, trained.layout)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "_ask", lambda subject, asking: asked.append(asking))
        t = trained
        subject = common.Subject(t.run, t.layout, t.tokenizer, t.mesh, None, None, source, "test")
        questions.accuracy(subject)
        questions.permuted(subject)
    own, other = ([asking.pieces(0, i) for i in range(len(asking.items))] for asking in asked)
    assert [pieces[1:] for pieces in own] == [pieces[1:] for pieces in other]
    assert all(a[0].medium.modality == "image" and a[0].medium.shape == b[0].medium.shape
               for a, b in zip(own, other, strict=True))  # fmt: skip
    pairs = {(a[0].medium.key[0][0], b[0].medium.key[0][0]) for a, b in zip(own, other, strict=True)}
    scenes = {record.number for record in source.records}
    assert scenes == set(range(32))
    assert all(a != b for a, b in pairs) and {a for a, _ in pairs} == {b for _, b in pairs} == scenes
    assert len(pairs) == len(scenes)


@pytest.mark.parametrize("name, message", [("windows", "use the evaluator 'questions'"), ("question", "'questions'")])
def test_an_evaluator_that_does_not_fit(name, message, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(config.InputError, match=message):
        evaluate.evaluate(folder, ["test"], [name])
    assert sorted(folder.rglob("*")) == before


def test_results_on_disk(folder):
    results = evaluated(folder)
    steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    for split, by_name in results.items():
        for name, result in by_name.items():
            path, = (folder / "eval" / f"{split}-{name}").iterdir()
            assert int(path.stem) in steps
            read = common.Result(**json.loads(path.read_text()))
            assert read.metrics == pytest.approx(result.metrics) and tuple(read.right) == result.right
            assert {kind: tuple(counts) for kind, counts in read.kinds.items()} == result.kinds


def test_the_loss_of_the_run_is_found_again(folder):
    """Evaluating the last checkpoint gives what training logged at its end."""
    line = [line for line in metrics.read(folder) if "questions/loss" in line][-1]
    found = evaluate.evaluate(folder, ["validation"], ["questions"], step=4)["validation"]["questions"].metrics
    assert found["loss"] == pytest.approx(line["questions/loss"], rel=1e-6) and line["step"] == 4


def test_counted_answers_by_hand(folder):
    run = config.from_json((folder / "config.json").read_text())
    training = sources.open_split(run.data, "train")
    seen = [q for i in range(run.data.limit) for q in sources.questions(training[i])]
    held_out = [q for record in sources.open_split(run.data, "test") for q in sources.questions(record)]
    for (kind, question, answer), hit in zip(held_out, evaluated(folder)["test"]["counted"].right, strict=True):
        same = [a for _, q, a in seen if q == question] or [a for k, _, a in seen if k == kind]
        assert hit == (min(set(same), key=lambda a: (-same.count(a), a)) == answer)


def test_the_table_has_every_kind(folder):
    for split, by_name in evaluated(folder).items():
        text = printed(evaluate.table(split, by_name))
        assert f"{split} split" in text and max(map(len, text.splitlines())) <= 80, "wider than a terminal"
        for kind in [*KINDS, "all"]:
            row, = (line for line in text.splitlines() if line.split()[:1] == [kind])
            for name in by_name:
                right, asked = by_name[name].kinds.get(kind, (sum(by_name[name].right), len(by_name[name].right)))
                assert f" {right / asked:.3f} 0." in row and f"{asked:,}" in row
        assert f"{by_name['questions'].metrics['loss']:.4f}" in text
    assert set(by_name["questions"].kinds) == set(KINDS)


@pytest.mark.parametrize("right, asked, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_interval(right, asked, low, high):
    """The examples of Newcombe (1998), table I, score method."""
    assert common.interval(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_questions_that_go_together():
    """One a record is as ever; three equal ones count as one; where all are right there is nothing to count by."""
    rng = np.random.default_rng(0)
    right, alone = rng.random(200) < 0.7, np.arange(200)

    def ends(*arrays):
        return tuple(common.by_record(*arrays)[end] for end in ("low", "high"))

    assert ends(right, alone) == pytest.approx(common.interval(right.sum(), 200))
    assert ends(np.repeat(right, 3), np.repeat(alone, 3)) == pytest.approx(common.interval(right.sum(), 200), abs=1e-3)
    assert ends(np.ones(9, bool), np.arange(9) // 3) == common.interval(9, 9)
    assert ends(right[:3], np.zeros(3)) == (0, 1)
    many = [ends(rng.random(600) < 0.5, np.arange(600) // 3) for _ in range(200)]
    assert 0.92 < np.mean([low < 0.5 < high for low, high in many]) < 0.99
    for k in (3, 6):  # few that differ much, such as speakers
        shares = np.clip(rng.normal(0.75, 0.06, (400, k)), 0, 1)
        many = [ends(rng.random(500 * k) < np.repeat(share, 500), np.arange(500 * k) // 500) for share in shares]
        assert 0.92 < np.mean([low < 0.75 < high for low, high in many]) < 0.99, k


def test_permuted_where_some_records_have_no_picture(capsys):
    """Each picture is exchanged, with a record that has what it needs; what cannot be is said."""
    kinds = ["", "i", "", "i", "a", "ia", "i", "ia"]
    names = {"i": "image", "a": "audio"}
    records = [types.SimpleNamespace(all_media=[types.SimpleNamespace(modality=names[k]) for k in kind])
               for kind in kinds]  # fmt: skip
    other = questions.others(records)
    assert [r == o for r, o in enumerate(other)] == [not kind for kind in kinds]
    assert all(set(kinds[r]) <= set(kinds[o]) for r, o in enumerate(other)) and not capsys.readouterr().err
    assert questions.others(records[3:6]) == [2, 2, 2]
    assert "1 of 3 records keep their media" in capsys.readouterr().err


@pytest.mark.parametrize("argument, message", [
    ("--split=tset", ["'tset'", "'test'"]),
    ("--evaluator=question", ["'question'", "'questions'"]),
    ("--evaluator=questions@easyvqa", ["'easyvqa'", "digits_world"]),
    ("--step=3", ["3", "checkpoint"]),
])  # fmt: skip
def test_names_that_do_not_exist(argument, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    status, error = ran(capsys, evaluate.main, f"--workdir={folder}", argument)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in message), error
    assert sorted(folder.rglob("*")) == before


def test_a_folder_without_a_run(tmp_path, capsys):
    status, error = ran(capsys, evaluate.main, f"--workdir={tmp_path / 'none'}")
    assert status == 2 and "holds no run" in error and not (tmp_path / "none").exists()
