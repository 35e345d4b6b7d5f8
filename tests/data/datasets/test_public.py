import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets, sources
from gpt4v_jax.data.datasets import public
from gpt4v_jax.data.transforms import BadMedium

F = tfds.features
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def png():
    """PICTURE as a file: TFDS encodes arrays with TensorFlow alone."""
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    file.seek(0)
    return file


class TinyPublicLabels(tfds.core.GeneratorBasedBuilder):
    """A data set as the catalogue has them; TFDS knows it by its class name."""

    VERSION = tfds.core.Version("2.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "put classes.json there"

    def _info(self):
        label = F.ClassLabel(names=["cat", "dog"])
        return self.dataset_info_from_configs(features=F.FeaturesDict({"image": F.Image(), "label": label}))

    def _split_generators(self, dl_manager):
        labels = json.loads((dl_manager.manual_dir / "classes.json").read_text())
        return {"train": ((i, {"image": png(), "label": label}) for i, label in enumerate(labels))}

    def _generate_examples(self):
        """TFDS wants this method."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*args):
        raise AssertionError("a test asks the network")

    monkeypatch.setattr("socket.socket.connect", connect)


@pytest.fixture
def manual(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/classes.json").write_text("[1, 0, 1, -1]")
    return str(tmp_path / "raw")


def round_trip(tmp_path, features, *records):
    """-> the records as they come back from disk, adapted."""
    features = F.FeaturesDict(features) if isinstance(features, dict) else features

    class TinyPublicAny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": enumerate(records)}

        def _generate_examples(self):
            """TFDS wants this method."""

    builder = TinyPublicAny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    builder = datasets.prepare("tfds:tiny_public_any", str(tmp_path))
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    found = datasets.adapted(builder.as_data_source("train", decoders=decoders), builder.info.features)
    assert len(found) == len(records)
    return found


def asked(record):
    return [(q["kind"], q["question"], q["answer"]) for q in record["questions"]]


def test_a_run_reads_it_by_its_name(tmp_path, manual):
    """Also where it has no validation split."""
    data = config.Data(name="tfds:tiny_public_labels", cache=str(tmp_path / "cache"), dir=manual)
    assert sources.splits(data) == ["train"]
    records = list(sources.usable(sources.open_split(data, "train"), data))
    assert sorted(a for record in records for _, _, a in sources.asked(record)) == ["cat", "dog", "dog"]
    assert all(modality == "image" for record in records for modality, _ in sources.media_of(record))
    with pytest.raises(InputError, match="split 'validation' of tfds:tiny_public_labels is none of: train"):
        sources.open_split(data, "validation")


def test_prepared_here_and_found_again(tmp_path, manual, capsys, monkeypatch):
    cache = str(tmp_path / "cache")
    builder = datasets.prepare("tfds:tiny_public_labels", cache, manual)
    assert "tfds:tiny_public_labels: building into" in capsys.readouterr().out
    assert builder.info.file_format.value == "array_record" and builder.info.splits["train"].num_examples == 4
    monkeypatch.setattr(tfds, "builder", None)  # what is prepared needs no code
    for name in ("tfds:tiny_public_labels", "tfds:tiny_public_labels:2.0.0"):
        again = datasets.prepare(name, cache)
        assert again.data_dir == builder.data_dir and not capsys.readouterr().out
    records = again.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    found, bad = [], []
    for i in range(4):
        try:
            record = datasets.adapted(records, again.info.features)[i]
        except BadMedium as error:
            bad.append(str(error))
            continue
        found += asked(record)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(record["image"]))), PICTURE)
    assert sorted(found) == [("label", "what is shown?", "cat")] + 2 * [("label", "what is shown?", "dog")]
    assert bad == ["label -1 is none of 2 classes"]


def test_a_public_set_with_the_name_of_one_of_ours_lies_apart(tmp_path):
    assert public.opened("tfds:mnist", str(tmp_path)).data_dir == str(tmp_path / "tfds/mnist/3.0.1")
    assert public.opened("tfds:cifar10", str(tmp_path)).data_dir.startswith(str(tmp_path / "cifar10"))


@pytest.mark.parametrize("name, words", [
    ("tfds:mnisst", ["'mnisst'", "did you mean 'mnist'", "pip install tensorflow"]),
    ("tfds:", ["tfds:NAME"]), ("tfds:mnist/../x", ["tfds:NAME"]), ("tfds:huggingface:mnist", ["tfds:NAME"]),
    ("tfds:mnist:9.9.9", ["tfds:mnist:9.9.9", "3.0.1"]),
    ("tfds:ted_hrlr_translate/pt_to_xx", ["tfds:ted_hrlr_translate/pt_to_xx", "pt_to_xx not found"]),
])  # fmt: skip
def test_names_that_are_none(name, words, tmp_path):
    with pytest.raises(InputError) as error:
        datasets.prepare(name, str(tmp_path))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_the_download_raises_is_said_in_a_line(tmp_path, capsys):
    with pytest.raises(InputError, match="tfds:tiny_public_labels: .*put classes.json there") as error:
        datasets.prepare("tfds:tiny_public_labels", str(tmp_path / "cache"), str(tmp_path / "none"))
    assert "\n" not in str(error.value) and "failed" in capsys.readouterr().out


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def builder(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(InputError, match="tfds:speech_commands needs the package tensorflow: pip install tensorflow"):
        datasets.prepare("tfds:speech_commands", str(tmp_path))


def test_tfrecord_is_refused(tmp_path, manual):
    builder = datasets.prepare("tfds:tiny_public_labels", str(tmp_path / "cache"), manual)
    info = epath.Path(builder.data_dir) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match="tfrecord.*TensorFlow.*data.cache"):
        datasets.prepare("tfds:tiny_public_labels", str(tmp_path / "cache"), manual)


@pytest.mark.parametrize("feature, value", [
    ({"captions": F.Sequence({"id": np.int64, "text": F.Text()})},
     {"captions": [{"id": 1, "text": "one"}, {"id": 2, "text": "tw\u00f6"}]}),
    ({"captions": F.Sequence(F.Text())}, {"captions": ["one", "tw\u00f6"]}),
])  # fmt: skip
def test_captions(feature, value, tmp_path):
    (record,) = round_trip(tmp_path, feature | {"image": F.Image()}, value | {"image": png()})
    assert record["captions"] == ["one", "tw\u00f6"] and record["questions"] == [] and "text" not in record
    assert record["image"][:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["caption", "text"])
def test_a_caption_beside_a_label(name, tmp_path):
    features = {"image": F.Image(), name: F.Text(), "label": F.ClassLabel(names=["cat", "dog"])}
    (record,) = round_trip(tmp_path, features, {"image": png(), name: "a pet", "label": 1})
    assert record["captions"] == ["a pet"] and asked(record) == [("label", "what is shown?", "dog")]


@pytest.mark.parametrize("features, values, wanted", [
    ({"question": F.Text(), "answer": F.Text()}, {"question": "a?", "answer": "b"}, [("a?", "b")]),
    ({"question": F.Text(), "answers": F.Sequence(F.Text())}, {"question": "a?", "answers": ["x", "b", "b"]},
     [("a?", "b")]),
    ({"questions": F.Sequence(F.Text()), "answers": F.Sequence(F.Text())},
     {"questions": ["a?", "c?"], "answers": ["b", "d"]}, [("a?", "b"), ("c?", "d")]),
    ({"questions": F.Sequence({"question": F.Text(), "answer": F.Text()})},
     {"questions": [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]}, [("a?", "b"), ("c?", "d")]),
])  # fmt: skip
def test_questions(features, values, wanted, tmp_path):
    (record,) = round_trip(tmp_path, features | {"image": F.Image()}, values | {"image": png()})
    assert asked(record) == [("answer", *pair) for pair in wanted] and "captions" not in record


def test_questions_without_answers_are_bad_records(tmp_path):
    features = {"image": F.Image(), "questions": F.Sequence(F.Text()), "answers": F.Sequence(F.Text())}
    cases = [(["a?"], []), (["a?", "b?"], ["c"]), (["a?"], [" "])]
    records = [{"image": png(), "questions": q, "answers": a} for q, a in cases]
    found = round_trip(tmp_path, features, *records)
    for i, word in enumerate(("1 questions and 0 answers", "2 questions and 1 answers", "is empty")):
        with pytest.raises(BadMedium, match=word):
            found[i]


def test_texts(tmp_path):
    (record,) = round_trip(tmp_path / "a", {"text": F.Text(), "title": F.Text()}, {"text": "long", "title": "x"})
    assert record == {"text": "long"}
    features = {"text": F.Text(), "label": F.ClassLabel(names=["bad", "good"])}
    (record,) = round_trip(tmp_path / "b", features, {"text": "a film", "label": 1})
    assert asked(record) == [("label", "a film", "good")] and "text" not in record


@pytest.mark.parametrize("nested", [False, True])
def test_translation(nested, tmp_path):
    feature, pair = F.Translation(["en", "de"]), {"de": "Katze", "en": "cat"}
    features, record = ({"translation": feature}, {"translation": pair}) if nested else (feature, pair)
    (record,) = round_trip(tmp_path, features, record)
    assert asked(record) == [("translation", "Katze", "cat")]  # by the alphabet


@pytest.mark.parametrize("name", ["speech", "audio"])
@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.float32])
def test_speech(name, dtype, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = np.array([0, 1000, -(2**15), 2**15 - 1], np.int16)
    given = samples / np.float32(2**15) if dtype == np.float32 else samples
    features = {name: F.Tensor(shape=(None,), dtype=dtype), "text": F.Text()}
    (record,) = round_trip(tmp_path, features, {name: given.astype(dtype), "text": "hello"})
    assert asked(record) == [("speech", "what is said?", "hello")]
    assert "captions" not in record and "text" not in record and record["audio"][:4] == b"RIFF"
    found, rate = soundfile.read(io.BytesIO(record["audio"]), dtype="float32")
    assert rate == 16000 and np.array_equal(found, samples / np.float32(2**15))


def test_sounds_with_a_label_and_a_rate_of_their_own(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    sound = F.Tensor(shape=(None, 2), dtype=np.int64)
    sound.sample_rate = 8000  # as F.Audio has it, which needs TensorFlow
    features = F.FeaturesDict({"audio": sound, "label": F.ClassLabel(names=["bark", "meow"])})
    records = [{"audio": np.full((4, 2), value), "label": 0} for value in (7, 2**15)]
    found = datasets.adapted(records, features)
    assert asked(found[0]) == [("label", "what is heard?", "bark")]
    samples, rate = soundfile.read(io.BytesIO(found[0]["audio"]), dtype="int16")
    assert rate == 8000 and samples.tolist() == [[7, 7]] * 4
    with pytest.raises(BadMedium, match="more than 16 bits"):
        found[1]
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(InputError, match="soundfile.*pip install"):
        found[0]


def test_integers_of_32_bits_keep_their_scale():
    soundfile = pytest.importorskip("soundfile")
    samples, _ = soundfile.read(io.BytesIO(public.wav(np.array([2**30, -(2**31)], np.int32), 16000)))
    assert samples.tolist() == [0.5, -1.0]


@pytest.mark.parametrize("features", [
    {"a": F.Text(), "b": F.Tensor(shape=(3,), dtype=np.float32)}, {"image": F.Image()},
    {"image": F.Image(shape=(4, 4, 1), dtype=np.float32), "label": F.ClassLabel(num_classes=2)},
    {"audio": F.Tensor(shape=(None,), dtype=np.uint8), "label": F.ClassLabel(num_classes=2)},
    {"image": F.Tensor(shape=(4, 4, 3), dtype=np.uint8), "label": F.ClassLabel(num_classes=2)},
    {"question": F.Text(), "answer": F.Text(), "context": F.Text()}, {"text": F.Sequence(F.Text())},
    {"t": F.Translation(["en", "de", "fr"])}, {"image": F.Image(), "label": np.int64},
])  # fmt: skip
def test_features_that_fit_nothing(features):
    with pytest.raises(InputError) as error:
        datasets.adapted([], F.FeaturesDict(features))
    message = str(error.value)
    assert all(f"{name} (" in message for name in features) and public.UNDERSTOOD in message


def test_a_text_that_is_no_utf8():
    with pytest.raises(BadMedium, match="0xe9"):
        datasets.adapted([{"text": b"caf\xe9"}], F.FeaturesDict({"text": F.Text()}))[0]
