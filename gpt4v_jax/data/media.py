"""A file's bytes -> the patches of its views, as Layout.views has counted them before anything was decoded."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.data import clip, sound, transforms

SILENCE = -1.5  # what sound.log_mel makes of a sound of zeros
GREY = 128
LOUD = 1.0  # of log-mel: 40 dB; frames so far below the loudest are pauses
SHIFT = 1 / 14  # of a side, at most, that `shift` moves a picture (two pixels of MNIST's 28)


def shape(modality: str, read: Callable[[], bytes], layout: batch_lib.Layout) -> tuple[int, ...]:
    """-> Layout.views' shape of a medium, without decoding all of it. read: its file, which a picture that is made
    square is not asked for. Raises BadMedium."""
    if modality == "image":
        c = layout.image
        return transforms.picture_shape(read()) if c.resize == "native" or c.tiles else ()
    if modality == "video":
        return (clip.planned(clip.probe(read()), layout.video.frames, layout.video.rate),)
    frames, longest = sound.frames_of(sound.samples(read())), round(layout.audio.seconds * 100)
    if not frames:
        raise transforms.BadMedium("a sound shorter than one frame of 10 ms")
    if frames > longest:  # it is not bad, but too large for any row: left out of training, wrong in evaluation
        frames = max(frames, (layout.budget("audio")[1] + 1) * layout.audio.patch)
    return (frames,)


def patches(
    modality: str, data: bytes, shape: tuple[int, ...], layout: batch_lib.Layout, blank: bool = False,
    augment: tuple[str, ...] = (), rng: np.random.Generator | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """-> of each view (values [m,p], index [m,3]). blank: grey, or silence. rng: for what `augment` names, None in
    evaluation. Raises BadMedium."""
    augment = augment if rng is not None else ()
    views = layout.views(modality, shape)
    p, dtype = layout.values(modality)
    if blank:
        value = GREY if modality != "audio" else 0 if layout.audio.center else SILENCE
        values = [np.full((len(view), p), value, dtype) for view in views]
    elif modality == "audio":
        values = [_sound(data, shape[0], layout, augment, rng)]
    elif modality == "video":
        values = [_clip(data, shape[0], layout, augment, rng)]
    else:
        values = _picture(data, views, layout, augment, rng)
    return [(value, np.indices(view.grid).reshape(3, -1).T) for value, view in zip(values, views, strict=True)]


def _picture(data: bytes, views, layout: batch_lib.Layout, augment, rng) -> list[np.ndarray]:
    c, picture, out = layout.image, transforms.decode_rgb(data), []
    flip, move = _drawn(augment, rng)
    if len(views) > 1:  # tiles move together, and change places
        picture, flip, move = Image.fromarray(_moved(np.asarray(picture)[None], flip, move)[0]), False, (0.0, 0.0)
    for view in views:
        left, top, right, bottom = view.box
        box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
        if c.resize == "pad" and len(views) == 1:
            pixels = transforms.letterbox(picture, c.size)
        elif c.resize == "native":
            pixels = transforms.crop_resize(picture, box, view.grid[1] * c.patch, view.grid[2] * c.patch)
        else:
            pixels = transforms.crop_resize(picture, box, c.size, c.size)
        pixels = _moved(pixels[None], flip, move)[0][: view.grid[1] * c.patch, : view.grid[2] * c.patch]
        out.append(transforms.patchify(pixels, c.patch))
    return out


def _clip(data: bytes, count: int, layout: batch_lib.Layout, augment, rng) -> np.ndarray:
    c = layout.video
    frames, _ = clip.decode(data, c.frames, c.rate, exactly=count)
    if frames.shape[1:3] != (c.size, c.size):
        size = (c.size, c.size)
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])
    frames = _moved(frames, *_drawn(augment, rng))[:, : c.grid * c.patch, : c.grid * c.patch]
    missing = -len(frames) % c.tubelet
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])  # the last tubelet is whole, too
    return transforms.tubelets(frames, c.patch, c.tubelet)


def _sound(data: bytes, frames: int, layout: batch_lib.Layout, augment, rng) -> np.ndarray:
    c, wave = layout.audio, sound.decode(data)
    if "voice" in augment:
        wave = sound.augment(wave, rng, len(wave))
    mel = sound.log_mel(wave, c.bins)
    if len(mel) != frames:
        raise transforms.BadMedium(f"a sound of {len(mel)} mel frames, its header says {frames}")
    if "mask" in augment:
        mel = sound.augment_mel(mel, rng)
    loud = np.flatnonzero(mel.max(axis=1) >= mel.max() - LOUD)
    mel = np.pad(mel, [(0, -frames % c.patch), (0, 0)], constant_values=mel.min())
    if c.center:
        mel -= mel[loud].mean(axis=0)
    return mel.reshape(-1, c.values)


def _drawn(augment: tuple[str, ...], rng) -> tuple[bool, tuple[float, float]]:
    flip = "flip" in augment and bool(rng.integers(2))
    move = tuple(rng.uniform(-SHIFT, SHIFT, 2)) if "shift" in augment else (0.0, 0.0)
    return flip, move


def _moved(frames: np.ndarray, flip: bool, move: tuple[float, float]) -> np.ndarray:
    """[F,H,W,3], mirrored, and moved by shares of its sides; its border goes on where it moved away from."""
    if flip:
        frames = frames[:, :, ::-1]
    for axis, share in zip((1, 2), move, strict=True):
        side = frames.shape[axis]
        by = round(share * side)
        if by:
            frames = np.take(frames, np.clip(np.arange(side) - by, 0, side - 1), axis=axis)
    return frames
