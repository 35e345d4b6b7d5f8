"""Packed picture patches -> Segment; and the image tower: the same encoder, pooled, with a head."""

import flax.linen as nn
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model import media as media_lib
from gpt4v_jax.model.backbone import Attention
from gpt4v_jax.model.layers import MLP, Linear, Norm, Table, Vector

KIND = 1 + batch_lib.MEDIA.index("image")


class PatchEmbed(nn.Module):
    """Patches [B,M,p] uint8 at index [B,M,3] -> [B,M,D]: what they show (media.content) + a learned position.

    With a class token, [B,C,D] of them come first; they lie on row 0 of the table of positions.
    """

    config: config.Image
    width: int

    @nn.compact
    def __call__(self, patch_BMp, index_BM3, class_tokens: int = 0):
        c = self.config
        x = media_lib.content(media_lib.pixels(c, patch_BMp), self.width, c.patch_norm, c.patch_bias)
        if c.position == "learned":
            # Nearly as large as what patches show: at 0.02 a patch's place is lost beside that for an epoch.
            table = Table(c.class_token + c.grid**2, self.width, 0.5, name="position")
            x += table(index_BM3[..., 1] * c.grid + index_BM3[..., 2] + c.class_token)
        if c.mask_token:
            Vector(self.width, name="mask_token")()
        if c.class_token:
            token = Vector(self.width, std=0.02, name="class_token")()
            token = (token + (table(0) if c.position == "learned" else 0)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], class_tokens, self.width)), x], axis=1)
        return x


def _encode(c: config.Image, patch_BMp, index_BM3, item_BM, item_BN=None, compute=config.Compute(), inject=0,  # noqa: B008, frozen
            keys=None):  # fmt: skip
    """Patches -> ([B,C+M,D], C class tokens first, those of `inject` earlier layers); each item is encoded by itself.
    For use in a compact method.

    item_BN: the items that class tokens belong to (0: none); None where there are none.
    """
    width = c.encoder.width
    x = PatchEmbed(c, width, name="image")(patch_BMp, index_BM3, 0 if item_BN is None else item_BN.shape[1])
    if c.pre_norm:
        x = Norm("layer", c.encoder.norm_eps, name="pre_norm")(x)
    item = item_BM if item_BN is None else jnp.concatenate([item_BN, item_BM], axis=1)
    index = index_BM3 if c.position == "rope" else None
    encoder = media_lib.encoder(c, compute, inject, last_norm=not c.pool_norm)
    x, *_, out = encoder(x, index, attention.bidirectional(item), keys=keys)
    return x, tuple(out[f"block_{i}"] for i in encoder.taps)


class ImageEmbed(nn.Module):
    """Media [B,M,...] -> Segment [B,M,D]; through a bidirectional encoder within each picture, where there is one."""

    config: config.Model
    layout: batch_lib.Layout
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, media: batch_lib.Media, document, step, keys=None) -> batch_lib.Segment:
        c, inject = self.config.image, self.config.fusion.inject
        if c.encoder:
            items = jnp.where(media.at >= 0, jnp.arange(1, media.at.shape[1] + 1), 0) if c.class_token else None
            x, deep = _encode(c, media.patch, media.index, media.item, items, self.compute, inject, keys)
            x, *deep = (x[:, -media.patch.shape[1] :] for x in (x, *deep))
        else:
            x = PatchEmbed(c, self.config.backbone.width, name="image")(media.patch, media.index)
            deep = [x] * inject
        return media_lib.segment(self.config, self.layout, KIND, (x, deep), media, document, step)


class ImageTower(nn.Module):
    """One picture a row, [B,M,p] at index [B,M,3] -> [B,classes]: a ViT classifier (Dosovitskiy et al. 2020), or the
    image tower of CLIP or SigLIP. Without a head the pooled vector [B,D]; unpooled all vectors, class token first."""

    config: config.Image

    @nn.compact
    def __call__(self, patch_BMp, index_BM3):
        c, width = self.config, self.config.encoder.width
        one = jnp.ones(patch_BMp.shape[:2], jnp.int32)
        x, _ = _encode(c, patch_BMp, index_BM3, one, one[:, :1] if c.class_token else None)
        if c.pool == "class":
            x = x[:, 0]
            if c.pool_norm:
                x = Norm(c.encoder.norm, c.encoder.norm_eps, name="pool_norm")(x)
        if c.pool == "map":
            x = MapPool(c.encoder, name="pool")(x)
        return Linear((width,), (c.classes,), c.head_bias, name="head")(x) if c.classes else x


class MapPool(nn.Module):
    """Multi-head attention pooling (Lee et al. 2019; Zhai et al. 2022): [B,S,D] -> [B,D], by one learned query."""

    config: config.Backbone

    @nn.compact
    def __call__(self, x_BSD):
        c = self.config
        ones = jnp.ones(x_BSD.shape[:2], jnp.int32)
        sight = attention.Sight(ones[:, :1], ones[:, :1], ones, ones, reach=x_BSD.shape[1])
        probe = jnp.broadcast_to(Vector(c.width, std=0.02, name="probe")(), (x_BSD.shape[0], 1, c.width))
        x = Attention(c, 1.0, name="attention")(probe, None, sight, memory_BSD=x_BSD)[0]
        normed = Norm(c.norm, c.norm_eps, name="norm")(x)
        return (x + MLP(c.hidden, c.activation, "mlp" in c.bias, name="mlp")(normed))[:, 0]
