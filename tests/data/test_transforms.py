"""Pictures of every kind, and files that are none."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.data import transforms

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def encoded(picture, kind="png", **options) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, size=8) -> np.ndarray:
    pixels = transforms.decode_picture(data, size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


def huge(side: int) -> bytes:
    """A PNG file of side x side pixels of which nothing but the header is there: it could not be decoded."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b"\0"), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def one_tile(side: int) -> bytes:
    """A TIFF file of 1 x 1 pixels in a tile of side x side, which a decoder would have to hold."""
    pixels = zlib.compress(bytes(side))
    tags = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 138),
            (325, len(pixels))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(8) + pixels


ADDRESS = re.compile(r"0x[0-9a-f]{6}|object at")  # which Pillow puts into its own messages
PNG = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BAD = {
    "text": (b"this is no picture", "not a picture"),
    "empty": (b"", "not a picture"),
    "PostScript, a program": (encoded(Image.new("RGB", (8, 8)), "eps"), "not a picture"),
    "truncated png": (PNG[: len(PNG) // 2], "damaged"),
    "truncated jpeg": (encoded(Image.open(io.BytesIO(PNG)), "jpeg")[:900], "damaged"),
    "header alone": (PNG[:30], "picture"),
    "not a number": (encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "tiff"), "not finite"),
    "12000 x 12000": (huge(12000), "12000x12000 is more than"),
    "20000 x 20000": (huge(20000), "20000x20000 is more than"),
    "a tile of 20000 x 20000": (one_tile(20000), "20000x20000 is more than"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(name):
    data, message = BAD[name]
    with pytest.raises(config.InputError, match=message) as error:
        transforms.decode_picture(data, 8)
    assert "\n" not in str(error.value) and not ADDRESS.search(str(error.value))


def test_a_lower_limit_of_pixels():
    assert transforms.picture_shape(PNG, 64 * 64) == (64, 64)
    for data in (PNG, encoded(Image.open(io.BytesIO(PNG)), "gif"), encoded(Image.open(io.BytesIO(PNG)), "webp")):
        with pytest.raises(transforms.BadMedium, match="64x64 is more than 4095 pixels"):
            transforms.picture_shape(data, 64 * 64 - 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFFs
def test_any_damage_is_an_input_error():
    """Bytes flipped anywhere: a picture or an InputError, nothing else."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (PNG, encoded(RGB, "jpeg", exif=exif), encoded(RGB, "gif"), encoded(RGB, "webp"), encoded(RGB, "tiff")):
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                damaged[at] = rng.integers(256)
            try:
                decoded(bytes(damaged))
            except config.InputError as error:
                assert not ADDRESS.search(str(error))


def test_an_odd_tag_of_the_exif_is_no_damage():
    """ImageWidth as text, beside an orientation: cameras and editors write such."""
    plain = encoded(RGB, "jpeg")
    entries = [(0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack("<HH", 6, 0))]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
    tiff += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    app1 = b"Exif\0\0" + tiff
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + plain[2:]
    turned = transforms.decode_rgb(data)
    assert (turned.height, turned.width) == transforms.picture_shape(data) == (8, 6)
    np.testing.assert_array_equal(turned, np.rot90(transforms.decode_rgb(plain), -1))


def whole(side: int) -> bytes:
    """A whole PNG file of side x side grey pixels: 136 KiB for 12000 x 12000, which are 412 MiB as RGB."""
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(100 * (side + 1))) for _ in range(side // 100)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_a_small_file_of_many_pixels_is_never_decoded(monkeypatch):
    data = whole(12000)
    assert len(data) < 140 * 1024
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (12000, 12000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory was asked for"))
    for function in (transforms.picture_shape, transforms.decode_rgb, lambda x: transforms.decode_picture(x, 8)):
        with pytest.raises(transforms.BadMedium, match="12000x12000 is more than 64000000 pixels"):
            function(data)


@pytest.mark.parametrize("name", ["text", "empty", "12000 x 12000"])
def test_shapes_of_bad_files(name):
    data, message = BAD[name]
    with pytest.raises(transforms.BadMedium, match=message) as error:
        transforms.picture_shape(data)
    assert not ADDRESS.search(str(error.value))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "late png"])
def test_shapes_are_those_of_the_decoded_picture(kind, orientation, monkeypatch):
    """Upright for every kind and orientation, and also where a PNG's EXIF follows its pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind.removeprefix("late "), exif=exif)
    if kind == "late png":
        at = data.index(b"eXIf") - 4
        length = 12 + struct.unpack_from(">I", data, at)[0]
        data = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    picture = transforms.decode_rgb(data)
    assert picture.mode == "RGB" and (picture.height, picture.width) == ((6, 8) if orientation < 5 else (8, 6))
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("decoded"))
    assert transforms.picture_shape(data) == (picture.height, picture.width)


def test_decode_picture_is_decode_rgb_resized():
    data = encoded(RGB, "jpeg")
    np.testing.assert_array_equal(
        decoded(data, 5), transforms.decode_rgb(data).resize((5, 5), Image.Resampling.BICUBIC)
    )


def test_crop_resize():
    picture = Image.fromarray(RGB)  # 6 rows, 8 columns
    np.testing.assert_array_equal(transforms.crop_resize(picture, (2, 1, 5, 6), 5, 3), RGB[1:6, 2:5])
    enlarged = transforms.crop_resize(picture, (2, 1, 5, 6), 10, 9)
    np.testing.assert_array_equal(
        enlarged, picture.resize((9, 10), Image.Resampling.BICUBIC, box=(2, 1, 5, 6)), strict=True
    )


@pytest.mark.parametrize("width, height, box", [
    (40, 20, (0, 4, 16, 12)), (20, 40, (4, 0, 12, 16)), (20, 20, (0, 0, 16, 16)), (900, 1, (0, 7, 16, 8)),
])  # fmt: skip
def test_letterbox(width, height, box):
    """Aspect kept, in the middle; all else is grey."""
    pixels = transforms.letterbox(Image.new("RGB", (width, height), (250, 10, 20)), 16)
    left, top, right, bottom = box
    expected = np.full((16, 16, 3), 128, np.uint8)
    expected[top:bottom, left:right] = (250, 10, 20)
    np.testing.assert_array_equal(pixels, expected, strict=True)


def test_patchify_goes_row_by_row():
    with_rest = np.pad(RGB, [(0, 1), (0, 1), (0, 0)])  # what makes no whole patch is left out
    patches = transforms.patchify(with_rest, 2)  # 3 rows of 4 patches
    assert patches.shape == (12, 12) and patches.dtype == np.uint8
    for number, patch in enumerate(patches):
        row, column = divmod(number, 4)
        np.testing.assert_array_equal(patch.reshape(2, 2, 3), RGB[2 * row :, 2 * column :][:2, :2])


def test_tubelets_go_by_time_then_rows():
    frames = np.random.default_rng(1).integers(0, 256, (6, 4, 6, 3), np.uint8)
    values = transforms.tubelets(frames, 2, 3)
    assert values.shape == (2 * 2 * 3, 3 * 2 * 2 * 3) and values.dtype == np.uint8
    for number, tubelet in enumerate(values):
        time, row, column = number // 6, number // 3 % 2, number % 3
        block = frames[3 * time :, 2 * row :, 2 * column :][:3, :2, :2]
        np.testing.assert_array_equal(tubelet.reshape(3, 2, 2, 3), block)
    with pytest.raises(ValueError):
        transforms.tubelets(frames, 2, 4)


def test_plain_rgb_is_resized_only():
    square = RGB[:, :6]
    np.testing.assert_array_equal(decoded(encoded(square), 6), square)
    np.testing.assert_array_equal(
        decoded(encoded(RGB), 4), Image.fromarray(RGB).resize((4, 4), Image.Resampling.BICUBIC)
    )


def test_one_pixel():
    np.testing.assert_array_equal(decoded(encoded(np.full((1, 1, 3), 77, np.uint8))), 77)


def test_16_bit_grey_keeps_its_range():
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = decoded(encoded(grey))
    np.testing.assert_allclose(pixels, np.repeat(grey[..., None] / 257, 3, axis=2), atol=1)


def test_cmyk_jpeg():
    orange = Image.new("RGB", (8, 8), (250, 120, 10)).convert("CMYK")
    np.testing.assert_allclose(decoded(encoded(orange, "jpeg", quality=95))[4, 4], (250, 120, 10), atol=12)


def test_palette_with_transparency_lies_on_white():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 30, 40])
    picture.paste(0, (0, 0, 4, 8))
    pixels = decoded(encoded(picture, transparency=0))
    np.testing.assert_array_equal(pixels[:, :4], 255)
    np.testing.assert_array_equal(pixels[:, 4:], np.broadcast_to((200, 30, 40), (8, 4, 3)))


@pytest.mark.parametrize("mode, value, expected", [
    ("1", 1, 255), ("L", 90, 90), ("LA", (90, 0), 255), ("RGBA", (10, 20, 30, 0), 255),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("I;16", 257 * 60, 60),
])  # fmt: skip
def test_modes(mode, value, expected):
    pixels = decoded(encoded(Image.new(mode, (4, 4), value)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(expected), pixels.shape))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_rotated_pixels(orientation):
    """What a camera writes for each orientation, worked out by hand: shown upright, all are the same picture."""
    stored = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1),
              6: np.rot90(RGB, 1), 7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = encoded(np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decoded(rotated), decoded(encoded(RGB)))
    if orientation > 1:
        assert (decoded(rotated) != decoded(encoded(np.ascontiguousarray(stored)))).any()
