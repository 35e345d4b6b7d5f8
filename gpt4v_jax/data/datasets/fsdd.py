"""fsdd: 3,000 recordings of spoken digits, and strings of digits made from them (Free Spoken Digit Dataset, Jackson et
al., zenodo 10.5281/zenodo.1342401). 8 kHz, one channel, 16 bits.

From github.com/Jakobovski/free-spoken-digit-dataset @ 26eb9aa, CC BY-SA 4.0: six speakers, ten digits, 50 recordings of
each. A config is a speaker who is held out, for with the official split, by recordings, all speakers are known:

    train        recordings 5-49 of the other five speakers (2,250), and 2,000 strings made from them
    validation   recordings 0-4 of these five (250)
    test         all recordings of the speaker held out (500)
    strings      200 strings made from all recordings of the speaker held out

A string is 3 to 7 recordings of one speaker, each drawn anew, with a silence of 0.05 to 0.3 s between them. A single
digit is the original WAV file, a string is a FLAC file. Records are mixed, so that the first ones are of all digits.
"""

import io
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from gpt4v_jax.data.datasets import raw

SOURCE = ("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip"
          "#")  # a zip, see raw.py
SHA256 = "1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959"  # of the files in recordings/, see raw.py
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # samples a second
VALIDATION = 5  # the first recordings of each digit of the speakers who are not held out
STRINGS = {"train": 2000, "strings": 200}
SEED = 0
QUESTION = "what is said?"


def recordings(manual: str, download=None) -> dict[tuple[str, int, int], bytes]:
    """-> {(speaker, digit, recording): its WAV file}. `download(url)` -> the path of the repository's archive."""
    files = raw.read("fsdd", "aud-fsdd", {"recordings": SHA256}, manual, SOURCE, download)["recordings"]
    found = {}
    for name in sorted(files):
        digit, speaker, number = name.removesuffix(".wav").split("_")
        found[speaker, int(digit), int(number)] = files[name]
    return found


def record(kind: str, audio: bytes, digits: list[int]) -> dict:
    question = {"kind": kind, "question": QUESTION, "answer": " ".join(WORDS[d] for d in digits)}
    return {"audio": np.frombuffer(audio, np.uint8), "questions": [question]}


def string(files: dict[tuple[str, int, int], bytes], rng: np.random.Generator) -> dict:
    """-> a record: 3 to 7 of the recordings of one speaker, one after the other."""
    soundfile = raw.extra("fsdd", "soundfile")

    keys = sorted(files)
    speaker = rng.choice(sorted({key[0] for key in keys}))
    keys = [key for key in keys if key[0] == speaker]
    chosen = [keys[i] for i in rng.integers(len(keys), size=rng.integers(3, 8))]
    samples = []
    for key in chosen:
        silence = int(rng.uniform(0.05, 0.3) * RATE) if samples else 0
        samples += [np.zeros(silence, np.int16), soundfile.read(io.BytesIO(files[key]), dtype="int16")[0]]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(samples), RATE, format="FLAC", subtype="PCM_16")
    return record("string", file.getvalue(), [digit for _, digit, _ in chosen])


def records(files: dict[tuple[str, int, int], bytes], held_out: str, split: str) -> Iterator[dict]:
    """-> the records of a split, in order."""
    if split in ("test", "strings"):
        files = {key: file for key, file in files.items() if key[0] == held_out}
    else:
        files = {key: file for key, file in files.items()
                 if key[0] != held_out and (key[2] < VALIDATION) == (split == "validation")}
    rng = np.random.default_rng([SEED, SPEAKERS.index(held_out), len(split)])
    singles = [] if split == "strings" else sorted(files)
    number = len(singles) + STRINGS.get(split, 0)
    for i in rng.permutation(number):
        if i < len(singles):
            yield record("digit", files[singles[i]], [singles[i][1]])
        else:
            yield string(files, rng)


class FSDD(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Spoken digits and strings of them; see the top of this file."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=speaker, description=f"{speaker} is held out") for speaker in SPEAKERS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Spoken digits and strings of them, with one speaker held out.",
            features=tfds.features.FeaturesDict({
                "audio": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),  # a file: WAV or FLAC
                "questions": tfds.features.Sequence({"kind": text(), "question": text(), "answer": text()}),
            }),
            homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
            disable_shuffling=True,  # they are mixed by `records`
        )

    def _split_generators(self, dl_manager):
        files = recordings(raw.manual_dir(dl_manager), dl_manager.download)
        return {split: enumerate(records(files, self.builder_config.name, split))
                for split in ("train", "validation", "test", "strings")}

    def _generate_examples(self):
        """TFDS wants this method; the splits are made above."""
