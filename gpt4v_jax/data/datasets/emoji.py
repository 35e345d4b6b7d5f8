"""emoji: 1,650 emoji of 72x72 RGBA pixels with their names in English, Chinese, German, French and Japanese.

Pictures of github.com/googlefonts/noto-emoji @ b3e3051, png/72 (Apache-2.0; flags are public domain), names of
github.com/unicode-org/cldr-json @ b08a82b (Unicode License v3). The splits are ours, in captions.jsonl: by md5 of the
emoji, without variants of skin tone, which would be the same picture in several splits.
"""

import json

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = ("They are our selection from github.com/googlefonts/noto-emoji @ b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8, "
          "png/72, and github.com/unicode-org/cldr-json @ b08a82b582f1120d630d623f9e5073316741574d, "
          "cldr-annotations-full and -derived-full, which have them in another form")
SHA256 = {  # of the files in the zip, see raw.py
    "images72.zip": "b52ea4e5c117e676f7f823af7b5efd28d7f3ecf802cdef8aa001a05240e347b5",
    "captions.jsonl": "252a3cc4379e6fd792712f5bd62f03a90eb0d8dc07e69c347bc6e1becc1ceaf3",
}
LANGUAGES = {"en": "English", "zh": "Chinese", "de": "German", "fr": "French", "ja": "Japanese"}
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # and what captions.jsonl calls them


class Emoji(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Emoji with their names in five languages; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Emoji of Noto with their names of the Unicode CLDR in five languages.",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(72, 72, 4), encoding_format="png"),
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://github.com/googlefonts/noto-emoji",
            disable_shuffling=True,  # the order of captions.jsonl
        )

    def _split_generators(self, dl_manager):
        files = raw.read("emoji", "cap-emoji", SHA256, raw.manual_dir(dl_manager), SOURCE)
        lines = [json.loads(line) for line in files["captions.jsonl"].splitlines()]
        return {split: self._generate_examples([line for line in lines if line["split"] == name], files["images72.zip"])
                for split, name in SPLITS.items()}

    def _generate_examples(self, lines: list[dict], pictures: dict[str, bytes]):
        for i, line in enumerate(lines):
            questions = [{"kind": code, "question": f"describe the picture in {LANGUAGES[code]}.", "answer": caption}
                         for code, caption in line["captions"].items()]
            yield i, {"image": pictures[line["image"]], "questions": questions}
