"""Files -> patches: what was counted before decoding is what decoding gives, and what becomes of files that are bad."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import media, mixture, packing, pipeline, sound, sources, transforms
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.bad import SAID, Bad
from gpt4v_jax.data.transforms import BadMedium
from tests import tiny
from tests.data.test_clip import encode, frames_of
from tests.data.test_sound import encoded, wave

BUDGETS = config.Data(image=config.Budget(4), video=config.Budget(2), audio=config.Budget(2))


def layout(**changes) -> batch_lib.Layout:
    made = batch_lib.layout(tiny.make_config(context=128, media=True, **changes), BUDGETS)
    return dataclasses.replace(made, vocab=300)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(values: np.ndarray, **saved) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **saved)
    return file.getvalue()


def cut(values: np.ndarray, p: int = 2, t: int = 1) -> np.ndarray:
    """[F,H,W,3] or [H,W,3] -> patches, one by one, by time, row, column."""
    values = values if values.ndim == 4 else values[None]
    return np.stack([
        values[f : f + t, y : y + p, x : x + p].ravel()
        for f in range(0, len(values), t) for y in range(0, values.shape[1], p) for x in range(0, values.shape[2], p)
    ])  # fmt: skip


def read(modality: str, data: bytes, layout: batch_lib.Layout, **more):
    """-> its views' patches, after what holds for all of them."""
    shape = media.shape(modality, lambda: data, layout)
    found = media.patches(modality, data, shape, layout, **more)
    views, (p, dtype) = layout.views(modality, shape), layout.values(modality)
    assert sum(len(values) for values, _ in found) == layout.count(modality, shape)
    for (values, index), view in zip(found, views, strict=True):
        assert values.shape == (len(view), p) and values.dtype == dtype and index.shape == (len(view), 3)
        assert [tuple(at) for at in index] == list(np.ndindex(view.grid))
    return found


def test_a_square_picture():
    ((values, _),) = read("image", png(pixels(4, 4)), layout())
    np.testing.assert_array_equal(values, cut(pixels(4, 4)))
    ((values, _),) = read("image", png(pixels(30, 9)), layout())
    np.testing.assert_array_equal(values, cut(transforms.decode_picture(png(pixels(30, 9)), 4)))


def test_a_padded_picture():
    ((values, _),) = read("image", png(pixels(2, 4)), layout(image={"resize": "pad"}))
    padded = np.full((4, 4, 3), 128, np.uint8)
    padded[1:3] = pixels(2, 4)
    np.testing.assert_array_equal(values, cut(padded))


def test_native_pictures():
    native = layout(image={"resize": "native", "size": 8})
    for height, width in ((8, 4), (2, 6), (4, 4)):  # as they are
        ((values, _),) = read("image", png(pixels(height, width)), native)
        np.testing.assert_array_equal(values, cut(pixels(height, width)))
    for height, width in ((80, 40), (3, 300), (7, 5)):
        read("image", png(pixels(height, width)), native)
    exif = Image.Exif()
    exif[transforms.ORIENTATION] = 6  # lies on its side
    data = png(pixels(4, 8), exif=exif)
    assert media.shape("image", lambda: data, native) == (8, 4)
    ((values, _),) = read("image", data, native)
    np.testing.assert_array_equal(values, cut(np.rot90(pixels(4, 8), -1)))


def test_tiles():
    """A thumbnail, then tiles row by row; a picture that is small is itself alone."""
    tiled = layout(image={"tiles": 4})
    whole = pixels(8, 8)
    thumbnail, *tiles = read("image", png(whole), tiled)
    np.testing.assert_array_equal(thumbnail[0], cut(transforms.decode_picture(png(whole), 4)))
    parts = [whole[y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
    for (values, _), part in zip(tiles, parts, strict=True):
        np.testing.assert_array_equal(values, cut(part))
    assert [len(read("image", png(pixels(*size)), tiled)) for size in ((3, 4), (4, 8), (30, 7))] == [1, 3, 5]


def small_clip(count: int, fps: int = 10) -> tuple[np.ndarray, bytes]:
    frames = frames_of(count, 4, 4)
    return frames, encode(frames, fps)


def test_clips_by_count():
    frames, data = small_clip(10)
    assert media.shape("video", lambda: data, layout()) == (4,)
    ((values, _),) = read("video", data, layout())
    np.testing.assert_array_equal(values, cut(frames[[1, 3, 6, 8]], t=2))


def test_clips_by_rate():
    frames, data = small_clip(10)  # a second
    ((values, _),) = read("video", data, layout(video={"rate": 2.0, "tubelet": 1}))
    np.testing.assert_array_equal(values, cut(frames[[2, 7]]))
    assert media.shape("video", lambda: data, layout(video={"rate": 30.0})) == (4,)


def test_the_last_tubelet_is_filled_up():
    frames, data = small_clip(3)
    assert media.shape("video", lambda: data, layout()) == (3,)
    ((values, _),) = read("video", data, layout())
    np.testing.assert_array_equal(values, cut(frames[[0, 1, 2, 2]], t=2))


def test_frames_of_another_size():
    frames = frames_of(4, 16, 24)
    ((values, _),) = read("video", encode(frames), layout())
    resized = np.stack([transforms.decode_picture(png(frame), 4) for frame in frames])
    np.testing.assert_array_equal(values, cut(resized, t=2))


@pytest.mark.parametrize("samples, frames", [(800, 5), (959, 5), (160, 1), (1600, 10)])
def test_sounds(samples, frames):
    data = encoded(wave()[:samples])
    assert media.shape("audio", lambda: data, layout()) == (frames,)
    ((values, _),) = read("audio", data, layout())
    mel = sound.log_mel(sound.decode(data), 3)
    np.testing.assert_array_equal(values.reshape(-1, 3)[:frames], mel)
    assert (values.reshape(-1, 3)[frames:] == mel.min()).all()


def test_centred_sounds():
    """Each bin less its mean over the frames, of which pauses and those that only fill a patch up are none; silence is
    0."""
    centred = layout(audio={"center": True})
    quiet = np.where(np.arange(1120) < 640, 0.003, 1)  # 50 dB
    for pause in (True, False):
        data = encoded(wave()[:1120] * (quiet if pause else 1))
        ((values, _),) = read("audio", data, centred)
        mel = sound.log_mel(sound.decode(data), 3)
        loud = mel[mel.max(axis=1) > mel.max() - 1]
        assert len(loud) == (4 if pause else 7)
        np.testing.assert_allclose(values.reshape(-1, 3)[: len(mel)], mel - loud.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(values.reshape(-1, 3)[len(mel) :], (mel.min() - loud.mean(axis=0))[None], atol=1e-6)
    ((blank, _),) = read("audio", data, centred, blank=True)
    assert (blank == 0).all()


def test_a_sound_that_is_too_long_fits_no_row_and_a_too_short_one_is_bad():
    here = layout()
    longest = round(here.audio.seconds * 100)
    for frames, fits in ((longest, True), (longest + 1, False), (10 * longest, False)):
        shape = media.shape("audio", lambda f=frames: encoded(np.resize(wave(), f * 160)), here)
        assert (here.count("audio", shape) <= here.budget("audio")[1]) == fits and shape[0] >= frames
    with pytest.raises(BadMedium, match="shorter than one frame"):
        media.shape("audio", lambda: encoded(wave()[:150]), here)


def test_blank_media_are_grey_and_silent():
    tiled = layout(image={"tiles": 2})
    files = {"image": png(pixels(4, 8)), "video": small_clip(10)[1], "audio": encoded(wave()[:800])}
    for modality, data in files.items():
        blank, real = (read(modality, data, tiled, blank=value) for value in (True, False))
        for (values, index), (others, at) in zip(blank, real, strict=True):
            np.testing.assert_array_equal(index, at)
            silent = sound.log_mel(np.zeros(800, np.float32), 3)
            np.testing.assert_allclose(values, silent[0, 0] if modality == "audio" else 128, rtol=1e-6)
            assert np.ptp(others) > 0
    assert np.ptp(silent) == 0


ALL = ("shift", "flip", "voice", "mask")


@pytest.mark.parametrize("modality", batch_lib.MEDIA)
def test_augmented_by_the_rng_alone(modality):
    large = layout(image={"size": 28}, video={"size": 28}, audio={"seconds": 1.0, "bins": 16})
    data = {"image": png(pixels(28, 28)), "video": encode(frames_of(4, 28, 28)), "audio": encoded(wave())}[modality]

    def values(seed=None, augment=ALL):
        rng = None if seed is None else np.random.default_rng(seed)
        return read(modality, data, large, augment=augment, rng=rng)[0][0]

    plain = values(augment=())
    np.testing.assert_array_equal(values(), plain)
    np.testing.assert_array_equal(values(1, augment=()), plain)
    np.testing.assert_array_equal(values(1), values(1))
    assert len({values(seed).tobytes() for seed in range(6)}) > 3
    others = ("voice", "mask") if modality != "audio" else ("shift", "flip")
    np.testing.assert_array_equal(values(1, augment=others), plain)


@pytest.mark.parametrize("image", [{}, {"resize": "pad"}, {"resize": "native"}, {"tiles": 4}])
def test_flip_is_the_file_mirrored(image):
    """Half the time; of a picture in tiles, they change places."""
    here, whole = layout(image={"size": 8} | image), pixels(16, 16)
    plain, mirrored = (read("image", png(np.ascontiguousarray(x)), here) for x in (whole, whole[:, ::-1]))
    flips = []
    for seed in range(12):
        found = read("image", png(whole), here, augment=("flip",), rng=np.random.default_rng(seed))
        flips.append(all(np.abs(a.astype(int) - b).max() <= 1 for (a, _), (b, _) in zip(found, mirrored, strict=True)))
        if not flips[-1]:
            for (a, _), (b, _) in zip(found, plain, strict=True):
                np.testing.assert_array_equal(a, b)
    assert 2 < sum(flips) < 10


def uncut(patches: np.ndarray, p: int = 2, t: int = 1, size: int = 28) -> np.ndarray:
    n = size // p
    return patches.reshape(-1, n, n, t, p, p, 3).transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, size, size, 3)


def test_shift_moves_what_is_there():
    """By at most two pixels of 28, as drawn; a clip's frames together; the border goes on."""
    here = layout(image={"size": 28}, video={"size": 28})
    moves = set()
    for modality, frames in (("image", pixels(28, 28)[None]), ("video", frames_of(4, 28, 28))):
        data, t = (png(frames[0]), 1) if modality == "image" else (encode(frames), 2)
        for seed in range(6):
            rng = np.random.default_rng(seed)
            ((values, _),) = read(modality, data, here, augment=("shift",), rng=rng)
            moved = uncut(values, t=t)
            down, right = (round(28 * share) for share in np.random.default_rng(seed).uniform(-1 / 14, 1 / 14, 2))
            moves.add((down, right))
            padded = np.pad(frames, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="edge")
            np.testing.assert_array_equal(moved, padded[:, 2 - down : 30 - down, 2 - right : 30 - right])
    assert len(moves) > 3 and max(max(map(abs, move)) for move in moves) == 2


# ---- files that are bad

TOKENIZER = tokenizer_lib.train("byte", [], 0)


def spoilt(data: bytes) -> bytes:
    return b"not any more" + data[12 : len(data) // 2]


def not_a_number() -> bytes:
    """A sound whose header is good."""
    values = wave()[:800].copy()
    values[300] = np.nan
    return encoded(values, subtype="FLOAT")


def written(folder, content: dict[str, bytes], count: int = 10, **data):
    """A file of records, number i with its picture, clip or sound -> (config.Data, the file)."""
    lines = []
    for i in range(count):
        modality, ending = (("image", "png"), ("video", "mkv"), ("audio", "wav"))[i % 3]
        name = f"{i}.{ending}"
        tone = encoded(wave()[: 480 + 160 * (i % 5)])
        good = {"image": png(pixels(4, 4, i)), "video": small_clip(4)[1], "audio": tone}
        (folder / name).write_bytes(content.get(name, good[modality]))
        lines.append(json.dumps({"prefix": "what?", "suffix": f"n{i}", modality: name}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return dataclasses.replace(BUDGETS, name=f"jsonl:{path}", **data), path


def opened(data: config.Data, layout: batch_lib.Layout):
    return sources.from_records(sources.open_split(data, "train"), data, TOKENIZER, layout, seed=0)


BROKEN = {  # file -> (its content, what is said, found when)
    "pictures": ("3.png", png(pixels(4, 4))[:60], "a damaged picture", "decoding"),
    "no picture": ("3.png", b"hello", "not a picture", "decoding"),
    "native": ("3.png", b"hello", "not a picture", "opening"),
    "sounds": ("5.wav", not_a_number(), "NaN or infinity", "decoding"),
    "no sound": ("5.wav", b"hello", "not a clip or sound", "opening"),
    "empty": ("5.wav", b"", "is empty: 0 bytes", "opening"),
    "no clip": ("4.mkv", b"hello", "not a clip", "opening"),
}


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_becomes_padding(case, threads, tmp_path, capsys):
    """The others are there; it is said once, with its line, however often it is met."""
    name, content, why, when = BROKEN[case]
    number = int(name[0])
    data, path = written(tmp_path, {name: content}, bad=0.1)
    here = layout(image={"resize": "native"} if case == "native" else {})
    source = opened(data, here)
    line = f"skipped {path}:{number + 1}: "
    said = capsys.readouterr().err
    assert (line in said) == (when == "opening") and len(source.needs(0)) == 10 - (when == "opening")
    plan, there = packing.RowPlan(source.needs, here, seed=0), []
    steps = 2 * len(plan.epoch(0))  # two epochs and more
    for batch in pipeline.batches(source, plan, here, 1, 0, steps, threads):
        for k in range(1, batch.document.max() + 1):
            at = batch.document[0] == k
            if at.any():
                answer = TOKENIZER.decode(batch.target[0][at & (batch.weight[0] > 0)])
                there.append(int(answer.removeprefix("n").split("<")[0]))
        assert (batch.weight[batch.document == 0] == 0).all() and (batch.slot[batch.document == 0] == -1).all()
        for modality in batch_lib.MEDIA:
            assert (getattr(batch, modality).at >= 0).sum() == getattr(batch, modality).item.max()
    assert set(there) == set(range(10)) - {number}
    said += capsys.readouterr().err
    assert said.count("skipped") == 1 and line in said and why in said, said
    assert list(source.bad.where) == [f"{path}:{number + 1}"]
    if when == "decoding":
        assert mixture.Tally(source, plan).to(steps)[f"data/{data.name}/bad"] == 1


@pytest.mark.parametrize("name", ["3.png", "4.mkv", "5.wav"])
def test_a_file_that_changes_after_it_was_opened(name, tmp_path, capsys):
    data, path = written(tmp_path, {}, bad=0.1)
    source = opened(data, layout())
    (tmp_path / name).write_bytes(spoilt((tmp_path / name).read_bytes()))
    document = source.document(0, int(name[0]))
    row = packing.fill([document], source.read, layout())
    assert not row.document.any() and not row.weight.any() and (row.slot == -1).all()
    (tmp_path / name).unlink()
    with pytest.raises(BadMedium, match="No such file"):
        source.read(document.media[0][1])
    said = capsys.readouterr().err
    assert said.startswith(f"skipped {path}:{int(name[0]) + 1}: ") and said.count("\n") == 1


def test_beyond_data_bad_the_run_stops_at_opening(tmp_path, capsys):
    data, path = written(tmp_path, {"4.mkv": b"hello", "5.wav": b"hello", "8.wav": b"hello"}, bad=0.2)
    with pytest.raises(config.InputError) as error:
        opened(data, layout())
    said = f"jsonl:{path}: 3 of 10 records cannot be used, which is more than config.data.bad=0.2; the last one is "
    assert str(error.value).startswith(f"{said}{path}:9: not a clip or sound")
    assert not isinstance(error.value, BadMedium) and capsys.readouterr().err.count("skipped") == 3


@pytest.mark.parametrize("threads", [0, 2])
def test_beyond_data_bad_the_run_stops_at_decoding(threads, tmp_path):
    data, path = written(tmp_path, {"3.png": b"hello", "6.png": png(pixels(4, 4))[:60]}, bad=0.1)
    here = layout()
    source = opened(data, here)
    plan = packing.RowPlan(source.needs, here, seed=0)
    with pytest.raises(config.InputError, match=f"2 of 10 records cannot be used.*config.data.bad=0.1.*{path}:[47]: "):
        list(pipeline.batches(source, plan, here, 1, 0, len(plan.epoch(0)), threads))


def test_only_the_first_bad_ones_are_said():
    said = []
    bad = Bad("name", 100, 0.07, said.append)
    for i in [*range(7), *range(7)]:
        bad.skip(f"file:{i}", "why")
    assert said == [f"skipped file:{i}: why" for i in range(SAID)] and len(bad.where) == 7
    with pytest.raises(config.InputError, match="name: 8 of 100 .* more than config.data.bad=0.07.* file:9: why. Mend"):
        bad.skip("file:9", "why")
    with pytest.raises(config.InputError):
        Bad("name", 100, 0.0, said.append).skip("a", "why")
