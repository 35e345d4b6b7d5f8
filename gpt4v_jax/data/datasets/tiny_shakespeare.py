"""tiny_shakespeare: 1,115,394 characters of Shakespeare in one file, as collected for char-rnn (Karpathy 2015).

`train` is the first 90 % of the characters and `validation` the rest, as in nanoGPT, each as one record, because the
reader cuts it into windows itself.
"""

import hashlib
import pathlib

import tensorflow_datasets as tfds
from etils import epath

from gpt4v_jax.config import InputError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FOLDERS = ("", "text-tinyshakespeare", "tiny_shakespeare")  # below the raw folder, where input.txt is looked for


def verified(path: pathlib.Path) -> str:
    """-> the text of the file, if it is the right one."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise InputError(f"{path} is not the tiny_shakespeare file: its sha256 is {found} ({len(content):,} bytes), "
                         f"wanted is {SHA256} (1,115,394 bytes). Fetch it again from {URL}")
    return content.decode()


def raw_text(raw_dir: str, download) -> str:
    """-> the whole text, from `raw_dir` if input.txt is there ("" means no such folder), else by `download(URL)`, which
    returns a path."""
    looked_in = [pathlib.Path(raw_dir) / folder for folder in FOLDERS] if raw_dir else []
    for folder in looked_in:
        if (folder / "input.txt").is_file():
            return verified(folder / "input.txt")
    try:
        path = download(URL)
    except Exception as error:  # TFDS and requests raise many kinds: no network, 404, a proxy's refusal
        where = ", ".join(str(folder) for folder in looked_in) or "no folder, since none was given"
        raise InputError(f"tiny_shakespeare: looked for input.txt in {where}; then the download of {URL} failed "
                         f"({type(error).__name__}). Put input.txt into a folder and set GPT4V_DATA_DIR or "
                         "--config.data.dir to it") from error
    return verified(pathlib.Path(path))


class TinyShakespeare(tfds.core.GeneratorBasedBuilder):
    """Two records, each a long text; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # else TFDS 4.9.10 asks importlib_resources, which it forgets to require

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Tiny Shakespeare: one text file, for language models of characters.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://github.com/karpathy/char-rnn",
        )

    def _split_generators(self, dl_manager):
        # The public `manual_dir` raises where there is no such folder; our own message is to name it.
        text = raw_text(str(dl_manager._manual_dir or ""), dl_manager.download)
        cut = int(0.9 * len(text))
        return {"train": self._generate_examples(text[:cut]), "validation": self._generate_examples(text[cut:])}

    def _generate_examples(self, text: str):
        yield 0, {"text": text}
