"""Sound in: any sound file -> mono at 16 kHz -> log-mel frames as Whisper takes them."""

import functools
import io
import math
import struct

import numpy as np
from scipy import signal, sparse

from gpt4v_jax import config
from gpt4v_jax.data import clip
from gpt4v_jax.data.transforms import BadMedium

RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples: 25 ms, 10 ms
SECONDS_LIMIT = 600.0
RATES = 1_000, 200_000  # of files, samples a second; the resampling filter grows with the rate
BLOCK = 65_536  # samples decoded at a time, of all channels together
SPEED = 100, 120  # percent, of augment: a slower voice would lose its last word where the length is planned


def decode(data: bytes, limit_seconds: float = SECONDS_LIMIT) -> np.ndarray:
    """An encoded sound, or a clip's sound track -> float32 [samples], 16 kHz, in [-1, 1], its channels averaged."""
    blocks, rate, _ = opened(data, limit_seconds)
    values = np.concatenate([np.zeros(0, np.float32), *within(blocks, rate, limit_seconds)])
    if not np.isfinite(values).all():
        raise BadMedium("NaN or infinity among the samples of the sound: write the file anew")
    values = np.clip(values, -1, 1)
    if rate != RATE:
        shared = math.gcd(rate, RATE)
        values = np.clip(signal.resample_poly(values, RATE // shared, rate // shared), -1, 1)
    return values.astype(np.float32)


def samples(data: bytes, limit_seconds: float = SECONDS_LIMIT) -> int:
    """-> len(decode(data)), from the header of WAV, FLAC and Ogg alone; other kinds are decoded and counted."""
    blocks, rate, count = opened(data, limit_seconds)
    if count is None:
        count = sum(map(len, within(blocks, rate, limit_seconds)))
    return -(-count * RATE // rate)  # what resample_poly gives: ceil(count RATE / rate)


def opened(data: bytes, limit_seconds: float):
    """-> (its blocks: an iterator over float32 [samples], mono, rate of the file, how many samples, None if unsaid)."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, its C library is not
        raise config.InputError("sound needs the package soundfile: pip install 'gpt4v_jax[media]'") from error
    if not data:
        raise BadMedium("an empty file: not a sound")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.SoundFileError:  # its own text holds a memory address
        file = None
    # An MP3 file may have no count: libsndfile guesses one and stops there, far too early where the bit rate varies.
    # A FLAC file that was written to a pipe has none, either: libsndfile says 2^63 - 1.
    if file is None or file.format in ("MP3", "MPEG") or file.frames == 2**63 - 1:
        blocks = by_av(data)
        return blocks, next(blocks), None
    check_rate(file.samplerate)
    if not file.frames:
        raise BadMedium("a sound of 0 samples")
    if file.frames > limit_seconds * file.samplerate:
        raise too_long(file.frames / file.samplerate, limit_seconds)
    if data[:4] == b"RIFF" and len(data) >= 8:
        promised = struct.unpack_from("<I", data, 4)[0] + 8
        if len(data) + 1024 < promised < 0x7FFF0000:  # libsndfile is silent; above: not known when it was written
            raise BadMedium(f"a damaged sound: {len(data)} bytes, but its header says {promised}: copy the file again")
    return by_soundfile(file), file.samplerate, file.frames


def by_soundfile(file):
    """-> blocks, float32 [samples], mono."""
    import soundfile

    left = file.frames
    try:
        while left and len(block := file.read(min(left, max(1, BLOCK // file.channels)), "float32", always_2d=True)):
            yield block.mean(axis=1)
            left -= len(block)
    except (soundfile.SoundFileError, ValueError, MemoryError):
        pass
    if left:
        raise BadMedium(f"a damaged sound: the last {left} of its {file.frames} samples cannot be decoded")


def by_av(data: bytes):
    """-> the rate of the file, then blocks, float32 [samples], mono."""
    with clip.opened(data) as container:
        import av

        streams = [s for s in container.streams.audio if s.codec_context]  # none where FFmpeg has no decoder for it
        if not streams:
            raise BadMedium("not a sound: there is no sound track in it, or of an unknown kind")
        stream = streams[0]
        check_rate(stream.rate or 0)
        stream.codec_context.thread_count = 1
        yield stream.rate
        to_float, count = av.AudioResampler(format="fltp", rate=stream.rate), 0
        try:
            for frame in container.decode(stream):
                for part in to_float.resample(frame):
                    count += part.samples
                    yield part.to_ndarray().mean(axis=0)  # [channels, samples]
        except clip.container_errors():
            raise BadMedium(f"a damaged sound: it cannot be decoded past {count / stream.rate:.1f} s") from None


def within(blocks, rate: int, limit_seconds: float):
    """The blocks, which must hold some samples and no more than the limit, whatever the header said."""
    count = 0
    for block in blocks:
        count += len(block)
        if count > limit_seconds * rate:
            raise too_long(count / rate, limit_seconds)
        yield block
    if not count:
        raise BadMedium("a sound of 0 samples")


def too_long(seconds: float, limit: float) -> BadMedium:
    return BadMedium(f"a sound of {seconds:.1f} s or more is longer than {limit:g} s: cut it")


def check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise BadMedium(f"a sound of {rate} samples a second, which must be {RATES[0]} to {RATES[1]}: resample it")


@functools.cache
def mel_filters(bins: int) -> np.ndarray:
    """-> float32 [bins, 201], read-only: triangles on the mel scale over the 201 frequencies from 0 to 8 kHz.

    Scale and norm of Slaney's Auditory Toolbox (1998), as librosa.filters.mel(sr=16000, n_fft=400) gives them: linear
    up to 1 kHz (15 mels), then logarithmic with 27 mels to each factor of 6.4; each triangle has the same area.
    """
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # Hz
    hertz = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, centre, high = (edges[i : i + bins, None] for i in range(3))
    triangles = np.maximum(0, np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)))
    filters = (triangles * 2 / (high - low)).astype(np.float32)
    filters.flags.writeable = False
    return filters


def frames_of(samples: int) -> int:
    """-> how many frames log_mel gives: one for each whole 10 ms."""
    return samples // HOP


def log_mel(samples: np.ndarray, bins: int = 80) -> np.ndarray:
    """float32 [samples] at 16 kHz -> float32 [frames, bins], frames = samples // 160, about -1 to 1.

    openai/whisper, whisper/audio.py, log_mel_spectrogram (arXiv:2212.04356), without its padding to 30 s. A sound of
    160 to 200 samples is too short to be reflected at its ends: zeros are put after it, up to 201 samples.
    """
    frames = frames_of(len(samples))
    if not frames:
        raise BadMedium(f"a sound of {len(samples)} samples is shorter than one frame of {HOP} samples (10 ms)")
    half = WINDOW // 2
    padded = np.pad(np.pad(samples, (0, max(0, half + 1 - len(samples)))), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]
    hann = signal.get_window("hann", WINDOW).astype(np.float32)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    logs = np.log10(np.maximum(_sparse_filters(bins) @ power.astype(np.float32).T, 1e-10)).T
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


@functools.cache
def _sparse_filters(bins: int) -> sparse.csr_array:
    """`mel_filters`, of which two values a frequency are not 0. A dense product would wake BLAS's threads, and these
    wait for those that train."""
    return sparse.csr_array(mel_filters(bins))


def augment(samples: np.ndarray, rng: np.random.Generator, length: int) -> np.ndarray:
    """float32 [samples] -> float32 [length] in [-1, 1], for training: another speed, loudness and some white noise.

    Speed is 1.0 to 1.2 (tempo and pitch together, Ko et al. 2015), gain -6 to 6 dB, noise 15 to 40 dB below the sound.
    The speed is only known here: what is longer than `length` is cut, what is shorter gets zeros at its end. Nothing is
    ever cut where length >= samples.
    """
    percent = int(rng.integers(SPEED[0], SPEED[1] + 1))
    values = signal.resample_poly(samples, 100, percent)[:length] * 10 ** (rng.uniform(-6, 6) / 20)
    noise = np.sqrt(np.mean(values**2)) * 10 ** (-rng.uniform(15, 40) / 20)
    values = values + noise * rng.standard_normal(len(values))
    return np.pad(np.clip(values, -1, 1), (0, length - len(values))).astype(np.float32)


def augment_mel(mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [frames, bins] -> the same shape, for training: another vocal tract, one band and one stretch masked.

    Frequencies are scaled by 0.85 to 1.15 up to a knee, whence a line leads to the last bin (Jaitly and Hinton 2013).
    Up to bins // 8 bins and up to a tenth of the frames become the mean (SpecAugment, arXiv:1904.08779).
    """
    frames, bins = mel.shape
    factor, top = rng.uniform(0.85, 1.15), bins - 1
    knee = 0.8 * top / max(factor, 1)
    source = np.interp(np.arange(bins), [0, knee, top], [0, knee * factor, top])  # the bin that each one is taken from
    low = np.minimum(source.astype(int), bins - 2)
    part = source - low
    warped = (mel[:, low] * (1 - part) + mel[:, low + 1] * part).astype(np.float32)
    mean = warped.mean()
    for view, longest in ((warped.T, bins // 8), (warped, frames // 10)):
        width = int(rng.integers(longest + 1))
        start = int(rng.integers(len(view) - width + 1))
        view[start : start + width] = mean
    return warped
