"""poetry: classical Chinese poems as text, for models of characters.

    tang    8,007 + 1,001 poems of the Tang, in traditional characters
    songci  3,000 + 1,000 ci of the Song, in simplified characters

From github.com/chinese-poetry/chinese-poetry @ 99ebbef, MIT licence, poems are public domain; the splits are ours, by
whole source files. A split is one record of text, because the reader cuts it into windows itself: each poem's
paragraphs joined by newlines, poems by a blank line, without titles and authors. The sizes that are given for these
files (tang 510,128 + 84,316 characters, songci 213,870 + 79,794) are those of the paragraphs alone; with the newlines
the texts have 558,609 + 91,940 and 238,739 + 88,317.
"""

import json
from typing import ClassVar

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = ("They are made from github.com/chinese-poetry/chinese-poetry @ 99ebbef7e1345c0985c44b9fd96a3f9e776f117b: "
          "poet.tang.{0..7000}.json are tang.train, poet.tang.8000.json is tang.valid, ci.song.{0..2000}.json are "
          "songci.train, ci.song.3000.json is songci.valid; there they are JSON lists with more fields, here a poem "
          "{title, author, paragraphs} is a line")
SHA256 = {
    "tang.train.jsonl": "efed82ee8c32d28a83855ca287e29141ef9a80894575fe7aaf4e0c3e7651c0a0",
    "tang.valid.jsonl": "4e611b50c12c24fb9e7944570936d8c6a5a0ab7d9f13f8d14295f951b00390df",
    "songci.train.jsonl": "760ea240df9f6253d0a73016dc47ae00797373811550ced2d9b1a45bb127d502",
    "songci.valid.jsonl": "ea3a0abef328b72cf5dea7f392b5f77843c0fb7154ae71a1211e1de0824ae9a6",
}


def text_of(lines: bytes) -> str:
    """-> the poems of a file of JSON lines as one text."""
    poems = [json.loads(line) for line in lines.splitlines()]
    return "\n\n".join("\n".join(poem["paragraphs"]) for poem in poems)


class Poetry(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two records, each a long text; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="tang", description="poems of the Tang, traditional characters"),
        tfds.core.BuilderConfig(name="songci", description="ci of the Song, simplified characters"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Classical Chinese poems as text, for language models of characters.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://github.com/chinese-poetry/chinese-poetry",
        )

    def _split_generators(self, dl_manager):
        train, valid = wanted = [f"{self.builder_config.name}.{part}.jsonl" for part in ("train", "valid")]
        files = raw.read("poetry", "text-chinese-poetry", {file: SHA256[file] for file in wanted},
                         raw.manual_dir(dl_manager), SOURCE)
        return {"train": self._generate_examples(files[train]), "validation": self._generate_examples(files[valid])}

    def _generate_examples(self, lines: bytes):
        yield 0, {"text": text_of(lines)}
