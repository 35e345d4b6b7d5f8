"""What is missing is trained and evaluated; what is there is not evaluated again; a failure stops it."""

import subprocess

import pytest

from benchmarks import modalities, omni
from benchmarks.runs import make_runs
from gpt4v_jax import config
from gpt4v_jax.training import checksums


def test_runs(tmp_path, monkeypatch):
    said, status = [], {}

    def run(line):
        _, _, command, folder, *arguments = line
        said.append((command.rpartition(".")[2], folder.rpartition("/")[2], *arguments))
        if command.endswith("train"):
            step = tmp_path / said[-1][1] / "checkpoints" / "20"
            step.mkdir(parents=True, exist_ok=True)
            (step / checksums.NAME).touch()
        return subprocess.CompletedProcess(line, status.get(said[-1][:2], 0))

    monkeypatch.setattr(subprocess, "run", run)
    commands = {"one": ["--config=a.py"], "two": ["--config=b.py", "--x"]}
    status["evaluate", "two"] = 1
    with pytest.raises(config.InputError, match="gpt4v_jax.evaluate of .*two ended with status 1"):
        make_runs(tmp_path, commands)
    trained = [("train", "one", "--config=a.py"), ("train", "two", "--config=b.py", "--x")]
    assert said == [trained[0], ("evaluate", "one"), trained[1], ("evaluate", "two")]
    status.clear(), said.clear()
    make_runs(tmp_path, commands, {"two": [["--split=a"], ["--split=b"]]})
    last = [("evaluate", "two", "--split=a"), ("evaluate", "two", "--split=b")]
    assert said == [*trained, *last], "train finds out itself that nothing is left"


def test_every_row_has_its_run():
    workdirs = {task.workdir for task in modalities.TASKS} | {"moving_digits_still"}
    assert workdirs == set(modalities.RUNS)
    assert [omni.alone(name) for name in omni.MODALITY] == [
        "omni_poetry", "omni_easyvqa", "omni_moving_digits", "omni_fsdd",
    ]  # fmt: skip
