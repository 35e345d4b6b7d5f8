"""tiny_shakespeare: 1,115,394 characters of Shakespeare in one file, as collected for char-rnn (Karpathy 2015).

`train` is the first 90 % of the characters and `validation` the rest, as in nanoGPT, each as one record, because the
reader cuts it into windows itself.
"""

import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def raw_text(manual: str, download) -> str:
    """-> the whole text, from the folder `manual` if input.txt is there ("" means no such folder), else by
    `download(URL)`, which returns a path."""
    source = URL.removesuffix("input.txt")
    files = raw.read("tiny_shakespeare", "text-tinyshakespeare", {"input.txt": SHA256}, manual, source, download)
    return files["input.txt"].decode()


class TinyShakespeare(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two records, each a long text; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Tiny Shakespeare: one text file, for language models of characters.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://github.com/karpathy/char-rnn",
        )

    def _split_generators(self, dl_manager):
        text = raw_text(raw.manual_dir(dl_manager), dl_manager.download)
        cut = int(0.9 * len(text))
        return {"train": self._generate_examples(text[:cut]), "validation": self._generate_examples(text[cut:])}

    def _generate_examples(self, text: str):
        yield 0, {"text": text}
