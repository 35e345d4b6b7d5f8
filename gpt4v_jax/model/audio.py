"""Packed log-mel frames -> Segment."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import media as media_lib
from gpt4v_jax.model.layers import ACTIVATIONS, Linear

KIND = 1 + batch_lib.MEDIA.index("audio")
LONGEST = 10_000.0  # wavelength of the slowest sinusoid / 2 pi, in patches (Vaswani et al. 2017)


class AudioEmbed(nn.Module):
    """Media [B,M,...] -> Segment [B,M,D]. A patch is `patch` frames of `bins` values."""

    config: config.Model
    layout: batch_lib.Layout
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, media: batch_lib.Media, document, step, keys=None) -> batch_lib.Segment:
        c, stream = self.config.audio, self.config.backbone.width
        width = c.encoder.width if c.encoder else stream
        if c.front == "conv":
            x = Convolutions(c, width, name="front")(media.patch, media.item)
        else:
            x = media_lib.content(media.patch, width, c.patch_norm)
        if c.position == "sinusoid":
            x += sinusoids(media.index[..., 0], width).astype(x.dtype)
        features = media_lib.encoded(c, x, media, self.compute, self.config.fusion.inject, keys)
        return media_lib.segment(self.config, self.layout, KIND, features, media, document, step)


class Convolutions(nn.Module):
    """Two convolutions with GELU: over 3 frames, then over patch + 1 frames with stride `patch` (Radford et al. 2022,
    sec. 2.2, where patch is 2). Each item by itself: beyond its ends there are zeros."""

    config: config.Audio
    width: int

    @nn.compact
    def __call__(self, patch_BMp, item_BM):
        c, (B, M) = self.config, item_BM.shape
        item = jnp.repeat(item_BM, c.patch, axis=1)  # of every frame
        x = patch_BMp.reshape(B, M * c.patch, c.bins)
        near = jnp.concatenate([_shifted(x, item, 1), x, _shifted(x, item, -1)], axis=-1)
        gelu = ACTIVATIONS["gelu"]
        x = gelu(Linear((3 * c.bins,), (self.width,), True, name="first")(near))
        # Window u holds the frames patch u - 1, ..., patch u + patch - 1: the last frame of the patch before, and u's.
        x = jnp.concatenate(
            [_shifted(x, item, 1)[:, :: c.patch], x.reshape(B, M, c.patch * self.width)], axis=-1
        )
        return gelu(Linear(((c.patch + 1) * self.width,), (self.width,), True, name="second")(x))


def _shifted(x_BSD, item_BS, by: int):
    """-> at every frame the one `by` before it (after it, where negative); zeros where that is of another item."""
    moved, other = (jnp.roll(a, by, axis=1) for a in (x_BSD, item_BS))
    place = jnp.arange(item_BS.shape[1])
    inside = (place >= by) & (place < item_BS.shape[1] + by)
    return jnp.where((inside & (other == item_BS))[..., None], moved, 0)


def sinusoids(time, width: int):
    """[...] int32 -> [..., width] float32: sines, then cosines, of wavelengths 2 pi to 2 pi LONGEST, as Whisper's."""
    half = width // 2
    rate = np.exp(-math.log(LONGEST) / max(half - 1, 1) * np.arange(half)).astype(np.float32)
    angle = time[..., None].astype(jnp.float32) * rate
    return jnp.pad(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1), [(0, 0)] * time.ndim + [(0, width % 2)])
