"""GPT4V: embed -> fuse -> backbone -> head. The page to read first.

    model = GPT4V(config.model, layout)
    params = model.init(key, batch)["params"]
    hidden, cache, out = model.apply({"params": params}, batch)      # [B,T,D]
    logits = model.apply({"params": params}, hidden, method="logits")  # [B,T,V]

Only the "params" collection exists; the cache and the random key are arguments and results, and intermediates are
returned in `out` when `capture` asks for them.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention, fusion
from gpt4v_jax.model.audio import AudioEmbed
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.image import ImageEmbed
from gpt4v_jax.model.layers import ACTIVATIONS, Kernel, Linear, Norm, Turned, Vector
from gpt4v_jax.model.text import TextEmbed
from gpt4v_jax.model.video import VideoEmbed
from gpt4v_jax.sharding import shard


@flax.struct.dataclass
class Head:
    """What makes logits of vectors; a loss may take it apart into pieces of the vocabulary."""

    kernel: jax.Array | Turned  # [D,V]; tied [V,D]
    bias: jax.Array | None  # [V]
    cap: float = flax.struct.field(pytree_node=False, default=0.0)
    tied: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, x):
        """[...,D] -> [...,V] float32."""
        if isinstance(self.kernel, Turned):
            x = self.kernel.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.vocab)
        else:
            kernel_DV = self.kernel.T if self.tied else self.kernel
            x = jnp.matmul(x.astype(kernel_DV.dtype), kernel_DV, preferred_element_type=jnp.float32)
        if self.bias is not None:
            x += self.bias
        return jnp.tanh(x / self.cap) * self.cap if self.cap else x

    @property
    def vocab(self) -> int:
        return jax.tree.leaves(self.kernel)[0].shape[self._axis]

    @property
    def _axis(self) -> int:
        return 0 if self.tied or isinstance(self.kernel, Turned) else 1

    def columns(self, first, count: int) -> "Head":
        """-> the head of the tokens first, ..., first + count - 1."""
        bias = None if self.bias is None else jax.lax.dynamic_slice_in_dim(self.bias, first, count)
        kernel = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, self._axis), self.kernel)
        return self.replace(kernel=kernel, bias=bias)

    def add_columns(self, first, part: "Head") -> "Head":
        """-> this head with `part` added to its columns from `first` on."""

        def add(whole, part, axis):
            old = jax.lax.dynamic_slice_in_dim(whole, first, part.shape[axis], axis)
            return jax.lax.dynamic_update_slice_in_dim(whole, old + part, first, axis)

        bias = None if self.bias is None else add(self.bias, part.bias, 0)
        return self.replace(kernel=add(self.kernel, part.kernel, self._axis), bias=bias)


class GPT4V(nn.Module):
    config: config.Model
    layout: batch_lib.Layout
    compute: config.Compute = config.Compute()

    def setup(self):
        c = self.config
        self.text = TextEmbed(c)
        if c.image:
            self.image = ImageEmbed(c, self.layout, self.compute)
        if c.video:
            self.video = VideoEmbed(c, self.layout, self.compute)
        if c.audio:
            self.audio = AudioEmbed(c, self.layout, self.compute)
        self.fusion = fusion.KINDS[c.fusion.kind](c, self.layout, self.compute)
        self.backbone = Backbone(c.decoder, c.position == "rope", both_ways=not c.causal, compute=self.compute)
        if c.embed_norm:
            self.embed_norm = Norm(c.backbone.norm, c.backbone.norm_eps)
        if c.encoder:
            self.source = Backbone(c.encoder, c.position == "rope", both_ways=True, compute=self.compute)
            if c.embed_norm:
                self.source_norm = Norm(c.encoder.norm, c.encoder.norm_eps)
        if c.head_hidden:
            self.head_hidden = Linear((c.backbone.width,), (c.backbone.width,), True)
            self.head_norm = Norm(c.backbone.norm, c.backbone.norm_eps)
        if not c.tied:
            self.head = Kernel(c.backbone.width, c.vocab, gain=c.init_std * c.backbone.width**0.5)
        if c.head_bias:
            self.head_bias = Vector(c.vocab)
        if c.embed:
            self.projection = Linear((c.backbone.width,), (c.embed,))
            self.pair_scale, self.pair_bias = Vector(0), Vector(0)

    def __call__(self, batch: batch_lib.Batch, cache=None, keys=None, capture: bool = False):
        """-> (hidden [B,T,D], cache, out).

        cache: an attention.Cache that this batch's positions are appended to; None: the batch is whole.
        keys [B]: random keys of the rows, for dropout; None: no dropout. capture: q (after rope) and k of every layer
        into `out`, and of those that read a memory, with the sight on it as "memory".
        """
        if cache is None:
            step = jnp.cumsum(batch.ar, axis=1)
            sight, alone = attention.within(batch.document, step, self.layout.reach), False
        else:
            place, alone = cache.place, jnp.ndim(cache.cursor) > 0  # rows that others come and go beside
            step, index, cache = attention.extend(cache, batch)
            sight = attention.Sight(batch.document, step, cache.document, cache.step, index, cache.index, cursor=place,
                                    alone=alone, pages=cache.pages)  # fmt: skip

        segments = [self.text(batch, step)]
        for name in self.layout.media:
            media = getattr(batch, name)
            if media is not None:  # a step of decoding has none
                segments.append(getattr(self, name)(media, batch.document, step, keys))
                features, expected = segments[-1].x.shape[1], self.layout.encoded(name)
                if features != expected:  # a gather beyond the end would clamp silently
                    raise ValueError(f"the {name} embedder made {features} features a row, the layout has {expected}")
        prompt = None
        if batch.source is not None:
            prompt = self.text.source(batch.source, jnp.take_along_axis(step, batch.source.at, axis=1))
        fused = self.fusion(segments, batch, step, keys, prompt)
        found = fused.memory
        if self.config.encoder:
            found = self._encoded(batch, prompt, fused.source, cache, keys)
        memory = None
        if found is not None:
            parts = (found.document, found.step, found.kind)
            if cache is not None:
                parts = tuple(jnp.concatenate(pair, axis=1) for pair in zip(cache.memory_parts, parts, strict=True))
                cache = cache.replace(memory_parts=parts)
            latest = parts[2] if self.config.fusion.latest else None
            reach = parts[0].shape[1]
            on_it = attention.Sight(batch.document, step, *parts[:2], k_kind=latest, reach=reach, alone=alone)
            memory = found.x, on_it
        x = shard(self.embed_norm(fused.stream) if self.config.embed_norm else fused.stream, "batch")
        hidden, kvs, memory_kvs, out = self.backbone(
            x, batch.position, sight, cache, keys, capture, memory, fused.inject, fused.route
        )
        if capture and memory is not None:
            out |= {"memory": memory[1]}
        if cache is not None:
            k, v = zip(*kvs, strict=True)
            cache = cache.replace(k=k, v=v, memory=memory_kvs)
        if self.is_initializing():
            self.logits(hidden)
            if self.config.embed:
                self.embeddings(hidden, batch_lib.Pair(batch.tokens[:, :1], batch.tokens[:, :1], batch.tokens[:, :1]))
                self.learned()
        return hidden, cache, out

    def _encoded(self, batch: batch_lib.Batch, prompt, source_BSD, cache, keys) -> batch_lib.Memory:
        """What the source's encoder makes of it; a step of decoding adds nothing to what the cache has."""
        if batch.source is None:
            if cache is None or not cache.memory_parts[0].shape[1]:
                raise ValueError("this model reads a source: batch.source is None, and no cache has one")
            none = batch.document[:, :0]
            return batch_lib.Memory(jnp.zeros((*none.shape, self.config.backbone.width)), none, none, none)
        x = prompt.x if source_BSD is None else source_BSD
        x = shard(self.source_norm(x) if self.config.embed_norm else x, "batch")
        # What a later turn brings is a later step: earlier ones do not see it, in the encoder neither.
        sight = attention.within(prompt.document, prompt.step, reach=prompt.x.shape[1])
        x = self.source(x, batch.source.position, sight, keys=keys)[0]
        text = (batch.source.slot < 0).astype(jnp.int32)  # with fusion.latest only the last turn's is read
        return batch_lib.Memory(x, prompt.document, prompt.step, text)

    def logits(self, hidden):
        """Hidden states [...,D] -> logits [...,V] in float32."""
        x, head = self.before_head(hidden)
        return head(x)

    def embeddings(self, hidden, pair: batch_lib.Pair) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B,T,D] -> unit vectors [B,P,E] float32 of media and of texts; anything where there is none."""

        def one(index_BP):
            x = jnp.take_along_axis(hidden, jnp.maximum(index_BP, 0)[..., None], axis=1)
            x = self.projection(x).astype(jnp.float32)
            return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

        return one(pair.medium), one(pair.text)

    def learned(self) -> tuple[jax.Array, jax.Array]:
        """-> what training has added to the scale and to the bias of the products of media and texts, both []."""
        return self.pair_scale(), self.pair_bias()

    def before_head(self, hidden) -> tuple[jax.Array, Head]:
        """-> (what the head reads [...,D], the head)."""
        c = self.config
        if c.head_hidden:
            hidden = self.head_norm(ACTIVATIONS[c.head_hidden](self.head_hidden(hidden)))
        if c.logit_scale != 1:
            hidden = hidden * c.logit_scale
        kernel = self.text.table() if c.tied else self.head()
        return hidden, Head(kernel, self.head_bias() if c.head_bias else None, c.logit_cap, c.tied)
