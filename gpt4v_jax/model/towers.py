"""An image tower and a text tower into one space: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023)."""

import math

import flax.linen as nn
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.model.layers import Vector
from gpt4v_jax.model.text import TextTower


class Towers(nn.Module):
    """One picture and one text a row -> unit vectors [B,width] of each, and the scores of all pairs."""

    config: config.Towers

    def setup(self):
        c = self.config
        self.image = ImageTower(c.image)
        self.text = TextTower(c.text, c.width, c.text_bias)
        self.scale = Vector(0, math.log(1 / 0.07))
        if c.logit_bias:
            self.bias = Vector(0, -10.0)

    def __call__(self, patch_BMp, index_BM3, batch: batch_lib.Batch):
        """-> (image [B,width], text [B,width], scores [B,B]: row text, column image)."""
        image, text = self.image(patch_BMp, index_BM3), self.text(batch)
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        scores = jnp.exp(self.scale()) * text @ image.T
        return image, text, scores + self.bias() if self.config.logit_bias else scores
