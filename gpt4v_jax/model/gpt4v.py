"""GPT4V: embed -> fuse -> backbone -> head. The page to read first.

    model = GPT4V(config.model, layout)
    params = model.init(key, batch)["params"]
    hidden, cache, out = model.apply({"params": params}, batch)      # [B,T,D]
    logits = model.apply({"params": params}, hidden, method="logits")  # [B,T,V]

Only the "params" collection exists; the cache and the random key are arguments and results, and intermediates are
returned in `out` when `capture` asks for them.
"""

import flax.linen as nn
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention, fusion
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.image import ImageEmbed
from gpt4v_jax.model.layers import Linear, Norm
from gpt4v_jax.model.text import TextEmbed
from gpt4v_jax.sharding import shard


class GPT4V(nn.Module):
    config: config.Model
    layout: batch_lib.Layout

    def setup(self):
        c = self.config
        self.text = TextEmbed(c)
        if c.image.size:
            self.image = ImageEmbed(c)
        self.backbone = Backbone(c.backbone, rotary=c.position == "rope")
        if c.embed_norm:
            self.embed_norm = Norm(c.backbone.norm, c.backbone.norm_eps)
        if not c.tied:
            self.head = Linear((c.backbone.width,), (c.vocab,), gain=c.init_std * c.backbone.width**0.5)

    def __call__(self, batch: batch_lib.Batch, cache=None, key=None, capture: bool = False):
        """-> (hidden [B,T,D], cache, out).

        cache: an attention.Cache that this batch's positions are appended to; None: the batch is whole.
        key: a jax.random key for dropout; None: no dropout. capture: q (after rope) and k of every layer into `out`.
        """
        if cache is None:
            step, cursor = jnp.cumsum(batch.ar, axis=1), None
            sight = attention.Sight(batch.document, step, batch.document, step, reach=self.layout.reach)
        else:
            cursor = cache.cursor
            step, cache = attention.extend(cache, batch)
            sight = attention.Sight(batch.document, step, cache.document, cache.step, cursor=cursor)

        segments = [self.text(batch, step)]
        if batch.image is not None:
            segments.append(self.image(batch.image, batch.document, step))
            features, budget = segments[-1].x.shape[1], self.layout.patch_budget
            if features != budget and cache is None:  # a gather beyond the end would clamp silently
                raise ValueError(f"the image embedder made {features} features a row, the layout lays {budget} slots")
        fused = fusion.KINDS[self.config.fusion.kind](segments, batch.slot)

        x = shard(self.embed_norm(fused.stream) if self.config.embed_norm else fused.stream, "batch")
        hidden, kvs, out = self.backbone(x, batch.position[..., 0], sight, cache, key, capture)
        if cache is not None:
            k, v = zip(*kvs, strict=True)
            cache = cache.replace(k=k, v=v)
        if self.is_initializing():
            self.logits(hidden)
        return hidden, cache, out

    def logits(self, hidden):
        """Hidden states [...,D] -> logits [...,V] in float32."""
        return (self.text.attend(hidden) if self.config.tied else self.head(hidden)).astype(jnp.float32)
