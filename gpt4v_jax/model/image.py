"""Packed picture patches -> Segment; and the ViT classifier, which is the same embedder with a head."""

import flax.linen as nn
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.layers import Linear, Norm, Table

PATCH_NORM_EPS = 1e-2  # of the variance of values in [-1, 1]: an empty patch stays empty, its noise is not blown up


class PatchEmbed(nn.Module):
    """Patches [B,M,p] uint8 at index [B,M,3] -> [B,M,D]: one linear map (Dosovitskiy et al. 2020) + position;
    with patch_norm a LayerNorm on both sides of the map (Kumar et al. 2023)."""

    config: config.Image
    width: int

    @nn.compact
    def __call__(self, patch_BMp, index_BM3):
        c = self.config
        x = patch_BMp.astype(jnp.float32) / 127.5 - 1
        if c.patch_norm:
            x = Norm("layer", PATCH_NORM_EPS, name="patch_norm")(x)
        values = c.patch**2 * 3
        x = Linear((values,), (self.width,), True, name="embed")(x)
        if c.patch_norm:  # without it training makes the content ten times as large, and a patch's place is lost in it
            x = Norm("layer", PATCH_NORM_EPS, name="content_norm")(x)
        if c.position == "learned":
            # Nearly as large as what patches show: at 0.02 a patch's place is lost beside that for an epoch.
            table = Table(c.grid**2, self.width, 0.5, name="position")
            x += table(index_BM3[..., 1] * c.grid + index_BM3[..., 2])
        return x


class ImageEmbed(nn.Module):
    """Media [B,M,...] -> Segment [B,M,D]; through a bidirectional encoder within each picture, where there is one."""

    config: config.Model

    @nn.compact
    def __call__(self, media: batch_lib.Media, document, step) -> batch_lib.Segment:
        c, width = self.config.image, self.config.backbone.width
        encoder = c.encoder
        x = _patches(c, encoder.width if encoder else width)(media.patch, media.index)
        if encoder:
            sight = _within(media.item)
            x, _, _ = Backbone(encoder, rotary=False, name="encoder")(x, None, sight)
            x = Linear((encoder.width,), (width,), True, name="connector")(x)
        # A medium takes the document and the step of its first placeholder.
        item_at = jnp.take_along_axis(media.at, jnp.maximum(media.item - 1, 0), axis=1)

        def at(values):
            return jnp.where(media.item > 0, jnp.take_along_axis(values, jnp.maximum(item_at, 0), axis=1), 0)

        return batch_lib.Segment(x, at(document), at(step), media.item, kind=batch_lib.IMAGE)


class ImageClassifier(nn.Module):
    """ViT with a class token (Dosovitskiy et al. 2020): one picture a row, [B,M,p] -> logits [B,classes]."""

    config: config.Image

    @nn.compact
    def __call__(self, patch_BMp, index_BM3):
        c, width = self.config, self.config.encoder.width
        x = _patches(c, width)(patch_BMp, index_BM3)
        # Row 0 of the table is the token, row 1 its position: pictures have grid^2 positions of their own.
        token = Table(2, width, name="class_token")(jnp.arange(2)).sum(0)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, width)), x], axis=1)
        x, _, _ = Backbone(c.encoder, rotary=False, name="encoder")(
            x, None, _within(jnp.ones(x.shape[:2], jnp.int32))
        )
        return Linear((width,), (c.classes,), True, name="head")(x[:, 0])


def _patches(c: config.Image, width: int) -> PatchEmbed:
    return PatchEmbed(c, width, name="image")


def _within(item_BM) -> attention.Sight:
    """Bidirectional attention within each item: the mask law with the item as document, and one step."""
    step = jnp.zeros_like(item_BM)
    return attention.Sight(item_BM, step, item_BM, step, reach=item_BM.shape[1])
