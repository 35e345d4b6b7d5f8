"""Emoji: pictures keep their transparency and names; a question for each language; splits are those of the file."""

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import emoji, raw

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


def test_records(monkeypatch, tmp_path):
    captions = [{"en": "red apple", "zh": "红苹果", "de": "roter Apfel", "fr": "pomme rouge", "ja": "赤リンゴ"},
                {"en": "pear", "ja": "ナシ"}, {"en": "grapes"}, {"de": "Birne"}]
    splits = ["train", "val", "train", "test"]
    lines = [{"image": f"emoji_{i}.png", "captions": c, "split": s}
             for i, (c, s) in enumerate(zip(captions, splits, strict=True))]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with zipfile.ZipFile(tmp_path / "images72.zip", "w") as packed:
        for i in reversed(range(4)):
            file = io.BytesIO()
            Image.new("RGBA", (72, 72), (10, 20, 30, i)).save(file, "png")
            packed.writestr(f"emoji_{i}.png", file.getvalue())
    monkeypatch.setattr(emoji, "SHA256", {file: raw.digest(raw.unpacked(tmp_path / file)) for file in emoji.SHA256})
    builder = datasets.prepare("emoji", str(tmp_path / "cache"), str(tmp_path))
    names = {"en": "English", "zh": "Chinese", "de": "German", "fr": "French", "ja": "Japanese"}
    for split, wanted in (("train", [0, 2]), ("validation", [1]), ("test", [3])):
        for record, i in zip(builder.as_data_source(split), wanted, strict=True):
            assert record["image"].shape == (72, 72, 4) and np.unique(record["image"][..., 3]) == i
            asked = {key: [v.decode() for v in values] for key, values in record["questions"].items()}
            assert asked == {"kind": list(captions[i]), "answer": list(captions[i].values()),
                             "question": [f"describe the picture in {names[code]}." for code in captions[i]]}


def test_there_is_no_download_and_the_message_says_why(tmp_path):
    with pytest.raises(InputError, match="no download.*images72.zip, captions.jsonl.*noto-emoji"):
        datasets.prepare("emoji", str(tmp_path), str(tmp_path))


@pytest.mark.skipif(not (REAL / "cap-emoji").is_dir(), reason="the real files are not here")
def test_real_files(tmp_path):
    builder = datasets.prepare("emoji", str(tmp_path), str(REAL))
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        "train": 1306, "validation": 168, "test": 176}
    record = builder.as_data_source("validation")[0]
    assert record["questions"]["answer"][0] == b"hash sign" and record["image"].shape == (72, 72, 4)
