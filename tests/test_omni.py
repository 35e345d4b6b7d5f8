"""Pictures, clips, sounds and text in one run, as a whole: trained, resumed, evaluated, asked and shown."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import wave as wave_lib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import omni
from gpt4v_jax import config, evaluate, report
from gpt4v_jax.data import mixture, packing, sources
from gpt4v_jax.eval import common, shown
from gpt4v_jax.training import metrics, workdir
from gpt4v_jax.training import step as step_lib
from tests.data.test_clip import encode
from tests.data.test_media import png
from tests.generate.test_command import say
from tests.test_report import Page
from tests.test_train import ROOT, ran, run

pytest.importorskip("jiwer")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
WORDS = [("ein Haus", "a house"), ("ein Hund", "a dog"), ("zwei Katzen", "two cats"), ("drei Haeuser", "three houses")]
CONFIG = '''
from gpt4v_jax import config as config_lib

def get_config():
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 4, 4, 1, 2
    config.data.update(
        mixture=("folder:{folder}/pictures/{{split}}: 2", "folder:{folder}/clips/{{split}}",
                 "jsonl:{folder}/sounds/{{split}}.jsonl: 1.5", "jsonl:{folder}/texts/{{split}}.jsonl: 0.5"),
        vocab=300, threads=0, augment=("flip", "shift", "voice", "mask"))
    config.data.audio.per_row = 2
    config.model.context = 96
    config.model.axes = 3
    config.model.image.update(size=8, patch=4)
    config.model.video.update(size=8, patch=4, frames=4, tubelet=2)
    config.model.audio.update(bins=8, patch=4, seconds=0.5, front="conv")
    config.model.backbone.update(depth=1, width=16, heads=2, dropout=0.1)
    config.optim.warmup = 2
    config.eval.update(batch=4, every=2, evaluators=("questions@folder:{folder}/pictures/{{split}}",
                                                     "wer@jsonl:{folder}/sounds/{{split}}.jsonl"))
    return config
'''


def sound(hertz: float) -> bytes:
    file = io.BytesIO()
    with wave_lib.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes((9000 * np.sin(2 * np.pi * hertz * np.arange(4000) / 16000)).astype("<i2").tobytes())
    return file.getvalue()


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Four records of each kind a split: pictures and clips with captions, sounds with their words, German words."""
    home = tmp_path_factory.mktemp("omni")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for k, (name, colour) in enumerate(COLOURS.items()):
            noise = rng.integers(0, 5, (6, 8, 8, 3))
            frames = (np.array(colour) + noise).astype(np.uint8)
            frames[:, :, : 2 + k] //= 2
            write(home / f"pictures/{split}/{name}.png", png(frames[0]))
            write(home / f"pictures/{split}/{name}.txt", f"it is {name}\n")
            write(home / f"clips/{split}/{name}.mkv", encode(frames))
            write(home / f"clips/{split}/{name}.txt", f"all {name}")
            write(home / f"sounds/{split}_{k}.wav", sound(200 * (k + 1)))
        said = [{"prefix": "what is said?", "suffix": f"tone {k}", "audio": f"{split}_{k}.wav", "kind": "speech"}
                for k in range(4)]  # fmt: skip
        write(home / f"sounds/{split}.jsonl", "\n".join(map(json.dumps, said)))
        texts = [{"prefix": f"English: {german}", "suffix": english} for german, english in WORDS]
        write(home / f"texts/{split}.jsonl", "\n".join(map(json.dumps, texts)))
    (home / "omni.py").write_text(CONFIG.format(folder=home))
    return home


@pytest.fixture(scope="module")
def runs(home):
    """-> (folder, states) of four steps, and of two steps, a kill, and the same command again."""
    states = run(home / "omni.py", home / "runs/unbroken")
    first = run(home / "omni.py", home / "runs/resumed", kill_at=2)
    assert sorted(first) == [2] and sorted(states) == [2, 4]
    return states, first | run(home / "omni.py", home / "runs/resumed", **{"data.threads": 2})


@pytest.fixture(scope="module")
def folder(home, runs):
    return home / "runs/unbroken"


def names(folder: Path) -> list[str]:
    entries = config.from_json((folder / "config.json").read_text()).data.mixture
    return [re.sub(r": [\d.]+$", "", entry) for entry in entries]


def test_resume_is_bit_equal(runs):
    unbroken, resumed = runs
    for step in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, resumed[step], unbroken[step])
    moved = jax.tree.map(lambda a, b: (a != b).any(), unbroken[2].params, unbroken[4].params)
    assert all(jax.tree.leaves(moved)), "each modality was read in steps 3 and 4"
    assert set(unbroken[4].params) >= {"image", "video", "audio", "text", "backbone"}


def test_the_metrics_are_equal_too(runs, home):
    """Also what was read of each data set, and the evaluations, by their whole names."""
    lines = []
    for folder in ("unbroken", "resumed"):
        lines.append({})
        for line in metrics.read(home / "runs" / folder):
            for name, value in line.items():
                if name not in ("step", "tokens_per_second", "minutes", "epoch"):
                    assert (line["step"], name) not in lines[-1], "written twice"
                    lines[-1][line["step"], name] = value
    assert lines[0] == lines[1]
    pictures, clips, sounds, texts = names(home / "runs/unbroken")
    for step in (1, 2, 3, 4):
        for name in (pictures, clips, sounds, texts):
            read = lines[0][step, f"data/{name}/epochs"]
            assert read > 0 and lines[0][step, f"data/{name}/media"] == round(read * 4) * (name != texts)
            assert lines[0][step, f"data/{name}/bad"] == 0
    # An epoch is 8 + 4 + 6 + 2 documents.
    assert lines[0][4, f"data/{pictures}/epochs"] > lines[0][4, f"data/{clips}/epochs"]
    assert {step for step, name in lines[0] if name == f"questions@{pictures}/accuracy"} == {2, 4}
    assert {step for step, name in lines[0] if name == f"wer@{sounds}/wer"} == {2, 4}


def test_evaluate(folder):
    """In a process of its own, as a user does, all that the config names; then evaluators for the others."""
    env = os.environ | {"COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "gpt4v_jax.evaluate", f"--workdir={folder}"], cwd=ROOT, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "caption" in done.stdout and "WER" in done.stdout and "counted" in done.stdout
    pictures, clips, sounds, texts = names(folder)
    found = {path.parent.name for path in folder.glob("eval/*/4.json")}
    asked = [(pictures, "questions"), (pictures, "counted"), (sounds, "wer")]
    assert found == {f"{name.replace('/', '-')}-validation-{short}" for name, short in asked}
    result = json.loads(next(folder.glob("eval/*pictures*-questions/4.json")).read_text())
    assert result["kinds"]["caption"][1] == 4 == len(result["right"])
    wanted = [f"bleu@{texts}", f"retrieval@{clips}", f"permuted@{clips}"]
    results = evaluate.evaluate(folder, ["validation"], wanted)
    shorts = {short for by_name in results.values() for short in by_name}
    assert shorts == {"bleu", "retrieval", "permuted"} and len(results) == 2
    for by_name in results.values():
        assert all(len(result.right) == 4 for result in by_name.values())


def test_generate_from_files_of_every_kind(folder, home, capsys, monkeypatch):
    args = [f"--image={home}/pictures/train/red.png", f"--video={home}/clips/train/blue.mkv",
            f"--audio={home}/sounds/train_1.wav", f"--image={home}/pictures/train/blue.png"]  # fmt: skip
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", "--prompt=what?", "--max_new_tokens=3", *args)
    assert status == 0 and out.startswith("answer:   ") and not err, err


@pytest.mark.parametrize("kind, question, truth", [
    (0, "describe the picture.", "it is green"), (1, "describe the clip.", "all green"),
    (2, "what is said?", "tone 1"), (3, "English: ein Hund", "a dog"),
])  # fmt: skip
def test_generate_of_a_record(kind, question, truth, folder, home, capsys, monkeypatch):
    """What it answers is what it says to the record's file."""
    record = f"--record={names(folder)[kind]}/validation:1"
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", record, "--max_new_tokens=4")
    assert status == 0, err
    assert out.startswith(f"question: {question}\ntruth:    {truth}\nanswer:   ")
    file = ["--image={}/pictures/validation/green.png", "--video={}/clips/validation/green.mkv",
            "--audio={}/sounds/validation_1.wav"][kind : kind + 1]  # fmt: skip
    _, same, _ = say(capsys, monkeypatch, f"--workdir={folder}", f"--prompt={question}", "--max_new_tokens=4",
                     *(arg.format(home) for arg in file))  # fmt: skip
    assert out.endswith(same)


def test_the_report_shows_every_kind(folder):
    """Pictures, frames side by side, log-mels; of one height and of another."""
    page = Page(report.report(folder).read_text())
    assert "Not here: no " not in page.words.replace("no results of evaluations", "")
    sizes = {}
    for image in page.of("img"):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        sizes.setdefault(image["alt"], set()).add(picture.size[0] / picture.size[1])
    assert sizes["describe the picture."] == {1.0} and sizes["describe the clip."] == {shown.FRAMES}
    assert sizes["what is said?"] == {25 / 8} and "English: ein Hund" in page.words
    assert "mean of layers" in sizes, "maps of attention"
    for name in names(folder):
        assert name in page.words
    assert "digits_world" not in page.words.partition('"seed"')[0], "the name that a mixture does not read"


@pytest.mark.parametrize("argument, message", [
    ("--config.data.mixture=('emojj: 2',)", ["emojj", "did you mean 'emoji'"]),
    ("--config.data.mixture=('emoji: 0',)", ["'emoji: 0'", "a weight is above 0"]),
    ("--config.data.mixture=('folder:{home}/pictures/{{split}}','folder:{home}/absent')", ["absent is no folder"]),
    ("--config.eval.evaluators=('questions',)", ["say which one, such as @folder:"]),
    ("--config.eval.evaluators=('questions@folder:{home}/picture/{{split}}',)", ["data set=", "did you mean"]),
    ("--config.eval.evaluators=('windows@folder:{home}/pictures/{{split}}',)", ["no plain text"]),
    ("--config.model.audio.bins=0", ["media of the kind audio, and model.audio.bins=0: set it"]),
    ("--config.model.video.size=0", ["media of the kind video, and model.video.size=0: set it"]),
    ("--config.model.video.frames=0", ["frames=0 must be 1 or more"]),
])  # fmt: skip
def test_bad_input(argument, message, home, tmp_path, capsys):
    argument = argument.format(home=home)
    error = ran(capsys, f"--config={home / 'omni.py'}", f"--workdir={tmp_path / 'run'}", argument)
    assert all(part in error for part in message), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args, message", [
    (["--prompt=x", "--audio={home}/pictures/train/red.png"], "red.png: "),
    (["--prompt=x", "--video={home}/sounds/train_1.wav"], "train_1.wav: not a clip"),
    (["--record=validation:0"], "say which one"),
    (["--record=folder:{home}/pictures/{{split}}/validation:4"], "must be"),
])  # fmt: skip
def test_bad_input_of_generate(args, message, home, folder, capsys, monkeypatch):
    args = [arg.format(home=home) for arg in args]
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", *args)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1 and not out, err


def test_a_medium_for_a_model_without(folder, tmp_path, capsys, monkeypatch):
    """It is said before anything is restored."""
    values = json.loads((folder / "config.json").read_text())
    values["model"]["audio"]["bins"] = values["model"]["video"]["size"] = 0
    write(tmp_path / "config.json", json.dumps(values))
    for flag in ("audio", "video"):
        status, _, err = say(capsys, monkeypatch, f"--workdir={tmp_path}", "--prompt=x", f"--{flag}=x")
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert f"reads no {flag}: leave --{flag} out" in err


def test_whose_media_an_answer_reads(folder, monkeypatch):
    """benchmarks.omni: documents of all data sets share rows; other media move their own data set's loss alone."""
    pictures, clips, sounds, texts = names(folder)
    monkeypatch.setattr(omni, "MODALITY", {texts: "text", pictures: "image", clips: "video", sounds: "audio"})
    trained = workdir.restore(folder)
    opened = {
        name: common.open_source(mixture.one(trained.run, name), "validation", trained.tokenizer, trained.layout)
        for name in omni.MODALITY
    }
    together = omni.Together([sources.Questions(source) for source in opened.values()])
    assert sorted(together.owner) == [k for k in range(4) for _ in range(4)] and len(set(together.owner[:4])) > 1
    row = packing.plan_epoch(together.needs(0), trained.layout, None, 0)[0]
    assert len({together.owner[i] for i in row}) > 1, "a row of several data sets"
    subject = common.Subject(
        trained.run, trained.layout, trained.tokenizer, trained.mesh, jax.jit(step_lib.make_eval_step(trained.model)),
        trained.params, None, "validation",
    )  # fmt: skip
    plain = omni.losses(subject, opened)
    for name, source in opened.items():
        nats, tokens, _ = common.score(subject, sources.Questions(source))
        assert plain[name] == pytest.approx(nats.sum() / tokens.sum(), abs=1e-5)
    for changed in (pictures, clips, sounds):
        for how in ("blanked", "exchanged"):
            now = omni.losses(subject, opened, changed, how)
            moved = {name for name in opened if abs(now[name] - plain[name]) > 1e-5}
            assert moved == {changed}, how
    lines = omni.isolation(trained)
    assert len(lines) == 3 + 2 * 3 and lines[2].split(" | ")[1] == f"{plain[texts]:.3f}"
