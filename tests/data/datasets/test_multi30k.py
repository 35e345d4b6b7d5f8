"""Multi30k: lines stay beside their translation, in both directions; what a language lacks is no split."""

import gzip
import hashlib
import pathlib

import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import multi30k, raw

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Two lines in each file; some have spaces around them, and one has a character that looks like a new line."""
    sums = {}
    for file in multi30k.SHA256:
        content = f" {file} a\u2028b \n{file} c\n".encode()
        sums[file] = hashlib.sha256(content).hexdigest()
        (tmp_path / file).write_bytes(gzip.compress(content))
    monkeypatch.setattr(multi30k, "SHA256", sums)
    return tmp_path


@pytest.mark.parametrize("config", ["", "en-de", "fr-en", "en-fr", "cs-en", "en-cs"])
def test_records(config, files):
    builder = datasets.prepare("multi30k/" * bool(config) + (config or "multi30k"), str(files / "cache"), str(files))
    config = config or "de-en"
    stems = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    if "cs" not in config:
        stems |= {"test_2017_flickr": "test_2017_flickr", "test_2017_mscoco": "test_2017_mscoco"}
    assert set(builder.info.splits) == set(stems)
    source, target = config.split("-")
    for split, stem in stems.items():
        for record, text in zip(builder.as_data_source(split), ("a\u2028b", "c"), strict=True):
            assert {key: [v.decode() for v in values] for key, values in record["questions"].items()} == {
                "kind": [config], "question": [f"{stem}.{source}.gz {text}"], "answer": [f"{stem}.{target}.gz {text}"]}


def test_files_that_are_missing_are_downloaded(files, monkeypatch):
    asked = []

    def download(self, url):
        asked.append(url)
        return files / "elsewhere"

    monkeypatch.setattr("tensorflow_datasets.core.download.DownloadManager.download", download)
    (files / "val.cs.gz").rename(files / "elsewhere")
    datasets.prepare("multi30k/cs-en", str(files / "cache"), str(files))
    assert asked == [multi30k.SOURCE + "val.cs.gz"]


def test_files_of_unequal_length_are_an_error(files, monkeypatch):
    content = b"one line\n"
    (files / "val.de.gz").write_bytes(content)
    with pytest.raises(InputError, match="val.de.gz"):
        datasets.prepare("multi30k", str(files / "cache"), str(files))
    monkeypatch.setitem(multi30k.SHA256, "val.de.gz", hashlib.sha256(content).hexdigest())
    with pytest.raises(ValueError, match="longer"):
        datasets.prepare("multi30k", str(files / "cache"), str(files))


@pytest.mark.skipif(not (REAL / "mt-multi30k").is_dir(), reason="the real files are not here")
def test_real_files():
    files = raw.read("multi30k", "mt-multi30k", multi30k.SHA256, str(REAL), multi30k.SOURCE)
    lines = {"train": 29_000, "val": 1014, "test_2016_flickr": 1000, "test_2017_flickr": 1000, "test_2017_mscoco": 461}
    assert {file: len(content.splitlines()) for file, content in files.items()} == {
        file: lines[file.split(".")[0]] for file in files}
    assert len(files) == 18
