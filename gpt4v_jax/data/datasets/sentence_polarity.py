"""sentence_polarity: 5,331 positive and 5,331 negative sentences of film reviews (Pang and Lee 2005, P05-1015).

From github.com/nltk/nltk_data @ 5db857e, CC BY 4.0. Lower-case, with blanks around punctuation. The splits are ours,
for there are none: sorted by md5 the first tenth is `test`, the next `validation`.
"""

import hashlib

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = "https://raw.githubusercontent.com/nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28/packages/corpora/"
SHA256 = {  # of the files in the zip, see raw.py
    "sentence_polarity.zip": "a068623fc136cc4210bf1b8f8002cc3aa4aa9cd8d415703adb4db92d4c38d4b8",
}
FILES = {"negative": "rt-polarity.neg", "positive": "rt-polarity.pos"}


class SentencePolarity(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Sentences, and whether they praise; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Sentences of film reviews, negative or positive.",
            features=tfds.features.FeaturesDict({
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://www.cs.cornell.edu/people/pabo/movie-review-data/",
            disable_shuffling=True,  # the order of the checksums, in which the labels are mixed
        )

    def _split_generators(self, dl_manager):
        files = raw.read("sentence_polarity", "cls-sentence-polarity", SHA256, raw.manual_dir(dl_manager), SOURCE,
                         dl_manager.download)  # fmt: skip
        (packed,) = files.values()
        found = [(line.strip(), label) for label, file in FILES.items() for line in packed[file].splitlines()]
        found.sort(key=lambda pair: (hashlib.md5(pair[0]).digest(), pair))
        tenth = len(found) // 10
        return {"train": self._generate_examples(found[2 * tenth :]), "test": self._generate_examples(found[:tenth]),
                "validation": self._generate_examples(found[tenth : 2 * tenth])}  # fmt: skip

    def _generate_examples(self, sentences: list[tuple[bytes, str]]):
        for i, (sentence, label) in enumerate(sentences):
            yield i, {"questions": [{"kind": "polarity", "question": sentence.decode(), "answer": label}]}
