"""multi30k: descriptions of 30,000 photographs in English, German, French and Czech, as pairs to translate (Elliott,
Frank, Sima'an and Specia 2016, W16-3210).

From github.com/multi30k/dataset @ a3d2e0d, task 1, raw text. That repository has no licence file; the WMT16 page of the
task is remembered to say CC BY-NC-SA 4.0, and the English side is that of Flickr30k: take it as non-commercial.

A config is a direction, such as "de-en". The splits are the original ones; `test` is test_2016_flickr. There is no
Czech in the test sets of 2017.
"""

import dataclasses
from typing import ClassVar

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = ("https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/"
          "data/task1/raw/")
FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr", "test_2017_flickr": "test_2017_flickr",
         "test_2017_mscoco": "test_2017_mscoco"}  # fmt: skip
SHA256 = {  # of the unpacked files
    "train.en.gz": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "train.de.gz": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.fr.gz": "5925a3c18f1587b6b54b87743106e6e8ab93618edb6f65d19eac0621f853a10d",
    "train.cs.gz": "2be68b38c8d586ff4f54eb13cc6e1baaaa053695b3f070d3038303a47f2268da",
    "val.en.gz": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "val.de.gz": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.fr.gz": "5304e444d842e962b2dda4d816b70b22a1765b15401642b7ca37a67477e708dc",
    "val.cs.gz": "d53827e469b0a1ca8d57e9e26b2b64c4bc4b33f5479c7b03ae87ae5c882c3e33",
    "test_2016_flickr.en.gz": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    "test_2016_flickr.de.gz": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "test_2016_flickr.fr.gz": "cb3160d69b002bb638e66cc7612fcd56cb0af82eadc9c142dedc438afb885ef6",
    "test_2016_flickr.cs.gz": "45adb85f688de8407fddcbe1b36dca15d12aab868149b337e2576f2d6d2ff8d8",
    "test_2017_flickr.en.gz": "ce1450ddc5ab0834502579d77a170849952e15a2938b34cc503bdc25ebb4fb98",
    "test_2017_flickr.de.gz": "c3078bc3b36808bf9d20eb2347ed6137016179ef59ec0d2b9b8ecc3fb2880081",
    "test_2017_flickr.fr.gz": "6f3764e31dac41e9455e612958bcfd4e877c5e15cd66df2c2b2be6d9bd83e5b6",
    "test_2017_mscoco.en.gz": "43051fdfa86fd5395182e718a94ca67b1b227b9f7c79596ff0f6b813216981d2",
    "test_2017_mscoco.de.gz": "58277df3c75f92f7145a11b910b553d1cf82c439249d4dc237c899609eafac22",
    "test_2017_mscoco.fr.gz": "39cde3f43f32b0a6bf29ce4917a46329ff32e53070c2fac87506695a740ae0a0",
}


@dataclasses.dataclass
class Direction(tfds.core.BuilderConfig):
    """The languages of the question and of the answer: "de", "en", "fr" or "cs"."""

    source: str = "de"
    target: str = "en"


class Multi30k(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Sentences with their translation; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        Direction(name=f"{source}-{target}", description=f"from {source} to {target}", source=source, target=target)
        for other in ("de", "fr", "cs") for source, target in ((other, "en"), ("en", other))
    ]  # fmt: skip

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Multi30k, task 1: sentences with their translation.",
            features=tfds.features.FeaturesDict({
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://github.com/multi30k/dataset",
            disable_shuffling=True,  # the original order: the same line is the same photograph in every config
        )

    def _split_generators(self, dl_manager):
        ends = [self.builder_config.source, self.builder_config.target]
        wanted = {file: sha for file, sha in SHA256.items() if file.split(".")[1] in ends}
        files = raw.read("multi30k", "mt-multi30k", wanted, raw.manual_dir(dl_manager), SOURCE, dl_manager.download)
        pairs = {split: [f"{stem}.{end}.gz" for end in ends] for split, stem in FILES.items()}
        return {split: self._generate_examples(*(files[file] for file in pair))
                for split, pair in pairs.items() if set(pair) <= set(files)}

    def _generate_examples(self, source: bytes, target: bytes):
        # As bytes: splitlines of text also cuts at characters that only look like the end of a line.
        lines = [[line.decode() for line in content.splitlines()] for content in (source, target)]
        for i, (question, answer) in enumerate(zip(*lines, strict=True)):
            question = {"kind": self.builder_config.name, "question": question.strip(), "answer": answer.strip()}
            yield i, {"questions": [question]}
