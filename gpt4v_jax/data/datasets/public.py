"""Data sets of TFDS's public catalogue, "tfds:NAME[/CONFIG][:VERSION]": found or downloaded, and their records in our
form. Which features are understood stands in docs/data.md."""

import collections
import contextlib
import io
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder, registered

from gpt4v_jax.config import InputError, nearest
from gpt4v_jax.data.datasets import DATASETS, quiet
from gpt4v_jax.data.transforms import BadMedium

PREFIX = "tfds:"
NAME = re.compile(r"(\w+)(/[\w.+-]+)?(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?")
RATE = 16000  # samples a second, where a sound's feature does not say
UNDERSTOOD = (
    "a Translation of two languages; image with label, with captions, caption or text, or with question and answer "
    "(one or many); audio or speech with text or label; text, alone or with label"
)


def opened(name: str, cache: str):
    """-> the tfds builder of "tfds:NAME", prepared or not. What is prepared below `cache` is taken as it is, and needs
    neither the catalogue's code nor its libraries. Raises InputError."""
    short = name.removeprefix(PREFIX)
    match = NAME.fullmatch(short)
    if not match:
        raise InputError(f"data.name={name!r} must be tfds:NAME, tfds:NAME/CONFIG, each with :VERSION or not")
    # One of ours may have the same name, and be another data set.
    place = str(Path(cache) / "tfds") if match[1] in DATASETS else cache
    with explained(name), quiet():
        try:
            builder = read_only_builder.builder_from_files(short, data_dir=place)
        except registered.DatasetNotFoundError:
            builder = _from_catalogue(name, short, place)
        if builder.is_prepared() and not _readable(builder):
            raise InputError(
                f"{name}: {builder.data_dir} is in the form {builder.info.file_format.value}, which needs TensorFlow. "
                "Set data.cache to another folder, and it is prepared anew; or pip install tensorflow, and write it "
                "with file_format='array_record'"
            )
    return builder


def _from_catalogue(name: str, short: str, place: str):
    try:
        return tfds.builder(short, data_dir=place, file_format="array_record")
    except registered.DatasetNotFoundError as error:
        plain = re.split("[/:]", short)[0]
        near = nearest(plain, tfds.list_builders(with_community_datasets=False))  # the others need a network
        raise InputError(f"data.name={name!r}: TFDS has no {plain!r}{near}, and none is prepared below {place}. Many "
                         "of its data sets are there only with TensorFlow: pip install tensorflow") from error


def _readable(builder) -> bool:
    return bool(builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access())


@contextlib.contextmanager
def explained(name: str):
    """What TFDS and its libraries raise in the block is an InputError of one line; FileExistsError stays itself."""
    try:
        yield
    except (InputError, FileExistsError):
        raise
    except ImportError as error:
        missing = error.name or str(error).strip()
        raise InputError(f"{name} needs the package {missing}: pip install {missing}; or prepare it where that is, "
                         "with file_format='array_record', and copy it into data.cache") from error
    except Exception as error:  # many kinds: no network, 404, no such config or version, manual files that are missing
        said = " ".join(str(error).split())
        raise InputError(f"{name}: {type(error).__name__}: {said[:600]}") from error


def adapted(records, features) -> "Adapted":
    """The records of a split, pictures as their files' bytes, with the fields that sources.py reads: `text`; or
    `image` or `audio`, `captions`, `questions` [{kind, question, answer}]. Raises InputError for features that fit no
    form; a record raises BadMedium where it has no label or no answer."""
    fields = dict(features.items())
    make = _translation({"": features, **fields}) or _of_media(fields) or _of_text(fields)
    if make is None:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in fields.items())
        raise InputError(f"no known form of record: the features are {found}; what is understood: {UNDERSTOOD}")
    return Adapted(records, make)


class Adapted:
    """A sequence, each element of which is made when it is asked for."""

    def __init__(self, records, make):
        self._records, self._make = records, make

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):  # by which a for loop ends; what is read from raises something else
            raise IndexError(i)
        return self._make(self._records[i])


# Each of the following looks at {name: feature} -> a function from a record to ours, or None where they do not fit.


def _translation(features):
    """The language that is first by the alphabet is asked in: TFDS keeps no other order. "": the record itself."""
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Translation) and len(feature.keys()) == 2:
            one, other = sorted(feature.keys())

            def make(record, name=name, one=one, other=other):
                pair = record[name] if name else record
                return {"questions": [_question("translation", _text(pair[one]), _text(pair[other]))]}

            return make
    return None


def _of_media(features):
    image = isinstance(features.get("image"), tfds.features.Image) and features["image"].np_dtype != np.float32
    sound = next((name for name in ("speech", "audio") if _is_sound(features.get(name))), None)
    if not image and not sound:
        return None
    asked = _asked(features) or _label(features, "what is shown?" if image else "what is heard?")
    captions = None
    for name in ("captions", "caption", "text"):
        captions = captions or _texts(features, name, "text")
    if sound and not image and captions:
        said, captions = captions, None

        def asked(record):
            return [_question("speech", "what is said?", text) for text in said(record)]

    if not asked and not captions:
        return None
    rate = getattr(features[sound], "sample_rate", None) or RATE if sound else 0

    def make(record):
        out = {"questions": asked(record) if asked else []}
        if captions:
            out["captions"] = captions(record)
        if image:
            out["image"] = record["image"]
        if sound:
            out["audio"] = wav(record[sound], rate)
        return out

    return make


def _of_text(features):
    texts = _texts(features, "text", "text") if _is_text(features.get("text")) else None
    if not texts:
        return None
    if not isinstance(features.get("label"), tfds.features.ClassLabel):
        return lambda record: {"text": texts(record)[0]}
    return lambda record: {"questions": _label(features, texts(record)[0])(record)}


def _asked(features):
    """question + answer; question + answers, of which the most frequent is taken; questions + answers; questions of
    {question, answer}."""
    for questions, answers in (
        (_texts(features, "question"), _texts(features, "answer", "text") or _texts(features, "answers", "text")),
        (_texts(features, "questions"), _texts(features, "answers")),
        (_texts(features, "questions", "question"), _texts(features, "questions", "answer")),
    ):
        if questions and answers:

            def asked(record, questions=questions, answers=answers):
                asks, says = questions(record), answers(record)
                if len(asks) == 1 and says:
                    says = [collections.Counter(says).most_common(1)[0][0]]
                if len(asks) != len(says):
                    raise BadMedium(f"{len(asks)} questions and {len(says)} answers")
                return [_question("answer", *pair) for pair in zip(asks, says, strict=True)]

            return asked
    return None


def _label(features, question: str):
    label = features.get("label")
    if not isinstance(label, tfds.features.ClassLabel):
        return None

    def asked(record):
        if not 0 <= record["label"] < label.num_classes:  # -1 is TFDS's for those that nobody has labelled
            raise BadMedium(f"label {record['label']} is none of {label.num_classes} classes")
        return [_question("label", question, label.int2str(int(record["label"])))]

    return asked


def _question(kind: str, question: str, answer: str) -> dict:
    if not answer.strip():
        raise BadMedium(f"the answer to {question[:60]!r} is empty")
    return {"kind": kind, "question": question, "answer": answer}


def _texts(features, name: str, key: str = ""):
    """-> record -> texts [str] of a field: a text, a sequence of texts, or of dicts with a text under `key`."""
    feature = features.get(name)
    if _is_text(feature):
        return lambda record: [_text(record[name])]
    if not isinstance(feature, tfds.features.Sequence):
        return None
    if _is_text(feature.feature):
        return lambda record: [_text(value) for value in record[name]]
    if isinstance(feature.feature, tfds.features.FeaturesDict) and _is_text(dict(feature.feature.items()).get(key)):

        def texts(record):  # tfds gives a dict of lists or a list of dicts, by how it was read
            values = record[name]
            return [_text(v) for v in (values[key] if isinstance(values, dict) else [one[key] for one in values])]

        return texts
    return None


def _is_text(feature) -> bool:
    strings = (np.object_, np.str_)
    return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype in strings


def _is_sound(feature) -> bool:
    """Samples [n] or [n, channels]."""
    return (isinstance(feature, tfds.features.Tensor) and len(feature.shape) in (1, 2) and feature.shape[0] is None
            and feature.np_dtype in (np.int16, np.int32, np.int64, np.float32, np.float64))


def _text(value) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise BadMedium(f"a text that is not UTF-8: byte {value[error.start]:#04x}") from error


def wav(samples, rate: int) -> bytes:
    """samples [n] or [n, channels]: floats from -1 to 1, or integers of 16 bits (int32: of 32) -> a WAV file.

    Raises BadMedium for larger integers, InputError without the package soundfile."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise InputError("sound needs the package soundfile: pip install 'gpt4v_jax[media]'") from error
    samples = np.asarray(samples)
    subtype = "PCM_16"
    if samples.dtype.kind == "f":
        samples, subtype = samples.astype(np.float32), "FLOAT"
    elif samples.dtype == np.int32:
        subtype = "PCM_32"
    elif samples.size and not -(2**15) <= samples.min() <= samples.max() < 2**15:
        raise BadMedium(f"samples from {samples.min()} to {samples.max()} are more than 16 bits")
    else:
        samples = samples.astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()
