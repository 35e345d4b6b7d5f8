"""Pixels in: any picture file -> upright RGB; RGB -> patches and tubelets."""

import contextlib
import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

from gpt4v_jax import config

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")  # Pillow's others start programs, or are read by nobody
PIXEL_LIMIT = 64_000_000  # more are refused before they are decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns, and at twice its size hides behind another error
ORIENTATION = 0x0112  # EXIF
TILE = 322, 323  # TIFF: width, length
Turn = Image.Transpose
UPRIGHT = {  # orientation -> what makes it 1; from 5 on a picture lies on its side
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip


class BadMedium(config.InputError):
    """A picture, sound or clip that cannot be used: not one, damaged, empty or too large. The message says which."""


def decode_picture(data: bytes, size: int) -> np.ndarray:
    """An encoded picture -> uint8 [size, size, 3]: upright (EXIF), 8 bits, on white where it is transparent."""
    return np.asarray(decode_rgb(data).resize((size, size), Image.Resampling.BICUBIC))


def decode_rgb(data: bytes) -> Image.Image:
    """An encoded picture -> RGB of its own size: upright (EXIF), 8 bits, on white where it is transparent."""
    with opened(data) as picture:
        picture.load()  # a PNG's EXIF may follow its pixels, and a TIFF turns itself upright here
        # Not ImageOps.exif_transpose, which writes all of the EXIF anew: one odd tag in it is an error there.
        turn = UPRIGHT.get(picture.getexif().get(ORIENTATION))
        return to_rgb(picture.transpose(turn) if turn is not None else picture)


def picture_shape(data: bytes, limit: int = PIXEL_LIMIT) -> tuple[int, int]:
    """An encoded picture -> (height, width) in pixels of what decode_rgb gives, from the header: nothing is decoded.
    Raises BadMedium, also for more pixels than `limit`."""
    with opened(data, limit) as picture:
        sideways = False
        if picture.format != "TIFF":  # whose size is upright as soon as it is open
            if picture.format == "PNG":  # whose EXIF may follow the pixels: Pillow would decode them to get there
                picture = Image.open(io.BytesIO(without_pixels(data)), formats=FORMATS)
            sideways = Image.Image.getexif(picture).get(ORIENTATION) in (5, 6, 7, 8)
        return (picture.width, picture.height) if sideways else (picture.height, picture.width)


@contextlib.contextmanager
def opened(data: bytes, limit: int = PIXEL_LIMIT):
    """An encoded picture -> the Pillow picture, not yet decoded. Whatever fails in the block is a BadMedium."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        sizes = [picture.size]
        if picture.format == "TIFF":  # a tile is decoded whole, however little of it is the picture
            sizes.append((picture.tag_v2.get(TILE[0], 1), picture.tag_v2.get(TILE[1], 1)))
        for width, height in sizes:
            if width * height > limit:
                raise BadMedium(f"{width}x{height} is more than {limit} pixels: make the picture smaller")
        yield picture
    except UnidentifiedImageError:  # its own text holds a memory address
        raise BadMedium("not a picture that Pillow can read (PNG, JPEG, GIF, WebP, TIFF, BMP)") from None
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:  # Pillow's, by kind of damage
        raise BadMedium("a damaged picture: it cannot be decoded to its end") from error


def without_pixels(png: bytes) -> bytes:
    """A PNG file -> the same without its pixels (IDAT chunks): what is left is header, wherever it stood."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        length, name = struct.unpack_from(">I4s", png, at)
        if name != b"IDAT":
            kept.append(png[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. 16-bit grey is scaled by its range; Pillow alone would clip it to white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float32)
        if not np.isfinite(values).all():
            raise BadMedium("a picture with values that are not finite")
        top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1.0)
        picture = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def crop_resize(picture: Image.Image, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """box = (left, top, right, bottom) in pixels of an RGB picture -> uint8 [height, width, 3], bicubic."""
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def letterbox(picture: Image.Image, size: int) -> np.ndarray:
    """An RGB picture -> uint8 [size, size, 3]: its aspect kept, centred on mid grey (128), bicubic."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = np.full((size, size, 3), 128, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = crop_resize(picture, (0, 0, *picture.size), height, width)
    return canvas


def patchify(pixels: np.ndarray, p: int) -> np.ndarray:
    """[rows p, columns p, 3] -> [rows columns, p p 3]: whole patches, row by row; values of one: row, column, RGB."""
    return tubelets(pixels[None], p, 1)


def tubelets(frames: np.ndarray, p: int, t: int) -> np.ndarray:
    """[F, rows p, columns p, 3] -> [F/t rows columns, t p p 3] (ViViT, arXiv:2103.15691, section 3.2).

    Tubelets by time, then row by row; values of one: frame, row, column, RGB. F is a multiple of t; pixels to the right
    and at the bottom that make no whole patch are left out.
    """
    rows, columns = frames.shape[1] // p, frames.shape[2] // p
    tiles = frames[:, : rows * p, : columns * p].reshape(-1, t, rows, p, columns, p, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return tiles.reshape(-1, t * p * p * 3)
