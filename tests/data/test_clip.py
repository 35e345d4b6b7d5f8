"""Clips of every kind, files that are none, and the frames that ../shared/data says they have."""

import io
import json
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.data import clip, transforms
from tests.data.test_transforms import whole

av = pytest.importorskip("av")

FOLDER = Path(__file__).parents[3] / "shared/data/vid-decode-samples"
SECRETS = re.compile(r"0x[0-9a-f]{6}|object at|<none>|/usr|/tmp|/work")  # addresses and paths of the machine


def frames_of(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Frame i is random, but for its first pixel, which is (i, i, i)."""
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    frames[:, 0, 0] = np.arange(count)[:, None]
    return frames


def encode(
    frames: np.ndarray, fps: int = 10, codec: str = "ffv1", kind: str = "matroska", pixels="bgr0", turn=0, start=0
):
    """-> a clip, lossless by default: pixels come back as they were. start: time of the first frame, in frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps, height=frames.shape[1], width=frames.shape[2], pix_fmt=pixels)
        if turn:
            stream.set_display_rotation(turn)
        container.start_encoding()  # so that there is a header where there are no frames
        for number, values in enumerate(frames, start):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def chosen(data: bytes, **asked) -> list[int]:
    frames, seconds = clip.decode(data, **asked)
    assert frames.dtype == np.uint8 and seconds.dtype == np.float32 and len(frames) == len(seconds)
    np.testing.assert_allclose(seconds, frames[:, 0, 0, 0] / 10, atol=1e-3)
    return frames[:, 0, 0, 0].tolist()


TEN = encode(frames_of(10))


def test_every_frame_comes_back_with_its_time():
    frames, seconds = clip.decode(TEN)
    np.testing.assert_array_equal(frames, frames_of(10), strict=True)
    np.testing.assert_allclose(seconds, np.arange(10) / 10, atol=1e-3)


@pytest.mark.parametrize("asked, expected", [
    (dict(count=1), [5]), (dict(count=2), [2, 7]), (dict(count=3), [1, 5, 8]), (dict(count=5), [1, 3, 5, 7, 9]),
    (dict(count=10), range(10)), (dict(count=99), range(10)), (dict(rate=2.0), [2, 7]), (dict(rate=50.0), range(10)),
    (dict(rate=0.01), [5]), (dict(rate=5.0, count=2), [2, 7]), (dict(rate=1.0, count=5), [5]),
    (dict(exactly=2), [2, 7]), (dict(exactly=2, count=5), [2, 7]), (dict(exactly=12), [*range(10), 9, 9]),
])  # fmt: skip
def test_which_frames(asked, expected):
    assert chosen(TEN, **asked) == list(expected)
    if "exactly" not in asked:
        assert clip.planned(clip.probe(TEN), **asked) == len(expected)


@pytest.mark.parametrize("kind, codec, pixels", [("mp4", "libx264rgb", "rgb24"), ("avi", "ffv1", "bgr0")])
def test_probe(kind, codec, pixels):
    try:
        data = encode(frames_of(10), codec=codec, kind=kind, pixels=pixels)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"no encoder {codec}")
    said = clip.probe(data)
    assert said == (10, pytest.approx(1.0, abs=0.01), 16, 24)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotated_clips_are_upright(turn):
    frames = frames_of(3)
    data = encode(frames, kind="mp4", codec="png", pixels="rgb24", turn=turn)
    expected = np.rot90(frames, turn // 90, axes=(1, 2))
    assert clip.probe(data)[2:] == expected.shape[1:3]
    np.testing.assert_array_equal(clip.decode(data)[0], expected, strict=True)


def test_times_count_from_the_start_and_do_not_go_back(monkeypatch):
    """A clip may start at 2 s; in an AVI file the times of B frames may be those of another order."""
    data = encode(frames_of(6), start=20)
    np.testing.assert_allclose(clip.decode(data)[1], np.arange(6) / 10, atol=1e-3)
    np.testing.assert_allclose(clip.decode(data, count=1)[1], [0.3], atol=1e-3)
    pick = clip.pick

    def disordered(*asked):
        frames, times, *rest = pick(*asked)
        return frames, times[[0, 2, 1, *range(3, 10)]], *rest

    monkeypatch.setattr(clip, "pick", disordered)
    np.testing.assert_allclose(clip.decode(TEN)[1], np.arange(10) / 10, atol=1e-3)


def gif(count: int) -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.new("RGB", (8, 6), (90 * n, 0, 0)) for n in range(count)]
    first.save(file, "gif", save_all=True, append_images=rest, duration=100)
    return file.getvalue()


def test_gifs():
    assert len(clip.decode(gif(3))[0]) == len(clip.decode(gif(3), count=8)[0]) == 3
    assert clip.probe(gif(1))[0] == 1 and clip.decode(gif(1), count=4)[0].shape == (1, 6, 8, 3)
    assert clip.decode(gif(1), exactly=4)[0].shape == (4, 6, 8, 3)


def sound_alone() -> bytes:
    file = io.BytesIO()
    pytest.importorskip("soundfile").write(file, np.zeros(16000), 16000, format="WAV")
    return file.getvalue()


BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"this is no clip, none at all" * 9, "not a clip or sound"),
    "sound": (sound_alone(), "no video stream"),
    "0 frames": (encode(frames_of(0), kind="avi"), "not one frame|not a clip"),
    "header alone": (TEN[:300], "not one frame|not a clip"),
    "playlist": (b"ffconcat version 1.0\nfile other.mkv\n", "not a clip or sound"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mkv").write_bytes(TEN)  # the playlist must not reach it
    data, message = BAD[name]
    for function in (clip.probe, clip.decode, lambda x: clip.decode(x, exactly=3)):
        with pytest.raises(transforms.BadMedium, match=message) as error:
            function(data)
        assert "\n" not in str(error.value) and not SECRETS.search(str(error.value))


def test_limits(monkeypatch):
    assert len(clip.decode(TEN, limit=10)[0]) == 10
    for function in (clip.probe, clip.decode):
        with pytest.raises(transforms.BadMedium, match="more than 9 frames"):
            function(TEN, limit=9)
    with pytest.raises(transforms.BadMedium, match="more than 9 frames"):  # where the packets did not show it
        clip.pick(TEN, np.arange(1), limit=9)
    monkeypatch.setattr(clip, "BYTE_LIMIT", 5 * 16 * 24 * 3)
    assert len(clip.decode(TEN, count=5)[0]) == 5
    with pytest.raises(transforms.BadMedium, match="6 frames of 24x16 are more than"):
        clip.decode(TEN, exactly=6)
    monkeypatch.setattr(clip, "PIXEL_LIMIT", 16 * 24 - 1)
    with pytest.raises(transforms.BadMedium, match="24x16|not a clip|not one frame"):
        clip.decode(TEN)


def promising(name: str, count: int) -> bytes:
    """An MP4 file of three frames, a table of which says that there are `count`."""
    data = bytearray(encode(frames_of(3), kind="mp4", codec="png", pixels="rgb24"))
    if name == "stsz":  # all samples are of one byte
        at = data.index(b"stsz") + 8
        data[at : at + 8] = struct.pack(">II", 1, count)
        return bytes(data)
    box = struct.pack(">I4sIII", 20, name.encode(), 0, count, 0)
    return bytes(data) + struct.pack(">I4s", 8 + len(box), b"moof") + box


@pytest.mark.parametrize("name", ["stsz", "trun", "cmov"])
def test_tables_that_promise_more_than_a_file_can_hold(name, monkeypatch):
    """FFmpeg would take 35 bytes for each: 1 GB for 30 million of them in a file of 655 bytes."""
    data = promising(name, 30_000_000)
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(transforms.BadMedium, match="promises more packets"):
        clip.probe(data)


def test_promised():
    """Letters among the pixels are no tables, unless an index of fragments may say that they are."""
    assert clip.promised(promising("trun", 7)) == 3 + 7 and clip.promised(TEN) == 0
    table = struct.pack(">I4sIII", 20, b"trun", 0, 10**6, 0)
    plain = promising("free", 0)
    pixels = struct.pack(">I4s", 8 + len(table), b"mdat") + table
    assert clip.promised(plain + pixels) == 3
    assert clip.promised(plain + pixels + struct.pack(">I4sQ", 16, b"sidx", 0)) == 3 + 10**6
    with pytest.raises(transforms.BadMedium, match="not a clip"):  # FFmpeg looks for boxes on, `promised` does not
        clip.probe(struct.pack(">I4s", 8, b"abcd") + plain)


def test_frames_may_not_grow_without_limit(monkeypatch):
    """One that is much larger than the first ones is damage: five thousand of them would be decoded."""
    kind = dict(kind="mpegts", codec="mpeg2video", pixels="yuv420p", fps=25)
    data = encode(frames_of(10, 64, 64), **kind) + encode(frames_of(10, 512, 512), **kind)
    assert len(clip.decode(data)[0]) > 15
    monkeypatch.setattr(clip, "SMALL", 64 * 64)
    assert 5 < len(clip.decode(data)[0]) < 12


def test_a_picture_of_12000_x_12000_takes_no_memory(tmp_path):
    """FFmpeg would decode it to see what is in it. Its own process, as memory that was once used stays counted."""
    (tmp_path / "large.png").write_bytes(whole(12000))
    code = (
        "import resource, sys; from gpt4v_jax.data import clip, sound\n"
        "data, used = open(sys.argv[1], 'rb').read(), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import av, soundfile; before = used()\n"
        "for function in (clip.probe, clip.decode, sound.decode):\n"
        "    try: function(data); sys.exit('it was accepted')\n"
        "    except clip.BadMedium: pass\n"
        "print((used() - before) // 1024)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 50, "MiB; 137 are the pixels in grey"


def test_a_clip_that_is_cut_off_gives_what_is_there():
    data = TEN[: len(TEN) * 6 // 10]
    frames = clip.decode(data)[0]
    assert 3 <= len(frames) <= 6
    np.testing.assert_array_equal(frames, frames_of(10)[: len(frames)])
    padded, seconds = clip.decode(data, exactly=9)
    np.testing.assert_array_equal(padded[: len(frames)], frames)
    np.testing.assert_array_equal(padded[len(frames) :], np.repeat(frames[-1:], 9 - len(frames), axis=0))
    assert (np.diff(seconds) >= 0).all()


def test_frames_are_spread_over_what_can_be_decoded(monkeypatch):
    """The packets promise 40 frames, ten are there: two of them are the middles of the halves of ten, not of forty."""
    said = clip.probe(TEN)
    monkeypatch.setattr(clip, "probe", lambda *_: said._replace(frames=40))
    assert chosen(TEN, count=2) == chosen(TEN, exactly=2) == [2, 7]


def test_any_damage_is_an_input_error():
    """Bytes flipped anywhere: a clip or BadMedium, nothing else; and as many frames as were planned."""
    rng = np.random.default_rng(0)
    for data in (TEN, gif(3), encode(frames_of(4), kind="avi", codec="mpeg4", pixels="yuv420p")):
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, rng.choice([400, len(data)]), 3):
                damaged[at % len(data)] = rng.integers(256)
            try:
                plan = clip.planned(clip.probe(bytes(damaged)), 3)
                assert len(clip.decode(bytes(damaged), exactly=plan)[0]) == plan
            except transforms.BadMedium as error:
                assert not SECRETS.search(str(error))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(config.InputError, match=r"need the package av: pip install 'gpt4v_jax\[media\]'"):
        clip.decode(TEN)


EXPECTED = json.loads((FOLDER / "expected.json").read_text()) if FOLDER.exists() else []


@pytest.mark.parametrize("record", EXPECTED, ids=[r["file"] for r in EXPECTED])
def test_files_of_the_world(record):
    data = (FOLDER / record["file"]).read_bytes()
    first, _, _, total = clip.pick(data, np.arange(1))
    assert total == record["frames_decoded"]
    np.testing.assert_allclose(first[0].mean((0, 1)), record["first_frame_mean_rgb"], atol=1e-3)
    said = clip.probe(data)
    upright = (record["height"], record["width"])
    assert (said.height, said.width) == (upright if record["rotation"] in (0, -180) else upright[::-1])
    assert said.frames == (50 if "decode_error" in record else total)  # corrupted.mp4 has more packets than good frames
    frames, seconds = clip.decode(data, count=3)
    assert len(frames) == 3 and frames.shape[1:3] == (said.height, said.width)
    assert (np.diff(seconds) > 0).all() and seconds[0] >= 0 and seconds[-1] <= said.seconds
