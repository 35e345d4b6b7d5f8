"""Poetry: poems are joined as it is said, without titles; and the characters are those that were counted."""

import hashlib
import json
import pathlib

import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import poetry

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize("config", ["tang", "songci"])
def test_records(config, monkeypatch, tmp_path):
    for file in poetry.SHA256:
        poems = [{"title": None, "author": "a", "paragraphs": [f"{file}。", "二\u2028，三。"]},
                 {"title": "題", "author": "b", "paragraphs": ["四。"]}]
        content = "".join(json.dumps(poem, ensure_ascii=False) + "\n" for poem in poems).encode()
        (tmp_path / file).write_bytes(content)
        monkeypatch.setitem(poetry.SHA256, file, hashlib.sha256(content).hexdigest())
    name = "poetry" if config == "tang" else "poetry/songci"
    builder = datasets.prepare(name, str(tmp_path / "cache"), str(tmp_path))
    for split, part in (("train", "train"), ("validation", "valid")):
        (record,) = builder.as_data_source(split)
        assert record["text"].decode() == f"{config}.{part}.jsonl。\n二\u2028，三。\n\n四。"


def test_there_is_no_download_and_the_message_says_why(tmp_path):
    with pytest.raises(InputError, match="no download. Put songci.train.jsonl, songci.valid.jsonl into.*JSON lists"):
        datasets.prepare("poetry/songci", str(tmp_path), str(tmp_path))


@pytest.mark.skipif(not (REAL / "text-chinese-poetry").is_dir(), reason="the real files are not here")
def test_real_files(tmp_path):
    counted = {"tang": (510_128, 84_316), "songci": (213_870, 79_794)}  # without newlines: the paragraphs alone
    lengths = {"tang": (558_609, 91_940), "songci": (238_739, 88_317)}
    for config in counted:
        builder = datasets.prepare(f"poetry/{config}", str(tmp_path), str(REAL))
        texts = [builder.as_data_source(split)[0]["text"].decode() for split in ("train", "validation")]
        assert tuple(map(len, texts)) == lengths[config]
        assert tuple(len(text.replace("\n", "")) for text in texts) == counted[config]
