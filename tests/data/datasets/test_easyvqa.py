"""easy-VQA: each question stands with its picture; kinds follow from answers; the cut is by picture."""

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import easyvqa, raw

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def test_records(monkeypatch, tmp_path):
    asked = {"train": [["is it red?", "yes", 0], ["which shape?", "circle", 11], ["which colour?", "teal", 0],
                       *([f"question {i}", "no", i] for i in range(1, 11))],
             "test": [["which?", "gray", 0], ["is it?", "no", 1]]}
    for part, pictures in (("train", 12), ("test", 2)):
        with zipfile.ZipFile(tmp_path / f"{part}.images.zip", "w") as packed:
            for i in range(pictures):
                packed.writestr(f"{i}.png", png(i + 100 * (part == "test")))
        (tmp_path / f"{part}.questions.json").write_text(json.dumps(asked[part]))
    monkeypatch.setattr(easyvqa, "TRAIN", 10)
    monkeypatch.setattr(easyvqa, "SHA256", {file: raw.digest(raw.unpacked(tmp_path / file)) for file in easyvqa.SHA256})
    builder = datasets.prepare("easyvqa", str(tmp_path / "cache"), str(tmp_path))
    train, validation, test = (list(builder.as_data_source(split)) for split in ("train", "validation", "test"))
    assert [np.unique(r["image"]).tolist() for r in train] == [[0], *([0, i] for i in range(1, 10))]
    assert [np.unique(r["image"]).tolist() for r in validation + test] == [[0, 10], [0, 11], [0, 100], [0, 101]]
    assert train[0]["questions"] == {"kind": [b"yes_no", b"colour"], "question": [b"is it red?", b"which colour?"],
                                     "answer": [b"yes", b"teal"]}
    assert [r["questions"]["question"] for r in train[1:]] == [[f"question {i}".encode()] for i in range(1, 10)]
    assert validation[1]["questions"]["kind"] == [b"shape"]
    assert [r["questions"]["kind"] for r in test] == [[b"colour"], [b"yes_no"]]


def test_there_is_no_download_and_the_message_says_why(tmp_path):
    with pytest.raises(InputError, match="no download.*train.images.zip.*vzhou842/easy-VQA.*single files"):
        datasets.prepare("easyvqa", str(tmp_path), str(tmp_path))


@pytest.mark.skipif(not (REAL / "vqa-easyvqa").is_dir(), reason="the real files are not here")
def test_real_files():
    files = raw.read("easyvqa", "vqa-easyvqa", easyvqa.SHA256, str(REAL), easyvqa.SOURCE)
    for part, pictures, questions in (("train", 4000, 38_575), ("test", 1000, 9673)):
        records = easyvqa.records(files[f"{part}.images.zip"], json.loads(files[f"{part}.questions.json"]))
        assert len(records) == pictures and sum(len(r["questions"]) for r in records) == questions
        assert all(r["questions"] for r in records)
    assert set((REAL / "vqa-easyvqa" / "answers.txt").read_text().split()) == set(easyvqa.KINDS)
