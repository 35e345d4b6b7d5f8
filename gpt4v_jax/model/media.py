"""What the embedders of pictures, clips and sounds share: one map of patches, one encoder, one connector, one Segment.

The functions are for use in a compact method: what they make belongs to the module that calls them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.layers import ACTIVATIONS, Linear, Norm

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


def encoder(c, compute: config.Compute, inject: int = 0, last_norm: bool = True) -> Backbone:
    """The encoder up to the block whose features are taken, as the module "encoder" of who calls it; `inject` of its
    earlier blocks, evenly, are tapped."""
    depth = c.encoder.depth + 1 + c.layer
    taps = tuple(max(depth * (k + 1) // (inject + 1) - 1, 0) for k in range(inject))
    return Backbone(
        dataclasses.replace(c.encoder, depth=depth), c.position == "rope", last_norm=last_norm and c.layer == -1,
        compute=compute, taps=taps, name="encoder",
    )  # fmt: skip


def encoded(c, x_BME, media: batch_lib.Media, compute: config.Compute, inject: int = 0, keys=None):
    """Patches through c.encoder, each item by itself -> (features, those of `inject` earlier layers); without an
    encoder the patches, as often. Where c.position is "rope" queries and keys turn by (time, row, column)."""
    if not c.encoder:
        return x_BME, (x_BME,) * inject
    index = media.index if c.position == "rope" else None
    stack = encoder(c, compute, inject)
    x, *_, out = stack(x_BME, index, attention.bidirectional(media.item), keys=keys)
    return x, tuple(out[f"block_{i}"] for i in stack.taps)


def segment(model: config.Model, layout: batch_lib.Layout, kind: int, features, media, document, step):
    """(features [B,M,E], those of earlier layers) of patches -> Segment, through a connector each: a medium takes the
    document and the step of its first placeholder."""
    modality, width, c = batch_lib.MEDIA[kind - 1], model.backbone.width, model.fusion
    bare = getattr(model, modality).encoder is None and c.connector in ("linear", "pool")
    item, source = media.item, None
    if c.merges > 1:
        source = _sources(media, layout.encoded(modality), layout.box(modality))
        there = source >= 0
        item = jnp.where(there, jax.vmap(jnp.take)(item, jnp.maximum(source, 0)), 0).max(-1)
    x = _connected(c, features[0], source, width, bare, "connector")
    deep = [_connected(c, x, source, width, False, f"deep_{k}_connector") for k, x in enumerate(features[1])]
    item_at = jnp.take_along_axis(media.at, jnp.maximum(item - 1, 0), axis=1)

    def at(values):
        here = (item > 0) & (item_at >= 0)
        return jnp.where(here, jnp.take_along_axis(values, jnp.maximum(item_at, 0), axis=1), 0)

    return batch_lib.Segment(x, at(document), at(step), item, kind, tuple(deep))


def _connected(c: config.Fusion, x_BME, source_BFK, width: int, bare: bool, name: str):
    """[B,M,E] -> [B,F,D]: from an encoder's features to the stream (LLaVA's projector, Liu et al. 2023); bare: what has
    the stream's width stays as it is."""
    if source_BFK is not None:
        x_BME = _merged(x_BME, source_BFK, c.connector == "pool")
    if bare:
        return x_BME
    if c.connector == "mlp2x_gelu":
        x_BME = ACTIVATIONS["gelu"](Linear((x_BME.shape[-1],), (width,), True, name=f"{name}_up")(x_BME))
    return Linear((x_BME.shape[-1],), (width,), True, c.gain, name=name)(x_BME)


def _merged(x_BME, source_BFK, mean: bool):
    """Boxes of K patches -> [B,F,E], their mean, or [B,F,K x E], side by side (pixel shuffle, Shi et al. 2016, the
    other way round). At the edges of an odd grid what is missing is left out of the mean, and 0 in the row."""
    there = (source_BFK >= 0)[..., None]
    x = jnp.where(there, jax.vmap(lambda x, at: x[at])(x_BME, jnp.maximum(source_BFK, 0)), 0)
    return x.sum(2) / jnp.maximum(there.sum(2), 1) if mean else x.reshape(*x.shape[:2], -1)


def _sources(media: batch_lib.Media, F: int, box: tuple[int, int, int]):
    """-> [B,F,K] int32: the patches that each vector is made of, K a box; -1 where there is none."""
    K = math.prod(box)
    box = np.array(box)
    grid_BN3 = -(-media.size // box)
    count = grid_BN3.prod(-1)
    mine = jnp.maximum(media.item - 1, 0)  # [B,M]
    first = jnp.take_along_axis(jnp.cumsum(count, axis=1) - count, mine, axis=1)
    grid = jnp.take_along_axis(grid_BN3, mine[..., None], axis=1)
    (t, r, c), (dt, dr, dc) = (jnp.moveaxis(x, -1, 0) for x in (media.index // box, media.index % box))
    vector = first + (t * grid[..., 1] + r) * grid[..., 2] + c
    place = (dt * box[1] + dr) * box[2] + dc
    at = jnp.where(media.item > 0, vector * K + place, F * K)
    empty, patches = jnp.full(F * K, -1, jnp.int32), jnp.arange(media.item.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda at: empty.at[at].set(patches, mode="drop"))(at).reshape(len(at), F, K)
