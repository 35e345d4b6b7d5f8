"""Sounds of every kind, files that are none, and log-mel frames beside Whisper's formulas."""

import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.data import sound, transforms

soundfile = pytest.importorskip("soundfile")
av = pytest.importorskip("av")

FILTERS = Path(__file__).parents[3] / "shared/data/tokenizers/whisper/mel_filters.npz"
SPEECH = Path(__file__).parents[3] / "shared/data/aud-speech-samples"
SECRETS = re.compile(r"0x[0-9a-f]{6}|object at|<none>|/usr|/tmp|/work")  # addresses and paths of the machine


def wave(rate: int = 16000, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(values, rate=16000, kind="WAV", subtype=None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, rate, format=kind, subtype=subtype)
    return file.getvalue()


def by_av(values, rate=44100, kind="mp4", codec="aac") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        whole = av.AudioFrame.from_ndarray(values[None], format="fltp", layout="mono")
        whole.sample_rate = rate
        parts = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size or 1024)
        for frame in [*parts.resample(whole), *parts.resample(None), None]:
            container.mux(stream.encode(frame))
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    values = sound.decode(data)
    assert values.dtype == np.float32 and values.ndim == 1 and np.abs(values).max() <= 1
    assert sound.samples(data) == len(values)
    return values


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_every_rate_and_kind_gives_the_same_sound_at_16_khz(kind, rate):
    """Also its length, which `samples` says before: n odd, so that n 16000 / rate is no whole number."""
    source = wave(rate)[: rate // 2 - 1]
    values = decoded(encoded(source, rate, kind))
    assert len(values) == -(-len(source) * 16000 // rate)
    middle = slice(400, 7500)  # filters have edges, and lossy kinds a start
    np.testing.assert_allclose(values[middle], wave()[middle], atol=0.06 if kind in ("OGG", "MP3") else 2e-3)


def test_16_khz_is_not_touched():
    values = np.random.default_rng(0).uniform(-1, 1, 999).astype(np.float32)
    np.testing.assert_array_equal(decoded(encoded(values, subtype="FLOAT")), values)


def test_samples_decodes_nothing_where_the_header_has_the_count(monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    for kind in ("WAV", "FLAC", "OGG"):
        assert sound.samples(encoded(wave(8000), 8000, kind)) == 8000


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels):
    values = np.random.default_rng(0).uniform(-1, 1, (70000, channels)).astype(np.float32)  # more than one block
    np.testing.assert_allclose(decoded(encoded(values, subtype="FLOAT")), values.mean(axis=1), atol=1e-6)


def test_many_channels_are_read_in_smaller_pieces(monkeypatch):
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: asked.append(a[1]) or read(*a, **k))
    assert len(sound.decode(encoded(np.zeros((70, 1000)), subtype="PCM_U8"))) == 70
    assert max(asked) * 1000 <= sound.BLOCK


@pytest.mark.parametrize("kind, codec", [("mp4", "aac"), ("adts", "aac"), ("matroska", "libopus"), ("mpegts", "mp2")])
def test_kinds_that_only_ffmpeg_knows(kind, codec):
    rate = 48000 if codec == "libopus" else 44100
    values = decoded(by_av(wave(rate), rate, kind, codec))
    assert abs(len(values) - 8000) < 16000 * 0.08  # their frames of 20 to 26 ms are whole
    spectrum = np.abs(np.fft.rfft(values[1000:7000]))
    assert abs(spectrum.argmax() * 16000 / 6000 - 440) < 3 and 0.4 < values[1000:7000].max() < 0.6


def test_an_mp3_without_a_count_is_whole():
    """libsndfile guesses from the first bit rate, and stops where it guessed."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    values = (rng.standard_normal(44100 * 3) * np.repeat([0.01, 0.3, 0.001], 44100)).astype(np.float32)
    options = dict(format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.5)
    with soundfile.SoundFile(file, "w", 44100, 1, **options) as out:
        out.write(values)
    data = file.getvalue()
    assert b"Xing" in data[:100]
    second = data.index(data[:2], 100)  # frame: the first one holds only the count
    assert abs(len(decoded(data[second:])) - 48000) < 1000


def test_a_flac_without_a_count_is_whole():
    data = bytearray(encoded(wave(), kind="FLAC"))
    data[21] &= 0xF0  # the 36 bits of the count: 0, not known
    data[22:26] = bytes(4)
    np.testing.assert_array_equal(decoded(bytes(data)), decoded(encoded(wave(), kind="FLAC")))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


def silent_clip() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "gif")
    return file.getvalue()


def holed(value: float) -> np.ndarray:
    values = wave()
    values[100] = value
    return values


def longer_than_it_says() -> bytes:
    data = bytearray(encoded(wave(seconds=2), subtype="PCM_16"))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)  # as a pipe is written
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    return bytes(data)


ADTS = by_av(wave(44100), kind="adts")
FLAC = encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 40000), kind="FLAC")
BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"this is no sound, none at all" * 9, "not a clip or sound"),
    "picture": (picture(), "not a clip or sound"),
    "clip": (silent_clip(), "no sound track"),
    "header alone": (encoded(wave())[:20], "not a clip or sound|0 samples|damaged"),
    "truncated wav": (encoded(wave())[:9000], "9000 bytes, but its header says 16044"),
    "truncated flac": (FLAC[: len(FLAC) // 2], "damaged sound: the last"),
    "truncated aac": (ADTS[: ADTS.rindex(ADTS[:2]) + 40], "damaged sound: it cannot be decoded past"),
    "0 samples": (encoded(wave()[:0]), "0 samples"),
    "NaN": (encoded(holed(np.nan), subtype="FLOAT"), "NaN or infinity"),
    "infinity": (encoded(holed(np.inf), subtype="FLOAT"), "NaN or infinity"),
    "too long": (encoded(wave(8000, 601), 8000), "601.0 s or more is longer than 600 s"),
    "rate": (encoded(wave(), 300_000), "300000 samples a second"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name):
    data, message = BAD[name]
    with pytest.raises(transforms.BadMedium, match=message) as error:
        sound.decode(data)
    assert "\n" not in str(error.value) and not SECRETS.search(str(error.value))


@pytest.mark.parametrize("name", ["empty", "text", "picture", "0 samples", "too long", "rate"])
def test_what_the_header_shows_is_refused_before_decoding(name, monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    for function in (sound.decode, sound.samples):
        with pytest.raises(transforms.BadMedium, match=BAD[name][1]):
            function(BAD[name][0])


@pytest.mark.parametrize("data", [encoded(wave(), kind="MP3"), by_av(wave(44100)), encoded(wave())])
def test_the_limit_of_seconds(data):
    for function in (sound.decode, sound.samples):
        assert function(data, 0.6) is not None
        with pytest.raises(transforms.BadMedium, match="longer than 0.4 s"):
            function(data, 0.4)


def test_a_wav_from_a_pipe():
    """Its header says 4 GiB."""
    assert len(decoded(longer_than_it_says())) == 32000


def test_loud_samples_are_clipped_also_after_resampling():
    square = np.sign(wave(8000)) * 3
    assert np.abs(decoded(encoded(square, 8000, subtype="FLOAT"))).max() == 1


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "m4a"])
def test_any_damage_is_an_input_error(kind):
    """Bytes flipped anywhere: a sound of as many samples as `samples` says, or BadMedium, nothing else."""
    rng = np.random.default_rng(0)
    data = by_av(wave(44100)) if kind == "m4a" else encoded(wave(), kind=kind)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, rng.choice([60, len(data)]), 3):
            damaged[at] = rng.integers(256)
        try:
            decoded(bytes(damaged))
        except transforms.BadMedium as error:
            assert not SECRETS.search(str(error))


@pytest.mark.parametrize("package", ["soundfile", "av"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(config.InputError, match=rf"needs? the package {package}: pip install 'gpt4v_jax\[media\]'"):
        sound.decode(by_av(wave(44100)))


@pytest.mark.parametrize("bins", [80, 128])
def test_mel_filters_are_whispers(bins):
    if not FILTERS.exists():
        pytest.skip(f"no {FILTERS.name}")
    ours = sound.mel_filters(bins)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, np.load(FILTERS)[f"mel_{bins}"], rtol=0, atol=1e-6)


def test_mel_filters_have_equal_areas_and_peaks_on_slaneys_scale():
    filters = sound.mel_filters(80)
    assert filters.shape == (80, 201) and not filters.flags.writeable
    np.testing.assert_allclose(filters[40:].sum(axis=1) * 40, 1, atol=0.1)  # 40 Hz from one frequency to the next
    assert (np.diff(filters.argmax(axis=1)) >= 0).all() and filters[0].argmax() == 1 and filters[79].argmax() == 192


def reference(samples: np.ndarray, bins: int) -> np.ndarray:
    """openai/whisper, whisper/audio.py, log_mel_spectrogram."""
    torch = pytest.importorskip("torch")
    stft = torch.stft(torch.tensor(samples), 400, 160, window=torch.hann_window(400), return_complex=True)
    magnitudes = stft[..., :-1].abs() ** 2
    logs = torch.clamp(torch.tensor(sound.mel_filters(bins)) @ magnitudes, min=1e-10).log10()
    return ((torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).numpy().T


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("name", ["noise", "quiet", "tone", "zeros", "short", "odd", "speech"])
def test_log_mel_is_whispers(name, bins):
    rng = np.random.default_rng(0)
    if name == "speech":
        if not SPEECH.exists():
            pytest.skip(f"no {SPEECH.name}")
        values = sound.decode((SPEECH / "jfk.flac").read_bytes())
        assert len(values) == 176000
    else:
        values = {
            "noise": rng.uniform(-1, 1, 16000), "quiet": rng.uniform(-1e-3, 1e-3, 16000), "tone": wave(),
            "zeros": np.zeros(1600), "short": rng.uniform(-1, 1, 201), "odd": rng.uniform(-1, 1, 1759),
        }[name].astype(np.float32)  # fmt: skip
    mel = sound.log_mel(values, bins)
    assert mel.shape == (sound.frames_of(len(values)), bins) == (len(values) // 160, bins) and mel.dtype == np.float32
    np.testing.assert_allclose(mel, reference(values, bins), rtol=0, atol=1e-4)


def test_the_shortest_sounds():
    for length in (160, 200):  # reflected where they are 201 long
        values = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
        padded = np.pad(values, (0, 201 - length))
        np.testing.assert_array_equal(sound.log_mel(values, 80), sound.log_mel(padded, 80))
    assert sound.frames_of(159) == 0
    with pytest.raises(transforms.BadMedium, match="159 samples is shorter than one frame of 160"):
        sound.log_mel(np.zeros(159, np.float32), 80)


def test_augment_changes_speed_loudness_and_adds_noise():
    source, speeds, gains = wave(seconds=1), [], []
    for seed in range(60):
        values = sound.augment(source, np.random.default_rng(seed), 20000)
        assert values.shape == (20000,) and values.dtype == np.float32 and np.abs(values).max() <= 1
        np.testing.assert_array_equal(values, sound.augment(source, np.random.default_rng(seed), 20000))
        length = 20000 - np.argmax(values[::-1] != 0)  # what follows is the zeros at its end
        speeds.append(16000 / length)
        spectrum = np.abs(np.fft.rfft(values[:length])) ** 2
        peak = spectrum.argmax()
        assert abs(peak * 16000 / length / 440 - speeds[-1]) < 0.01  # pitch goes with tempo
        gains.append(20 * np.log10(np.sqrt(np.mean(values[:length] ** 2)) * np.sqrt(8)))
        beside = spectrum[:-1].sum() - spectrum[max(0, peak - 40) : peak + 41].sum()
        assert 12 < 10 * np.log10(spectrum.sum() / beside) < 43, "noise in dB under the sound"
    assert 0.995 < min(speeds) < 1.02 and 1.18 < max(speeds) < 1.205, "no voice is slower: its end would be cut off"
    assert -6.2 < min(gains) < -5 and 5 < max(gains) < 6.2


def test_augment_cuts_to_the_length_and_keeps_silence():
    assert sound.augment(wave(), np.random.default_rng(0), 100).shape == (100,)
    np.testing.assert_array_equal(sound.augment(np.zeros(500, np.float32), np.random.default_rng(0), 700), 0)


def test_augment_mel_warps_bins():
    """A ramp along the bins shows where each one was taken from; masks are where a value is the mean."""
    ramp = np.broadcast_to(np.arange(80, dtype=np.float32), (50, 80))
    slopes = []
    for seed in range(60):
        warped = sound.augment_mel(ramp, np.random.default_rng(seed))
        assert warped.shape == (50, 80) and warped.dtype == np.float32
        free = [row for row in warped if len(np.unique(row)) > 1]
        assert len(free) >= 45, "at most a tenth of the frames is masked"
        kept = np.flatnonzero(np.abs(np.diff(free[0])) > 1e-3)
        assert 80 - len(kept) - 1 <= 11, "at most 10 bins are masked"
        slopes.append(np.median(np.diff(free[0])[:50]))
        ends = free[0][[0, -1]]
        assert (np.isclose(ends, [0, 79], atol=1e-3) | np.isclose(ends, warped.mean(), atol=5)).all()
    assert 0.849 < min(slopes) < 0.9 and 1.1 < max(slopes) < 1.151


def test_augment_mel_masks_and_leaves_its_input():
    mel = np.random.default_rng(0).standard_normal((50, 80)).astype(np.float32)
    before, frames, bins = mel.copy(), set(), set()
    for seed in range(80):
        warped = sound.augment_mel(mel, np.random.default_rng(seed))
        frames.add(sum(len(np.unique(row)) == 1 for row in warped))
        bins.add(sum(len(np.unique(column)) == 1 for column in warped.T))
    np.testing.assert_array_equal(mel, before)
    assert frames == set(range(6)) and bins == set(range(11))
