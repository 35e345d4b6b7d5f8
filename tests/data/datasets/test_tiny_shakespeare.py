"""The raw file is found, verified and cut in two; where it is missing, the message says what to do."""

import hashlib
import pathlib

import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import tiny_shakespeare

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"
TEXT = "To be, or not to be: thät is the question.\n" * 10


@pytest.fixture
def short_text(monkeypatch):
    """Another, short text in the place of the real one."""
    monkeypatch.setattr(tiny_shakespeare, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())


@pytest.fixture
def no_network(monkeypatch):
    def download(self, url):
        raise ConnectionError(f"no route to {url}")

    monkeypatch.setattr("tensorflow_datasets.core.download.DownloadManager.download", download)


@pytest.mark.parametrize("folder", ["", "text-tinyshakespeare", "tiny_shakespeare"])
def test_file_is_found_and_cut_by_characters(folder, short_text, no_network, tmp_path):
    raw = tmp_path / "raw" / folder
    raw.mkdir(parents=True)
    (raw / "input.txt").write_text(TEXT, encoding="utf-8")
    builder = datasets.prepare("tiny_shakespeare", str(tmp_path / "cache"), str(tmp_path / "raw"))
    (train,), (validation,) = (builder.as_data_source(split) for split in ("train", "validation"))
    assert train["text"].decode() == TEXT[:387]  # 0.9 x 430 characters; in bytes it would be 396
    assert validation["text"].decode() == TEXT[387:]


def test_download_is_used_and_verified(short_text, tmp_path):
    (tmp_path / "fetched").write_text(TEXT, encoding="utf-8")
    asked = []
    assert tiny_shakespeare.raw_text("", lambda url: asked.append(url) or tmp_path / "fetched") == TEXT
    assert asked == [tiny_shakespeare.URL]
    (tmp_path / "fetched").write_text("<html>Not found</html>", encoding="utf-8")
    with pytest.raises(InputError, match="sha256"):
        tiny_shakespeare.raw_text("", lambda url: tmp_path / "fetched")


def test_wrong_file_is_refused(tmp_path, no_network):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(InputError, match="sha256") as error:
        datasets.prepare("tiny_shakespeare", str(tmp_path / "cache"), str(tmp_path))
    assert str(tmp_path / "input.txt") in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


@pytest.mark.parametrize("exists", [True, False])
def test_missing_file_names_the_folders_and_the_remedy(exists, tmp_path, no_network):
    raw = tmp_path / "raw"
    if exists:
        raw.mkdir()
    with pytest.raises(InputError) as error:
        datasets.prepare("tiny_shakespeare", str(tmp_path / "cache"), str(raw))
    message = str(error.value)
    looked_in = raw, raw / "text-tinyshakespeare", raw / "tiny_shakespeare"
    assert ", ".join(map(str, looked_in)) in message
    assert "GPT4V_DATA_DIR" in message and "--config.data.dir" in message and tiny_shakespeare.URL in message


@pytest.mark.skipif(not (REAL / "text-tinyshakespeare").is_dir(), reason="the real file is not here")
def test_real_file(tmp_path, no_network):
    assert tiny_shakespeare.SHA256 in (REAL / "text-tinyshakespeare" / "SHA256SUMS").read_text()
    builder = datasets.prepare("tiny_shakespeare", str(tmp_path), str(REAL))
    lengths = {split: len(builder.as_data_source(split)[0]["text"]) for split in builder.info.splits}
    assert lengths == {"train": 1_003_854, "validation": 111_540}
