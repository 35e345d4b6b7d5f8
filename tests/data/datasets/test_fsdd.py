"""FSDD: who is held out is in no training split; a string is the recordings of one speaker that its answer names."""

import collections
import io
import pathlib
import zipfile

import numpy as np
import pytest
import soundfile

from gpt4v_jax.config import InputError
from gpt4v_jax.data import datasets
from gpt4v_jax.data.datasets import fsdd, raw

REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"
SPEAKERS = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
RECORDINGS = 7


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Recordings of 20 samples of one value, which tells the speaker, the digit and the recording; fewer strings."""
    (tmp_path / "aud-fsdd" / "recordings").mkdir(parents=True)
    for s, speaker in enumerate(SPEAKERS):
        for digit in range(10):
            for i in range(RECORDINGS):
                samples = np.full(20, 1000 * (s + 1) + 100 * digit + i + 1, np.int16)
                soundfile.write(tmp_path / "aud-fsdd" / "recordings" / f"{digit}_{speaker}_{i}.wav", samples, 8000)
    monkeypatch.setattr(fsdd, "SHA256", raw.digest(raw.unpacked(tmp_path / "aud-fsdd" / "recordings")))
    monkeypatch.setattr(fsdd, "STRINGS", {"train": 60, "strings": 20})
    return tmp_path


def heard(record) -> tuple[list[tuple[str, int, int]], list[int]]:
    """-> (speaker, digit, recording) of what is to be heard, and the samples of silence between."""
    samples, rate = soundfile.read(io.BytesIO(record["audio"].tobytes()), dtype="int16")
    assert rate == 8000 and samples.ndim == 1
    edges = np.flatnonzero(np.diff(samples)) + 1
    runs = [(int(run[0]), len(run)) for run in np.split(samples, edges)]
    assert all(length == 20 for value, length in runs if value)
    values = [value - 1 for value, _ in runs if value]
    return ([(SPEAKERS[v // 1000 - 1], v // 100 % 10, v % 100) for v in values],
            [length for value, length in runs if not value])


def test_splits_and_strings(files):
    builder = datasets.prepare("fsdd/lucas", str(files / "cache"), str(files))
    known = set(SPEAKERS) - {"lucas"}
    singles = {"train": {(s, d, i) for s in known for d in range(10) for i in range(5, RECORDINGS)},
               "validation": {(s, d, i) for s in known for d in range(10) for i in range(5)},
               "test": {("lucas", d, i) for d in range(10) for i in range(RECORDINGS)}, "strings": set()}
    strings = {"train": 60, "validation": 0, "test": 0, "strings": 20}
    assert set(builder.info.splits) == set(singles)
    used, lengths, silences, speakers = set(), set(), [], set()
    for split, wanted in singles.items():
        found, kinds = [], collections.Counter()
        for record in builder.as_data_source(split):
            said, silent = heard(record)
            (kind,), (question,), (answer,) = (record["questions"][key] for key in ("kind", "question", "answer"))
            assert question == b"what is said?"
            assert answer.decode().split() == [WORDS[digit] for _, digit, _ in said]
            kinds[kind] += 1
            if kind == b"digit":
                found += said
                continue
            assert kind == b"string" and len({speaker for speaker, _, _ in said}) == 1
            allowed = {s: d for d in ("train", "test") for s, _, _ in singles[d]}
            assert all((allowed[s] == "train" and i >= 5) if split == "train" else s == "lucas" for s, _, i in said)
            used |= set(said)
            lengths.add(len(said))
            speakers.add(said[0][0])
            assert len(silent) == len(said) - 1
            silences += silent
        assert len(found) == len(wanted) and set(found) == wanted
        assert kinds == collections.Counter({b"digit": len(wanted), b"string": strings[split]})
        assert not wanted or len({digit for _, digit, _ in found[:20]}) > 3  # they are mixed
    assert lengths == {3, 4, 5, 6, 7} and speakers == set(SPEAKERS) and len(used) > 90
    assert 400 <= min(silences) < 600 and 2200 < max(silences) <= 2400


def test_records_are_equal_in_each_build_and_differ_by_who_is_held_out(files):
    found = fsdd.recordings(str(files))
    one, two = (list(fsdd.records(found, "theo", "strings")) for _ in range(2))
    np.testing.assert_equal(one, two)
    assert [r["questions"] for r in one] != [r["questions"] for r in fsdd.records(found, "george", "strings")]


def test_singles_are_the_original_files_also_from_the_archive(files, tmp_path, monkeypatch):
    recordings = files / "aud-fsdd" / "recordings"
    with zipfile.ZipFile(files / "archive", "w") as packed:
        packed.writestr("free-spoken-digit-dataset/README.md", "not a recording")
        for file in recordings.iterdir():
            packed.write(file, f"free-spoken-digit-dataset/recordings/{file.name}")
    asked = []
    found = fsdd.recordings("", lambda url: asked.append(url) or str(files / "archive"))
    commit = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
    assert asked == [f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{commit}.zip"]
    originals = {file.read_bytes() for file in recordings.iterdir() if "theo" in file.name}
    assert {r["audio"].tobytes() for r in fsdd.records(found, "theo", "test")} == originals

    def refused(self, url):
        raise ConnectionError

    monkeypatch.setattr("tensorflow_datasets.core.download.DownloadManager.download", refused)
    with pytest.raises(InputError, match="archive/26eb9aaf.*zip failed.*GPT4V_DATA_DIR"):
        datasets.prepare("fsdd", str(tmp_path / "cache"), str(tmp_path / "nothing"))


@pytest.mark.skipif(not (REAL / "aud-fsdd").is_dir(), reason="the real files are not here")
def test_real_files():
    found = fsdd.recordings(str(REAL))
    assert set(found) == {(s, d, i) for s in SPEAKERS for d in range(10) for i in range(50)}
    assert len(list(fsdd.records(found, "george", "validation"))) == 250
    assert len(list(fsdd.records(found, "george", "test"))) == 500
    assert len(list(fsdd.records(found, "george", "strings"))) == 200
