"""The loop as a whole, on real pictures: resuming, and bad input."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from gpt4v_jax import command, config, train
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.training import checkpoint, lock, metrics, steps, stop, workdir
from gpt4v_jax.training import step as step_lib

ROOT = Path(__file__).parent.parent
CONFIG = '''
from gpt4v_jax import config as config_lib

def get_config():
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 4, 4, 1, 2
    config.data.update(name="digits_world/small", cache="{cache}", vocab=400, turns=2, threads={threads})
    config.model.context = 128
    config.model.image.update(size=24, patch=12)
    config.model.backbone.update(depth=1, width=16, heads=2, dropout=0.1)
    config.optim.warmup = 2
    config.eval.update(batch=16, limit=4, every=2, evaluators=("questions",), best="questions/accuracy")
    return config
'''


class Killed(Exception):
    pass


def run(file: Path, folder: Path, kill_at: int = 0, **changes):
    """Trains as the config file says -> {step: the state that was saved}; `kill_at`: dies when that one is on disk.

    changes: keys of the config, such as "optim.lr".
    """
    states = {}

    def save(checkpoints, state):
        real(checkpoints, state)
        states[int(state.step)] = jax.device_get(state)
        if kill_at == int(state.step):
            checkpoints.wait()
            raise Killed

    real = checkpoint.Checkpoints.save
    namespace = {}
    exec(file.read_text(), namespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save)
        try:
            values = namespace["get_config"]()
            values.update_from_flattened_dict(changes)
            train.train(config.from_flag(values), folder)
        except Killed:
            assert kill_at
    return states


@pytest.fixture(scope="module")
def file(digits_world, tmp_path_factory):
    """-> write(threads) -> a config file of the smallest run with pictures, dropout and evaluation."""
    folder = tmp_path_factory.mktemp("configs")

    def write(threads=0):
        path = folder / f"tiny_{threads}.py"
        path.write_text(CONFIG.format(cache=digits_world.cache, threads=threads))
        return path

    return write


@pytest.fixture(scope="module")
def runs(file, tmp_path_factory):
    """-> (folder, states) of four steps, and of two steps, a kill, and the same command again."""
    unbroken, resumed = tmp_path_factory.mktemp("unbroken") / "run", tmp_path_factory.mktemp("resumed") / "run"
    states = run(file(), unbroken)
    first = run(file(), resumed, kill_at=2)
    assert sorted(first) == [2] and sorted(states) == [2, 4]
    # The second half with reading threads: they change nothing.
    return (unbroken, states), (resumed, first | run(file(threads=2), resumed))


def test_resume_is_bit_equal(runs):
    (_, unbroken), (_, resumed) = runs
    for step in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, resumed[step], unbroken[step])
    moved = jax.tree.map(lambda a, b: (a != b).any(), unbroken[2].params, unbroken[4].params)
    assert all(jax.tree.leaves(moved)), "steps 3 and 4 moved every parameter"


def test_resume_leaves_no_hole_in_the_metrics(runs):
    """Every number of every step is there, once, and equal, but for the times."""
    lines = []
    for folder, _ in runs:
        values = {}
        for line in metrics.read(folder):
            for name, value in line.items():
                if name not in ("step", "tokens_per_second", "minutes", "epoch"):
                    assert (line["step"], name) not in values, "written twice"
                    values[line["step"], name] = value
        lines.append(values)
    assert {step for step, name in lines[0] if name == "loss"} == {1, 2, 3, 4}
    assert {step for step, name in lines[0] if name == "questions/accuracy"} == {2, 4}
    read = [lines[0][step, "data/digits_world/small/tokens"] for step in (1, 2, 3, 4)]
    assert 0 < read[0] < read[1] < read[2] < read[3] <= 4 * 4 * 128
    assert lines[1] == lines[0]


def test_the_run_on_disk(runs):
    for folder, _ in runs:
        names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
        files = {"config.json", "environment.json", "tokenizer.json", "metrics.jsonl", "goodput.json"}
        assert names == {*files, "checkpoints"}
        assert list(folder.glob("events.*"))
        assert config.from_json((folder / "config.json").read_text()).steps == 4


def test_the_first_loss_is_ln_v(runs):
    (folder, _), _ = runs
    vocab = config.from_json((folder / "config.json").read_text()).model.vocab
    assert abs(metrics.read(folder)[0]["loss"] / np.log(vocab) - 1) < 0.05


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ran(capsys, *args) -> str:
    """Runs the command in this process -> what it says when it ends with status 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            command.run(train.main, required=("config", "workdir"))
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        flags.FLAGS["config"].value = flags.FLAGS["workdir"].value = None
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


@pytest.mark.parametrize("argument, message", [
    ("--config.stepz=3", ["stepz", "steps"]),
    ("--config.model.backbone.widht=32", ["widht", "width"]),
    ("--config.steps=ten", ["steps", "ten"]),
    ("--config.optim.name=adam", ["name='adam'", "'adamw'"]),
    ("--config.data.name=digit_world", ["digit_world", "'digits_world'"]),
    ("--config.eval.evaluators=('question',)", ["question", "'questions'"]),
    ("--config.model.fusion.kind=concta", ["concta", "'concat'"]),
    ("--config.mesh.data=3", ["1 devices", "mesh"]),
    ("--config.mesh.dta=1", ["unknown config key dta", "data"]),
    ("--config.mesh.across=tensr", ["across='tensr'", "'tensor'"]),
    ("--config.compute.accumulate=3", ["batch=4 is not a multiple of compute.accumulate=3"]),
    ("--config.compute.remat=ful", ["remat='ful'", "'full'"]),
    ("--config.optim.lr=inf", ["lr=inf must be 0 or more, and finite"]),
    ("--config.optim.lr_factors=('^txt/=0.1',)", ["'^txt/' matches no parameter"]),
    ("--config.optim.frozen=.", ["frozen"]),
    ("--config.init_from.run=runs/absent", ["runs/absent holds no run"]),
    ("--config.model.image.size=0", ["image.size"]),
    ("--config.model.context=8", ["none that a row can hold", "raise model.context"]),
    ("--config.model.vocab=50", ["token id", "vocabulary of 50"]),
    ("--config.data.blank=('imaeg',)", ["config.data", "'imaeg'", "'image'"]),
    ("--config.eval.best=question/accuracy", ["config.eval", "best='question'", "'questions'"]),
    ("--config.eval.best=questions/acuracy", ["config.eval", "best='acuracy'", "'accuracy'"]),
    ("--config.eval.best=questions/accuracy/whta", ["config.eval.best='questions/accuracy/whta'", "accuracy/what"]),
    ("--config.eval.best=questions/bleu", ["config.eval.best='questions/bleu'", "questions/accuracy"]),
    ("--config.eval.split=tset", ["split 'tset' of digits_world/small is none of", "did you mean 'test'"]),
    ("--config.eval.evaluators=()", ["needs the evaluator 'questions'"]),
    ("--config.eval.evaluators=('questions','windows')", ["no plain text", "'questions'"]),
    ("--config.batch=0", ["batch=0 must be 1 or more"]),
    ("--config.seed=-1", ["seed=-1 must be 0 or more"]),
    ("--config.log_every=0", ["log_every=0 must be 1 or more"]),
    ("--config.eval.batch=0", ["config.eval: batch=0 must be 1 or more"]),
    ("--config.model.backbone.heads=0", ["config.model.backbone: heads=0 must be 1 or more"]),
    ("--config.model.backbone.head_dim=5", ["head_dim=5 must be even"]),
    ("--config.model.image.patch=0", ["config.model.image: patch=0 must be 1 or more"]),
    ("--config.optim.frozen=nothing", ["'nothing'", "matches no parameter"]),
    ("stray", ["unexpected argument 'stray'"]),
])  # fmt: skip
def test_bad_input(argument, message, file, tmp_path, capsys):
    error = ran(capsys, f"--config={file()}", f"--workdir={tmp_path / 'run'}", argument)
    assert all(part in error for part in message), error
    assert not (tmp_path / "run").exists(), sorted((tmp_path / "run").rglob("*"))


def test_missing_flags(file, tmp_path, capsys):
    assert "--workdir is missing" in ran(capsys, f"--config={file()}")
    assert "absent.py" in ran(capsys, f"--config={tmp_path / 'absent.py'}", f"--workdir={tmp_path / 'run'}")


def test_a_workdir_of_another_model(runs, file, capsys):
    (folder, _), _ = runs
    before = contents(folder)
    error = ran(capsys, f"--config={file()}", f"--workdir={folder}", "--config.model.backbone.width=32")
    assert "parameter backbone/block_0/attention/key/kernel is (16, 2, 8) there and (32, 2, 16) in this config" in error
    assert contents(folder) == before


@pytest.mark.parametrize("argument, message", [
    ("--config.data.blank=('image',)", "data.blank=(), in this config it is ('image',)"),
    ("--config.optim.name=muon", "optim.name='adamw', in this config it is 'muon'"),
    ("--config.data.tokenizer=char", "data.tokenizer='bpe', in this config it is 'char'"),
    ("--config.model.fusion.kind=prefix_lm", "model.fusion.kind='concat', in this config it is 'prefix_lm'"),
    ("--config.eval.best=questions/loss", "eval.best='questions/accuracy'"),
    ("--config.seed=1", "seed=0, in this config it is 1"),
])  # fmt: skip
def test_a_workdir_of_another_run(argument, message, runs, file, capsys):
    """Of the same parameters, but not the run that the folder says it is."""
    (folder, _), _ = runs
    before = contents(folder)
    assert message in ran(capsys, f"--config={file()}", f"--workdir={folder}", argument)
    assert contents(folder) == before


def test_a_workdir_that_is_a_file(file, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert "run cannot be written" in ran(capsys, f"--config={file()}", f"--workdir={tmp_path / 'run'}")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_that_another_trainer_uses(runs, file, capsys):
    (folder, _), _ = runs
    before = contents(folder / "checkpoints")
    with lock.hold(folder):
        error = ran(capsys, f"--config={file()}", f"--workdir={folder}", "--config.steps=9")
    assert f"is in use by pid {os.getpid()} on" in error and contents(folder / "checkpoints") == before


def test_a_run_that_is_stopped_in_its_evaluation(runs, file, tmp_path):
    """It is saved before it is evaluated; the same command evaluates it, and goes on to the same numbers."""
    (folder, _), _ = runs

    def interrupted(subject):
        os.kill(os.getpid(), signal.SIGTERM)
        subject.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eval_lib.EVALUATORS, "questions", interrupted)
        with pytest.raises(command.Leave, match="saved step 2 of 4") as left:
            run(file(), tmp_path / "run")
    assert left.value.status == stop.PREEMPTED and not metrics.evaluated(tmp_path / "run", 2)
    run(file(), tmp_path / "run")
    values = [
        {(line["step"], name): value for line in metrics.read(f) for name, value in line.items()
         if name.startswith("questions/")}
        for f in (folder, tmp_path / "run")
    ]
    assert values[0] == values[1] and {step for step, _ in values[0]} == {2, 4}
    assert {step: m for step, m in steps.measured(tmp_path / "run/checkpoints", "questions/loss").items()} == {
        step: values[0][step, "questions/loss"] for step in (2, 4)
    }


def test_the_guard_stops_a_run(file, tmp_path):
    """Every loss of these pictures is not a number: the run stops when it has skipped so many steps, and says which."""
    def spoilt(model, params, batch, keys=None):
        scores = real(model, params, batch, keys)
        return scores._replace(nats=scores.nats * np.nan)

    real = step_lib.token_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "token_scores", spoilt)
        with pytest.raises(command.Leave, match="3 steps up to step 3 were skipped in a row") as left:
            run(file(), tmp_path / "run", **{"guard.limit": 3, "save_every": 4, "eval.every": 4})
    assert left.value.status == stop.STOPPED and not checkpoint.exists(tmp_path / "run")
    assert [line["skipped"] for line in metrics.read(tmp_path / "run") if "skipped" in line][-1] >= 3
    assert (tmp_path / "run" / "goodput.json").exists()


def test_no_checkpoint_while_step_after_step_is_skipped(runs, file, tmp_path):
    """Parameters that are ruined would take the place of good ones."""
    (folder, _), _ = runs
    shutil.copytree(folder, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "make_train_step", lambda model, tx, run: spoiling(real(model, tx, run)))
        with pytest.raises(command.Leave):
            run(file(), tmp_path / "run", **{"steps": 20, "save_every": 1, "eval.every": 99, "guard.limit": 8})
    assert steps.finished(tmp_path / "run" / "checkpoints") == [4, 5], "none of the eight that were skipped"


def spoiling(train_step):
    """Its parameters become so large that no later loss is a number."""

    def spoilt(state, batch):
        new, values = train_step(state, batch)
        worse = jax.tree.map(lambda x: x * jax.numpy.where(state.step == 4, 1e38, 1.0), new.params)
        return new.replace(params=worse), values

    return spoilt


real = step_lib.make_train_step


def test_a_signal_before_the_first_step(file, tmp_path):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return made(*args)

    made = train.optim.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.optim, "make", interrupted)
        with pytest.raises(command.Leave, match="before the first step: nothing is lost") as left:
            run(file(), tmp_path / "run")
    assert left.value.status == stop.PREEMPTED and not checkpoint.exists(tmp_path / "run")
    assert not (tmp_path / "run" / "lock").exists()


def test_more_steps_than_before_are_said(runs, file, tmp_path, capsys):
    (folder, _), _ = runs
    shutil.copytree(folder, tmp_path / "run")
    run(file(), tmp_path / "run", steps=6)
    said = capsys.readouterr().out
    assert "steps was 4 and is 6: the learning rate goes on from 0.00055, not 0.0001" in said
    assert [line["step"] for line in metrics.read(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_parameters_from_another_run(runs, file, tmp_path, capsys):
    (folder, states), _ = runs
    more = {"init_from.run": str(folder), "init_from.run_parameters": "^text/", "optim.lr": 0.0}
    new = run(file(), tmp_path / "run", **more)
    said = capsys.readouterr().out
    assert "init_from.run" in said and "loaded: text/embed/table" in said and "newly initialised: backbone" in said
    best = checkpoint.Checkpoints(folder, "questions/accuracy", read_only=True).best()
    for here, there in ((new[4].params, states[best].params),):
        np.testing.assert_array_equal(here["text"]["embed"]["table"], there["text"]["embed"]["table"])
        assert (here["backbone"]["norm"]["scale"] != there["backbone"]["norm"]["scale"]).any()


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert workdir.environment()["commit"] == "unknown"


def test_what_the_terminal_says_is_what_the_log_says(runs, capsys, file, tmp_path):
    run(file(), tmp_path / "run")
    said = re.findall(r"step (\d)/4  loss ([\d.]+) ", capsys.readouterr().out)
    logged = {line["step"]: line["loss"] for line in metrics.read(tmp_path / "run") if "tokens_per_second" in line}
    assert said == [(str(step), f"{loss:.4f}") for step, loss in logged.items()] and len(said) == 3


def test_a_finished_run_again_changes_no_checkpoint(runs, file):
    """The same command once more: nothing is left to do, and that is no error."""
    (folder, _), _ = runs
    before = contents(folder / "checkpoints")
    lines = metrics.read(folder)
    assert run(file(), folder) == {}
    assert contents(folder / "checkpoints") == before and metrics.read(folder) == lines


def test_a_batch_that_the_devices_cannot_share(file, tmp_path):
    """The real command in a process of its own, with four devices: one line, status 2, no folder."""
    result = subprocess.run(
        [sys.executable, "-m", "gpt4v_jax.train", f"--config={file()}", f"--workdir={tmp_path / 'run'}",
         "--config.batch=6"],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "config.batch=6 is not divisible by the mesh's data x fsdp = 4" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_a_line_an_epoch():
    """Means since the last line; an epoch that ends between two evaluations shows the last one, and says so."""
    since, results = [(2.0, 0.5), (1.0, 1.0)], {"questions/loss": 0.25, "questions/accuracy/what": 0.5}
    said = "epoch 3 step 20  loss 1.5000  token accuracy 0.7500"
    assert metrics.epoch_line(20, 3, since, results, 20) == f"{said}  | held out questions/loss 0.2500"
    assert metrics.epoch_line(20, 3, since, results, 10) == f"{said}  | held out of step 10 questions/loss 0.2500"
    assert metrics.epoch_line(20, 3, since, {}, 0) == said
