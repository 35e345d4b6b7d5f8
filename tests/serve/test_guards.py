"""data: URIs and base64, and bombs: files that are small until they are decoded."""

import asyncio
import base64
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import clip
from gpt4v_jax.serve import guards
from tests.data import test_clip, test_sound, test_transforms

GUARD = guards.Guard(guards.Limits(bytes=100_000))
TEXT = base64.b64encode(b"some bytes").decode()


@pytest.mark.parametrize("modality, text", [
    ("image", f"data:image/png;base64,{TEXT}"), ("image", f"DATA:IMAGE/svg+xml;Base64,{TEXT}"),
    ("video", f"data:video/mp4;base64,{TEXT}"), ("video", f"data:image/gif;base64,{TEXT}"), ("audio", TEXT),
    ("audio", f"data:audio/wav;codecs=1;base64,{TEXT}"),
])  # fmt: skip
def test_data_uris(modality, text):
    guard = GUARD
    assert guard.decode(modality, text) == b"some bytes"
    if text != TEXT:
        assert asyncio.run(guard.read(modality, text)) == b"some bytes"


@pytest.mark.parametrize("modality, text, match", [
    ("image", f"data:audio/wav;base64,{TEXT}", "type audio/wav, which must be image/"),
    ("audio", f"data:video/mp4;base64,{TEXT}", "must be audio/"), ("video", f"data:image/png;base64,{TEXT}",
    "or image/gif"),
    ("image", f"data:text/html;base64,{TEXT}", "must be image/"), ("image", f"data:;base64,{TEXT}", "must look like"),
    ("image", f"data:image/png,{TEXT}", "must look like"), ("image", "data:image/png;base64", "must look like"),
    ("image", f"data:image/png{';a=b' * 9};base64,{TEXT}", "must look like"),
    ("image", "data:", "must look like"), ("image", f"data:image/png;base64;{TEXT}", "must look like"),
    ("image", "data:image/png;base64,", "no bytes"), ("audio", "", "no bytes"),
    *(("image", "data:image/png;base64," + bad, "damaged base64") for bad in (
        "A", "AA", "AAA", "A===", "====", "AA=A", "AAAA=", "AA==AA==", TEXT[:-2], TEXT + "\n", " " + TEXT,
        TEXT[:4] + "\n" + TEXT[4:],
        "-_-_", "AAA%3D", "é" * 4, "AA\0A", "AAAA;")),
    ("image", "data:image/png;base64," + "A" * 134_000, "more than 100000 bytes"),
    ("audio", base64.b64encode(bytes(100_001)).decode(), "more than 100000 bytes"),
])  # fmt: skip
def test_data_that_are_refused(modality, text, match):
    with pytest.raises(config.InputError, match=match) as error:
        GUARD.decode(modality, text)
    assert len(str(error.value)) < 250 and str(error.value).startswith(modality)


def test_base64_up_to_the_limit():
    for size in (99_998, 99_999, 100_000):
        assert len(GUARD.decode("audio", base64.b64encode(bytes(size)).decode())) == size


LAYOUT = batch_lib.Layout(
    256, 512, "media", config.Image(patch=4, size=28), config.Video(patch=4, size=28, frames=4), config.Audio(80,
    seconds=2.0),
    items=(1, 1, 1), patches=(49, 196, 400),
)  # fmt: skip


def check(modality: str, data: bytes, **limits) -> None:
    guards.Guard(guards.Limits(**limits)).check(modality, data, LAYOUT)


def frames(kind: str, count: int = 3, side: int = 8) -> bytes:
    file, pictures = io.BytesIO(), [Image.new("RGB", (side, side), (90 * n % 256, n % 256, 0)) for n in range(count)]
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:])
    return file.getvalue()


@pytest.mark.parametrize("modality, data", [
    ("image", frames("png", 1, 1)), ("image", frames("gif")), ("image", frames("webp")), ("image", frames("tiff")),
    ("video", frames("gif")), ("video", test_clip.TEN), ("audio", test_sound.encoded(test_sound.wave(seconds=2.0))),
    ("audio", test_sound.encoded(test_sound.wave(), kind="MP3")), ("audio", test_sound.by_av(test_sound.wave(44100))),
])  # fmt: skip
def test_media_within_the_limits(modality, data):
    check(modality, data)


def silence(kind: str, seconds: int, subtype: str | None = None) -> bytes:
    return test_sound.encoded(np.zeros(seconds * 8000, np.float32), 8000, kind, subtype)


@pytest.mark.parametrize("modality, data, match", [
    ("image", test_transforms.whole(12000), "12000x12000 is more than 16000000 pixels"),
    ("image", test_transforms.one_tile(5000), "5000x5000 is more than 16000000"),
    ("image", test_clip.TEN, "not a picture"), ("image", test_sound.FLAC, "not a picture"), ("image", b"",
    "not a picture"),
    ("image", frames("png")[:40], "picture"), ("video", test_clip.promising("stsz", 10**9), "over 1000000 packets"),
    ("audio", test_clip.promising("trun", 10**9), "over 1000000 packets"),
    ("video", test_transforms.whole(12000), "not a clip"), ("video", test_sound.FLAC, "not a clip|no video"),
    ("audio", frames("png"), "not a clip or sound|no sound"), ("audio", test_clip.TEN, "no sound track"),
    *(("audio", silence(*kind), "longer than 2 s") for kind in (("FLAC", 600), ("OGG", 60, "OPUS"), ("MP3", 60),
    ("WAV", 3))),
])  # fmt: skip
def test_bombs(modality, data, match):
    with pytest.raises(config.InputError, match=match) as error:
        check(modality, data)
    assert "\n" not in str(error.value) and not test_clip.SECRETS.search(str(error.value))


@pytest.mark.parametrize("modality, data, limits, match", [
    *(("image", frames(kind), dict(pixels=63), "8x8 is more than 63") for kind in ("gif", "webp", "tiff")),
    ("video", test_clip.TEN, dict(frames=9), "more than 9 frames"),
    ("video", test_clip.encode(test_clip.frames_of(2, 16, 128)), dict(frame_pixels=2047), "2047 pixels"),
    ("video", test_clip.TEN, dict(clip_pixels=3839), "10 frames of 24x16 are more than 3839 pixels"),
    ("video", test_clip.TEN, dict(clip_bytes=4607), "4 frames of 24x16 are more than 4607 bytes"),
    ("video", test_clip.promising("free", 3), dict(packets=2), "over 2 packets"),
    ("audio", test_sound.encoded(test_sound.wave()), dict(audio_seconds=0.4), "longer than 0.4 s"),
])  # fmt: skip
def test_each_limit(modality, data, limits, match):
    with pytest.raises(config.InputError, match=match):
        check(modality, data, **limits)
    if modality != "image":
        check(modality, data, **{name: value + 1 for name, value in limits.items()})


def test_a_modality_that_the_model_does_not_read():
    with pytest.raises(config.InputError, match="reads no audio"):
        guards.Guard(guards.Limits()).check("audio", test_sound.FLAC, batch_lib.Layout(256, 512, "none"))


def test_a_clip_of_many_frames_is_counted_no_further_than_the_limit(monkeypatch):
    data = test_clip.encode(np.zeros((300, 16, 16, 3), np.uint8))
    monkeypatch.setattr(clip, "turned", lambda *_: pytest.fail("counted to its end"))
    with pytest.raises(config.InputError, match="more than 200 frames"):
        check("video", data, frames=200)


def test_bombs_take_no_memory(tmp_path):
    """Its own process, as memory that was once used stays counted."""
    bombs = [("image", test_transforms.whole(12000)), ("image", test_transforms.whole(7000)), ("audio",
    silence("FLAC", 600)),
             ("video", test_clip.promising("stsz", 10**7)), ("video", test_transforms.whole(7000))]  # fmt: skip
    for number, (modality, data) in enumerate(bombs, 1):
        (tmp_path / f"{number}.{modality}").write_bytes(data)
    (tmp_path / "layout").write_bytes(pickle.dumps(LAYOUT))
    (tmp_path / "0.video").write_bytes(test_clip.TEN)
    code = (
        "import pathlib, pickle, resource, sys; from gpt4v_jax.serve import guards\n"
        "guard, folder = guards.Guard(guards.Limits()), pathlib.Path(sys.argv[1])\n"
        "layout = pickle.loads((folder / 'layout').read_bytes())\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "guard.check('video', (folder / '0.video').read_bytes(), layout); before = used()\n"
        "for path in sorted(folder.glob('[1-9].*')):\n"
        "    try: guard.check(path.suffix[1:], path.read_bytes(), layout); sys.exit('it was accepted')\n"
        "    except guards.config.InputError: pass\n"
        "print((used() - before) // 1024)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True,
    check=True)
    assert int(result.stdout) < 40, "MiB; 49 are 7000 x 7000 pixels in grey, 330 the index of ten million packets"
