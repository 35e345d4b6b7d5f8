"""MNIST: pictures keep their pixels, order and class; the cut into train and validation is where it is said to be."""

import gzip
import hashlib
import pathlib

import numpy as np
import pytest

from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import mnist

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


def fake(monkeypatch, folder: pathlib.Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Other pictures, uint8 [n, 28, 28], and classes in the place of the real ones; test_moving_digits.py, too."""
    sums = {}
    for part, arrays in parts.items():
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            content = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes() + array.astype(np.uint8).tobytes()
            sums[f"{part}-{kind}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(mnist, "SHA256", sums)


def test_records(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    parts = {part: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n))
             for part, n in (("train", 7), ("t10k", 3))}
    fake(monkeypatch, tmp_path, parts)
    monkeypatch.setattr(mnist, "TRAIN", 5)
    builder = datasets.prepare("mnist", str(tmp_path / "cache"), str(tmp_path))
    read = {split: list(builder.as_data_source(split)) for split in builder.info.splits}
    assert {split: len(records) for split, records in read.items()} == {"train": 5, "validation": 2, "test": 3}
    pictures, classes = (np.concatenate([parts["train"][i], parts["t10k"][i]]) for i in range(2))
    for record, picture, digit in zip(sum((read[s] for s in ("train", "validation", "test")), []), pictures, classes,
                                      strict=True):
        np.testing.assert_array_equal(record["image"][..., 0], picture)
        assert record["questions"] == {"kind": [b"digit"], "question": [b"which digit is this?"],
                                       "answer": [str(digit).encode()]}


def test_files_are_fetched_where_the_folder_has_none(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, {part: (np.zeros((2, 28, 28), np.uint8), np.arange(2)) for part in ("train", "t10k")})
    asked = []
    parts = mnist.arrays("", download=lambda url: asked.append(url) or str(tmp_path / url.rpartition("/")[2]))
    assert parts["t10k"][1].tolist() == [0, 1]
    assert asked == [f"https://storage.googleapis.com/cvdf-datasets/mnist/{file}" for file in mnist.SHA256]


@pytest.mark.skipif(not (REAL / "img-mnist").is_dir(), reason="the real files are not here")
def test_real_files():
    parts = mnist.arrays(str(REAL))
    assert [part[0].shape for part in parts.values()] == [(60_000, 28, 28), (10_000, 28, 28)]
    assert parts["train"][1][:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(parts["t10k"][1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
