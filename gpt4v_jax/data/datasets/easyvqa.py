"""easyvqa: 5,000 pictures of one coloured shape, 64x64 pixels, with 48,248 questions and 13 answers (Zhou, easy-VQA).

From github.com/vzhou842/easy-VQA @ 3b553bb, MIT licence. `train` is the first 3,600 pictures of the original training
set, `validation` its last 400, `test` the original 1,000. A question's kind follows from its answer.

Its words alone give away much: TF-IDF and logistic regression, without the picture, are right in 67.0 % (README.md of
the folder vqa-easyvqa).
"""

import collections
import json

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = ("They are made from github.com/vzhou842/easy-VQA @ 3b553bb7ff42a868d5f4cbe8c88255d7333c3c31, easy_vqa/data: "
          "{train,test}/images/*.png, there single files, in one zip each, and {train,test}/questions.json")
SHA256 = {  # of the files in the zips, see raw.py
    "train.images.zip": "88d3e9bad3586c935a1f61989cd1033d674232841837093f34adc913929dbbcb",
    "train.questions.json": "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5",
    "test.images.zip": "a2dd49228f952114e647d6152af1901a62f8445395612be5893baa660b532f6d",
    "test.questions.json": "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7",
}
TRAIN = 3600  # of the 4,000 pictures; the others are `validation`
KINDS = {answer: kind for kind, answers in {
    "yes_no": "yes no",
    "shape": "circle rectangle triangle",
    "colour": "black blue brown gray green red teal yellow",
}.items() for answer in answers.split()}  # fmt: skip


def records(pictures: dict[str, bytes], questions: list[tuple[str, str, int]]) -> list[dict]:
    """-> the records of an original part, by picture id. pictures: {"0.png": its bytes}; questions: (question, answer,
    picture id)."""
    asked = collections.defaultdict(list)
    for question, answer, picture in questions:
        asked[picture].append({"kind": KINDS[answer], "question": question, "answer": answer})
    return [{"image": pictures[f"{i}.png"], "questions": asked[i]} for i in range(len(pictures))]


class EasyVQA(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures of a shape with questions; see the top of this file."""

    name = "easyvqa"  # else TFDS calls it easy_vqa
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="easy-VQA: pictures of one coloured shape, with questions of 13 answers.",
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://github.com/vzhou842/easy-VQA",
            disable_shuffling=True,  # by picture id, which is an order without meaning
        )

    def _split_generators(self, dl_manager):
        files = raw.read("easyvqa", "vqa-easyvqa", SHA256, raw.manual_dir(dl_manager), SOURCE)
        train, test = (records(files[f"{part}.images.zip"], json.loads(files[f"{part}.questions.json"]))
                       for part in ("train", "test"))
        return {"train": enumerate(train[:TRAIN]), "validation": enumerate(train[TRAIN:]), "test": enumerate(test)}

    def _generate_examples(self):
        """TFDS wants this method; the splits are made above."""
