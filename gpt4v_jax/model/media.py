"""What the embedders of pictures, clips and sounds share: one map of patches, one encoder, one Segment.

The functions are for use in a compact method: what they make belongs to the module that calls them.
"""

import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.layers import Linear, Norm

PATCH_NORM_EPS = 1e-2  # of the variance of values in [-1, 1]: an empty patch stays empty, its noise is not blown up


def pixels(c: config.Image | config.Video, patch_BMp):
    """Patches of uint8 RGB -> float32, less `mean` and over `std`."""
    mean, std = (np.tile(np.array(x), c.values // 3) for x in (c.mean, c.std))
    return patch_BMp.astype(jnp.float32) / (255 * std).astype(np.float32) - (mean / std).astype(np.float32)


def content(x_BMp, width: int, norm: bool, bias: bool = True):
    """[B,M,p] -> [B,M,D]: one linear map (Dosovitskiy et al. 2020); norm: a LayerNorm on both sides of it (Kumar et al.
    2023)."""
    if norm:
        x_BMp = Norm("layer", PATCH_NORM_EPS, name="patch_norm")(x_BMp)
    x = Linear((x_BMp.shape[-1],), (width,), bias, name="embed")(x_BMp)
    # Without it training makes the content ten times as large, and a patch's place is lost in it.
    return Norm("layer", PATCH_NORM_EPS, name="content_norm")(x) if norm else x


def encoded(c, x_BMD, media: batch_lib.Media, width: int, compute: config.Compute):
    """Patches through c.encoder, each item by itself, and a linear map to the stream's width; without an encoder as
    they are. Where c.position is "rope" queries and keys turn by (time, row, column)."""
    if not c.encoder:
        return x_BMD
    rotary = c.position == "rope"
    encoder = Backbone(c.encoder, rotary, compute=compute, name="encoder")
    x = encoder(x_BMD, media.index if rotary else None, attention.bidirectional(media.item))[0]
    return Linear((c.encoder.width,), (width,), True, name="connector")(x)


def segment(x_BMD, media: batch_lib.Media, document, step, kind: int) -> batch_lib.Segment:
    """Features -> Segment: a medium takes the document and the step of its first placeholder."""
    item_at = jnp.take_along_axis(media.at, jnp.maximum(media.item - 1, 0), axis=1)

    def at(values):
        return jnp.where(media.item > 0, jnp.take_along_axis(values, jnp.maximum(item_at, 0), axis=1), 0)

    return batch_lib.Segment(x_BMD, at(document), at(step), media.item, kind=kind)
