"""mnist: 70,000 handwritten digits of 28x28 grey pixels (LeCun, Cortes and Burges 1998), each with one question.

`train` is the first 55,000 of the original training set, `validation` its last 5,000, `test` the original 10,000.
Usually given as CC BY-SA 3.0. Verified are the unpacked IDX files, so that any copy of the originals will do.
"""

import numpy as np
import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw
from gpt4v_jax.data.datasets.scenes import png

# TFDS's own. Any copy of the four original files will do; ours were made from the 70,000 pictures of
# github.com/rasbt/mnist-pngs @ d26bd33bf1e454dd15bd4fe8b8ba64c76308f91c, and what they unpack to is the same.
SOURCE = "https://storage.googleapis.com/cvdf-datasets/mnist/"
SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TRAIN = 55_000  # of the 60,000; the others are `validation`
QUESTION = "which digit is this?"


def arrays(manual: str, name: str = "mnist", download=None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """-> "train" and "t10k": pictures uint8 [n, 28, 28], 0 is paper and 255 is ink; classes uint8 [n]. `name`: the data
    set that asks, for messages; `download(url)` -> the path of a file that is not in `manual`."""
    files = raw.read(name, "img-mnist", SHA256, manual, SOURCE, download)
    # IDX: a header of 16 bytes for pictures and of 8 for labels, then the values.
    return {part: (np.frombuffer(files[f"{part}-images-idx3-ubyte.gz"], np.uint8, offset=16).reshape(-1, 28, 28),
                   np.frombuffer(files[f"{part}-labels-idx1-ubyte.gz"], np.uint8, offset=8))
            for part in ("train", "t10k")}


class MNIST(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Handwritten digits with one question each; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="MNIST: 70,000 handwritten digits, with the question which digit it is.",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://github.com/rasbt/mnist-pngs",
            disable_shuffling=True,  # the original order
        )

    def _split_generators(self, dl_manager):
        parts = arrays(raw.manual_dir(dl_manager), download=dl_manager.download)
        pictures, classes = parts["train"]
        return {
            "train": self._generate_examples(pictures[:TRAIN], classes[:TRAIN]),
            "validation": self._generate_examples(pictures[TRAIN:], classes[TRAIN:]),
            "test": self._generate_examples(*parts["t10k"]),
        }

    def _generate_examples(self, pictures: np.ndarray, classes: np.ndarray):
        for i, (picture, digit) in enumerate(zip(pictures, classes, strict=True)):
            yield i, {
                "image": png(picture),
                "questions": [{"kind": "digit", "question": QUESTION, "answer": str(digit)}],
            }
