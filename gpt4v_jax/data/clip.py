"""Clips in: any video file -> RGB frames and their times."""

import contextlib
import io
import re
import struct
from typing import NamedTuple

import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data.transforms import PIXEL_LIMIT, BadMedium

FRAME_LIMIT = 5000  # frames of a clip
BYTE_LIMIT = 2**31  # of RGB that one call gives
GROWTH = 4  # so many times the pixels of its header a frame may have
SMALL = 2**18  # pixels that any frame may have
BOXES = tuple(b"ftyp styp moov moof mdat free skip wide pnot uuid udta sidx prfl".split())  # that open an MP4
TABLES = re.compile(b"trun|stsz|stz2|cmov")  # cmov: a header that is compressed, 1000 to 1 if need be
FORMATS = (  # FFmpeg's names of the kinds of file that are read
    "matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,av1,flv,asf,gif,apng,mxf,dv,ogg,wav,w64,mp3,flac,aac,"
    "ac3,eac3,amr,amrnb,amrwb,aiff,au,caf,ape,wv,tta,mpc,mpc8"
)


class Probe(NamedTuple):
    """What a clip's packets say of it, before it is decoded. A damaged clip has fewer frames than that."""

    frames: int
    seconds: float
    height: int  # in pixels, upright
    width: int


def probe(data: bytes, limit: int = FRAME_LIMIT, pixels: int = PIXEL_LIMIT) -> Probe:
    """An encoded clip of at most `limit` frames of at most so many `pixels` -> Probe.

    Packets are counted, as a header's count may lie or be absent; one frame is decoded. The one frame says what no
    header does for certain: that it can be decoded, its size, and which way is up.
    """
    with opened(data, pixels) as container:
        stream, frames, first = moving(container, pixels), 0, None
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(pixels)}
        try:
            for packet in container.demux(stream):
                frames += packet.size > 0  # the last one is empty: it only says that there are no more
                if frames > limit:  # now, for a small file may have a great many
                    raise BadMedium(f"more than {limit} frames: cut the clip")
                if first is None:
                    first = next(iter(packet.decode()), None)
        except container_errors():
            pass  # what follows cannot be read by decode, either
        if first is None:
            raise BadMedium(f"a damaged or empty clip: not one frame of at most {pixels} pixels can be decoded")
        height, width = turned(first).shape[:2]
        if stream.duration:
            seconds = stream.duration * stream.time_base
        elif container.duration:
            seconds = container.duration / 1e6  # FFmpeg's unit
        else:
            seconds = frames / (stream.guessed_rate or 25)
    return Probe(frames, float(seconds), height, width)


def planned(probe: Probe, count: int = 0, rate: float = 0.0) -> int:
    """-> how many frames decode(data, count, rate) is asked to give, as far as the clip has them."""
    frames = probe.frames
    if rate:
        frames = min(frames, max(1, round(rate * probe.seconds)))
    return min(frames, count) if count else frames


def decode(
    data: bytes, count: int = 0, rate: float = 0.0, limit: int = FRAME_LIMIT, exactly: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """An encoded clip -> (uint8 [F, H, W, 3] RGB, upright, in order of presentation; float32 [F] seconds from start).

    `count` frames, `rate` frames a second, at most `count` of them where both are given, every frame where neither is:
    always evenly over the clip, the middle one of each of F equal parts by number of frames. A clip that has fewer
    gives all it has, one damaged in the middle those before the damage. `exactly`, where it is given, takes the place
    of both and holds: a clip that has fewer repeats its last one, so that a plan made from `probe` can be kept.
    Pixels are taken as square.
    """
    said = probe(data, limit)
    found = said.frames
    while True:  # again, with what there is, where that is not what there was said to be
        wanted = min(exactly, found) if exactly else planned(said._replace(frames=found), count, rate)
        given = max(wanted, exactly)
        if given * said.height * said.width * 3 > BYTE_LIMIT:
            raise BadMedium(f"{given} frames of {said.width}x{said.height} are more than {BYTE_LIMIT} bytes")
        frames, times, start, total = pick(data, evenly(found, wanted), limit)
        if total == found:
            break
        found = total
    times = np.sort(times) - start  # decoders keep the order of presentation, AVI's times do not
    last = np.minimum(np.arange(max(exactly, len(frames))), len(frames) - 1)
    return (frames if len(last) == len(frames) else frames[last]), times[last].astype(np.float32)


def evenly(found: int, wanted: int) -> np.ndarray:
    """-> int [wanted]: the middle of each of `wanted` equal parts of range(found)."""
    return (2 * np.arange(wanted) + 1) * found // (2 * wanted)


def pick(data: bytes, numbers: np.ndarray, limit: int = FRAME_LIMIT) -> tuple[np.ndarray, np.ndarray, float, int]:
    """-> (frames of those numbers, as far as they are there, their seconds, the first second, how many in all)."""
    frames, times, start, total, chosen = [], [], 0.0, 0, set(numbers.tolist())
    with opened(data) as container:
        stream = moving(container)
        for number, frame in enumerate(decoded(container, stream)):
            if number >= limit:
                raise BadMedium(f"more than {limit} frames: cut the clip")
            total = number + 1
            seconds = number / float(stream.guessed_rate or 25) if frame.time is None else frame.time
            start = seconds if number == 0 else min(start, seconds)
            if number in chosen:
                size = frames[0].shape if frames else None  # one that changes on the way is brought to the first
                frames.append(turned(frame, size))
                times.append(seconds)
    if not total:
        raise BadMedium("a damaged or empty clip: not one frame of it can be decoded")
    return np.stack(frames) if frames else np.empty(0), np.array(times), start, total


def turned(frame, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A decoded frame -> uint8 [height, width, 3], RGB, upright; of `shape` where one is given."""
    turns = round(frame.rotation / 90)  # degrees counter-clockwise, as np.rot90 counts
    height, width = (shape[1::-1] if turns % 2 else shape[:2]) if shape else (frame.height, frame.width)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), turns))


def decoded(container, stream):
    """-> the frames of a stream, in order of presentation, up to its end or to where it is damaged."""
    stream.codec_context.thread_count = 1  # the data pipeline has its own threads
    pixels = min(PIXEL_LIMIT, max(SMALL, GROWTH * stream.width * stream.height))  # larger ones are damage
    stream.codec_context.options = {"max_pixels": str(pixels)}
    with contextlib.suppress(*container_errors()):
        yield from container.decode(stream)


def moving(container, pixels: int = PIXEL_LIMIT):
    """-> the first video stream that is not the cover of an album. Refuses frames of too many pixels."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
    if not streams:  # codec_context: none where FFmpeg has no decoder for it
        raise BadMedium("not a clip: there is no video stream in it, or of an unknown kind")
    width, height = streams[0].width, streams[0].height
    if width * height > pixels:
        raise BadMedium(f"frames of {width}x{height} are more than {pixels} pixels: make the clip smaller")
    return streams[0]


def container_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on damaged files."""
    import av

    return av.FFmpegError, ValueError, OverflowError


def promised(data: bytes) -> int:
    """-> how many packets the tables of an MP4 or QuickTime file promise, 0 for others.

    FFmpeg makes an index of them when it opens the file, 35 bytes each, and a table promises up to 2^32 in 20 bytes.
    Tables are looked for at any depth of the boxes, in `mdat` only where an index of fragments may lead there.
    """
    if data[4:8] not in BOXES:
        return 0
    at, count, anywhere = 0, 0, re.search(b"sidx|tfra", data)
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1:  # it is in the next 8 bytes
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        end = min(at + size, len(data)) if size >= 8 else len(data)
        if name != b"mdat" or anywhere:
            count += sum(_count(data, found) for found in TABLES.finditer(data, at, end))
        at = end
    return count


def _count(data: bytes, found: re.Match) -> int:
    size = int.from_bytes(data[found.start() - 4 : found.start()], "big")
    if size > 1 and not 8 <= size <= len(data):
        return 0  # these four letters are something else
    if found[0] == b"cmov":
        return 2**32
    at = found.end() + (8 if size == 1 else 0) + (4 if found[0] == b"trun" else 8)  # version and flags, size of samples
    return int.from_bytes(data[at : at + 4], "big")


@contextlib.contextmanager
def opened(data: bytes, pixels: int = PIXEL_LIMIT):
    """An encoded clip or sound -> PyAV's container."""
    try:
        import av
    except ImportError as error:
        raise config.InputError("clips and sound need the package av: pip install 'gpt4v_jax[media]'") from error
    if not data:
        raise BadMedium("an empty file: neither a clip nor a sound")
    if promised(data) > len(data):
        raise BadMedium(f"a damaged clip or sound: {len(data)} bytes, but its header promises more packets than that")
    # max_pixels: a picture, which is a clip to FFmpeg, would else be decoded to see what is in it, however large.
    # protocol_whitelist: a playlist in the data (ffconcat, HLS) must not open other files of this machine.
    # format_whitelist: of FFmpeg's 300 kinds of file most are read by nobody.
    formats = FORMATS + ",mov" * (data[4:8] in BOXES)  # else `promised` would not know it
    options = {"max_pixels": str(pixels), "protocol_whitelist": "none", "format_whitelist": formats}
    try:
        container = av.open(io.BytesIO(data), options=options, metadata_errors="ignore")
    except container_errors():  # their text says <none> or names a file of the machine
        raise BadMedium("not a clip or sound that FFmpeg can read, or its header is damaged") from None
    with container:
        yield container
