"""Sentences with their label, in splits that do not depend on the order of the files."""

import pathlib
import zipfile

import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import raw, sentence_polarity

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """A zip of 10 good and 10 bad sentences, with blanks around them."""
    path = tmp_path / "sentence_polarity.zip"
    with zipfile.ZipFile(path, "w") as file:
        for label, name in sentence_polarity.FILES.items():
            file.writestr(f"sentence_polarity/{name}", "".join(f"{label} é {i} \n" for i in range(10)))
    monkeypatch.setattr(sentence_polarity, "SHA256", {path.name: raw.digest(raw.unpacked(path))})
    return path


def test_records(packed):
    builder = datasets.prepare("sentence_polarity", str(packed.parent / "cache"), str(packed.parent))
    found = {split: [record["questions"] for record in builder.as_data_source(split)] for split in builder.info.splits}
    assert {split: len(records) for split, records in found.items()} == {"train": 16, "validation": 2, "test": 2}
    texts = set()
    for q in sum(found.values(), []):
        (kind,), (question,), (answer,) = q["kind"], q["question"], q["answer"]
        label, accent, _ = question.decode().split(" ")
        assert (kind, answer.decode(), accent) == (b"polarity", label, "é")
        texts.add(question)
    assert len(texts) == 20
    answers = [q["answer"][0] for q in found["train"]]
    assert answers != sorted(answers) and answers != sorted(answers, reverse=True)


def test_a_missing_file_is_downloaded(packed, monkeypatch):
    asked = []

    def download(self, url):
        asked.append(url)
        return packed.parent / "elsewhere"

    monkeypatch.setattr("tensorflow_datasets.core.download.DownloadManager.download", download)
    packed.rename(packed.parent / "elsewhere")
    datasets.prepare("sentence_polarity", str(packed.parent / "cache"), str(packed.parent))
    assert asked == [sentence_polarity.SOURCE + packed.name]


def test_another_file_is_refused(packed, monkeypatch):
    monkeypatch.setitem(sentence_polarity.SHA256, packed.name, "0" * 64)
    with pytest.raises(InputError, match="sentence_polarity.zip"):
        datasets.prepare("sentence_polarity", str(packed.parent / "cache"), str(packed.parent))


@pytest.mark.skipif(not (REAL / "cls-sentence-polarity").is_dir(), reason="the real files are not here")
def test_real_files():
    (files,) = raw.read("sentence_polarity", "cls-sentence-polarity", sentence_polarity.SHA256, str(REAL), "").values()
    assert [len(files[file].splitlines()) for file in sentence_polarity.FILES.values()] == [5331, 5331]
