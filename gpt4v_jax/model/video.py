"""Packed patches of clips -> Segment."""

import flax.linen as nn

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import media as media_lib
from gpt4v_jax.model.layers import Table

KIND = 1 + batch_lib.MEDIA.index("video")


class VideoEmbed(nn.Module):
    """Media [B,M,...] -> Segment [B,M,D]. A patch spans `tubelet` frames (ViViT, Arnab et al. 2021); where it lies and
    when are two tables, which are added."""

    config: config.Model
    layout: batch_lib.Layout
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, media: batch_lib.Media, document, step, keys=None) -> batch_lib.Segment:
        c, stream = self.config.video, self.config.backbone.width
        width = c.encoder.width if c.encoder else stream
        x = media_lib.content(media_lib.pixels(c, media.patch), width, c.patch_norm, c.patch_bias)
        if c.position == "learned":
            time, row, column = (media.index[..., axis] for axis in range(3))
            x += Table(c.grid**2, width, 0.5, name="position")(row * c.grid + column)
            x += Table(-(-c.frames // c.tubelet), width, 0.5, name="time")(time)
        features = media_lib.encoded(c, x, media, self.compute, self.config.fusion.inject, keys)
        return media_lib.segment(self.config, self.layout, KIND, features, media, document, step)
