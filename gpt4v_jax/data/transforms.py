"""Pixels in: any picture file -> RGB of the model's size."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gpt4v_jax import config

PIXEL_LIMIT = 64_000_000  # more are refused before they are decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns, and at twice its size hides behind another error


def load_picture(path: str | os.PathLike, size: int) -> np.ndarray:
    """A picture file -> uint8 [size, size, 3]. Raises InputError, naming the file, when it is none."""
    try:
        with open(path, "rb") as file:
            return decode_picture(file.read(), size)
    except OSError as error:
        raise config.InputError(f"{os.fspath(path)}: {error.strerror or 'cannot be read'}") from error
    except config.InputError as error:
        raise config.InputError(f"{os.fspath(path)}: {error}") from error


def decode_picture(data: bytes, size: int) -> np.ndarray:
    """An encoded picture -> uint8 [size, size, 3]: upright (EXIF), 8 bits, on white where it is transparent."""
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > PIXEL_LIMIT:
            raise config.InputError(
                f"{picture.width}x{picture.height} is more than {PIXEL_LIMIT} pixels: make the picture smaller"
            )
        picture = to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:  # its own text holds a memory address
        raise config.InputError("not a picture that Pillow can read (PNG, JPEG, GIF, WebP, TIFF, BMP)") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise config.InputError("a damaged picture: it cannot be decoded to its end") from error
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. 16-bit grey is scaled by its range; Pillow alone would clip it to white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float32)
        top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1.0)
        picture = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
