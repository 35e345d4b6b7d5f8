"""How the server gets the bytes of media that clients name: data: URIs, base64 and https, all of it within limits.

Nothing else is read: no path, no other scheme. `Guard.check` then says whether they can be decoded within limits.
"""

import asyncio
import binascii
import concurrent.futures
import dataclasses
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import clip, sound, transforms
from gpt4v_jax.serve import fetch

TYPES = {"image": ("image/",), "video": ("video/", "image/gif"), "audio": ("audio/",)}  # of data: URIs
DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+){0,8};base64,", re.ASCII | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one medium each. hosts: whose https URLs are fetched: exact names, "*.example.org" for all names below one,
    () for none, ("*",) for every public one."""

    hosts: tuple[str, ...] = ()
    bytes: int = 20 * 2**20
    seconds: float = 10.0  # of a whole download: redirects and waiting for one's turn are included
    redirects: int = 3
    downloads: int = 8  # at a time
    pixels: int = 16_000_000  # of a picture
    frames: int = 3600  # of a clip: two minutes at 30 a second
    frame_pixels: int = 9_000_000  # of one frame: 4096x2160 fit
    clip_pixels: int = 2_000_000_000  # of all frames, as all are decoded to find some
    clip_bytes: int = 2**28  # of RGB that the model's frames of a clip take
    packets: int = 1_000_000  # that a container's tables may promise
    audio_seconds: float = 600.0  # where the model's own limit is not less

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hosts"}
        config.at_least(0, **{name: sizes.pop(name) for name in ("redirects", "seconds", "audio_seconds")})
        config.at_least(1, **sizes)
        object.__setattr__(self, "hosts", tuple(map(_pattern, self.hosts)))


class Guard:
    """Thread-safe. What tests put in: resolve(host) -> its addresses; connect(address, seconds) -> a socket to port
    443 of it; ssl_context: whose certificates are believed."""

    def __init__(
        self, limits: Limits, resolve: Callable[[str], Sequence[str]] | None = None,
        ssl_context: ssl.SSLContext | None = None, connect: Callable[[str, float], socket.socket] | None = None,
    ):  # fmt: skip
        self.limits = limits
        self._fetch = fetch.Fetch(
            limits.hosts, limits.bytes, limits.seconds, limits.redirects, resolve or fetch.addresses,
            connect or fetch.connected, ssl_context or ssl.create_default_context(),
        )  # fmt: skip
        self._pool = concurrent.futures.ThreadPoolExecutor(limits.downloads, "download")

    async def read(self, modality: str, url: str) -> bytes:
        """A data: URI or an https URL -> the bytes. Raises InputError."""
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(self.decode, modality, url)
        deadline = time.monotonic() + self.limits.seconds
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._fetch.download, url, deadline)
        try:
            return await asyncio.wait_for(work, self.limits.seconds)
        except TimeoutError:  # the resolver's own wait cannot be cut: its thread ends later, and is one of `downloads`
            problem = f"it took longer than {self.limits.seconds:g} s: {fetch.INSTEAD}"
        except config.InputError as error:
            problem = str(error)
        raise config.InputError(f"{modality} {_shown(url)}: {problem}") from None

    def decode(self, modality: str, text: str) -> bytes:
        """base64, bare or in a data: URI of the modality's type -> the bytes. Raises InputError.

        The alphabet of RFC 4648, section 4, with its padding, and nothing between its characters.
        """
        start = 0
        if text[:5].lower() == "data:":
            head = DATA.match(text[:512])
            if not head:
                raise config.InputError(f"{modality}: a data: URI must look like data:TYPE;base64,... with a TYPE "
                                        f"of {TYPES[modality][0]}*")  # fmt: skip
            if not head[1].lower().startswith(TYPES[modality]):
                types = " or ".join(t + "*" * t.endswith("/") for t in TYPES[modality])
                raise config.InputError(f"{modality}: a data: URI of type {head[1][:40]}, which must be {types}")
            start = head.end()
        if (len(text) - start) // 4 * 3 > self.limits.bytes + 2:  # before any is decoded
            raise config.InputError(f"{modality}: {fetch.too_large(self.limits.bytes)}")
        try:
            if (len(text) - start) % 4:  # strict_mode takes "AAAA="
                raise ValueError
            data = binascii.a2b_base64(text[start:], strict_mode=True)
        except ValueError:  # binascii.Error; or letters outside of ASCII
            raise config.InputError(f"{modality}: damaged base64: only A-Z a-z 0-9 + / and = to fill the last four, "
                                    "not the URL-safe alphabet, no spaces and no line breaks") from None  # fmt: skip
        if not data:
            raise config.InputError(f"{modality}: no bytes: send the content of a file")
        if len(data) > self.limits.bytes:
            raise config.InputError(f"{modality}: {fetch.too_large(self.limits.bytes)}")
        return data

    def check(self, modality: str, data: bytes, layout: batch_lib.Layout) -> None:
        """Refuses what would take too much memory or time when data/media.py decodes it. Raises InputError.

        Of a picture the header is read; of a clip the packets are counted and one frame is decoded; of a sound the
        header is read or, where it says nothing, the sound is decoded, piece by piece and not beyond the limit.
        """
        limits = self.limits
        if not layout.reads(modality):
            raise config.InputError(f"this model reads no {modality}: leave it out")
        if modality == "image":
            transforms.picture_shape(data, limits.pixels)
            return
        if clip.promised(data) > limits.packets:
            raise config.InputError(f"{modality}: its tables say over {limits.packets} packets: encode it anew")
        if modality == "audio":
            sound.samples(data, min(limits.audio_seconds, layout.audio.seconds))
            return
        said = clip.probe(data, limits.frames, limits.frame_pixels)
        pixels, size = said.height * said.width, f"frames of {said.width}x{said.height}"
        if said.frames * pixels > limits.clip_pixels:
            raise config.InputError(f"{said.frames} {size} are more than {limits.clip_pixels} pixels: make the clip "
                                    "shorter or smaller")  # fmt: skip
        planned = clip.planned(said, layout.video.frames, layout.video.rate)
        if planned * pixels * 3 > limits.clip_bytes:
            raise config.InputError(f"{planned} {size} are more than {limits.clip_bytes} bytes: make the clip smaller")

    def close(self) -> None:
        """Downloads that wait are given up, those that run end within their time."""
        self._pool.shutdown(wait=False, cancel_futures=True)

def _pattern(host: str) -> str:
    """One of Limits.hosts, in the spelling of `hostname`."""
    below = host[:2] == "*."
    try:
        return host if host == "*" else "*." * below + fetch.hostname(host[2:] if below else host)
    except config.InputError:
        raise config.InputError(f"hosts={host!r}: write a name such as example.org, *.example.org, or * for all public "
                                "ones") from None  # fmt: skip


def _shown(url: str) -> str:
    """-> a URL without what may be secret in it, such as a signature."""
    plain = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    plain = re.sub(r"//[^/]*@", "//", plain)
    return repr(plain if len(plain) <= 80 else plain[:77] + "...")
