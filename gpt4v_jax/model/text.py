"""Token ids -> Segment; and the text tower of a pair of towers."""

import flax.linen as nn
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.layers import Linear, Norm, Table


class TextEmbed(nn.Module):
    """h0 = embedding of the token + (where positions are learned) embedding of the position: [B,T] -> [B,T,D]."""

    config: config.Model

    def setup(self):
        c = self.config
        self.embed = Table(c.vocab, c.backbone.width, c.init_std)
        if c.position == "learned":
            self.position = Table(c.context + c.position_offset, c.backbone.width, c.init_std)
            if c.encoder:
                longest = (c.source_context or c.context) + c.position_offset
                self.source_position = Table(longest, c.backbone.width, c.init_std)
        if c.token_types:
            self.token_type = Table(c.token_types, c.backbone.width, c.init_std)

    def __call__(self, batch: batch_lib.Batch, step) -> batch_lib.Segment:
        x = self._tokens(batch.tokens)
        if self.config.position == "learned":
            x += self.position(batch.position[..., 0] + self.config.position_offset)
        if self.config.token_types:
            x += self.token_type(batch.tokens * 0 if batch.token_type is None else batch.token_type)
        return batch_lib.Segment(x, batch.document, step, item=(batch.tokens * 0), kind=batch_lib.TEXT)

    def source(self, source: batch_lib.Source, step) -> batch_lib.Segment:
        """The second stream, from the same table of tokens. step [B,S]: from which on the stream sees it."""
        x = self._tokens(source.tokens)
        if self.config.position == "learned":
            x += self.source_position(source.position[..., 0] + self.config.position_offset)
        return batch_lib.Segment(x, source.document, step, item=(source.tokens * 0), kind=batch_lib.TEXT)

    def _tokens(self, tokens):
        x = self.embed(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def table(self):
        """-> the table of tokens [V,D]."""
        return self.embed.table


class TextTower(nn.Module):
    """Text to one vector a row: [B,T] -> [B,width], from the row's last real position (CLIP, Radford et al. 2021)."""

    config: config.Model
    width: int
    bias: bool

    @nn.compact
    def __call__(self, batch: batch_lib.Batch):
        c = self.config
        step = jnp.cumsum(batch.ar, axis=1)
        x = TextEmbed(c, name="text")(batch, step).x
        if c.embed_norm:
            x = Norm(c.backbone.norm, c.backbone.norm_eps, name="embed_norm")(x)
        if c.causal:
            sight = attention.within(batch.document, step, reach=0)
        else:
            sight = attention.bidirectional(batch.document)
        x, *_ = Backbone(c.backbone, c.position == "rope", name="backbone")(x, batch.position, sight)
        last = jnp.maximum(jnp.sum(batch.document > 0, axis=1) - 1, 0)
        pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return Linear((c.backbone.width,), (self.width,), self.bias, name="head")(pooled)
