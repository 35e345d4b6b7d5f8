"""list[Segment] -> Fused: how the modalities meet. One small module a kind, all of one signature.

    fused = KINDS[config.fusion.kind](config, layout, compute)(segments, batch, step, keys, prompt)

segments: the text's, then one of each modality that the batch has; batch: its `slot` says where vectors go; step [B,T];
keys [B]: for dropout; prompt: the Segment of Batch.source's text. What data must know of a kind (how many positions a
picture takes, what attends both ways) is batch.Layout's; what blocks do for it is config.Model.decoder's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.backbone import Backbone
from gpt4v_jax.model.layers import Norm, Table

LONGEST = 1 << 20  # steps of a row, and of a cache, are fewer


class _Fusion(nn.Module):
    config: config.Model
    layout: batch_lib.Layout
    compute: config.Compute = config.Compute()


class Concat(_Fusion):
    """Media's vectors stand in the stream: position t has vector slot[t], counted over all media.

    `prefix_lm` is the same module: what differs is `ar`, which data writes (Layout.prefix). Vectors of earlier layers
    of an encoder are injected at the same positions.
    """

    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        text, *media = segments
        inject = [placed(0 * text.x, [segment.deep[k] for segment in media], batch.slot)
                  for k in range(self.config.fusion.inject)]  # fmt: skip
        return batch_lib.Fused(placed(text.x, [segment.x for segment in media], batch.slot), inject=tuple(inject))


def placed(stream_BTD, features: list, slot_BT):
    """-> the stream, with features [B,F,D] of all modalities, one after the other, where slots are."""
    if not features:
        return stream_BTD
    gathered = jnp.take_along_axis(jnp.concatenate(features, axis=1), jnp.maximum(slot_BT, 0)[..., None], axis=1)
    return jnp.where((slot_BT >= 0)[..., None], gathered.astype(stream_BTD.dtype), stream_BTD)


class CrossAttention(_Fusion):
    """Media are a memory, which every n-th block reads through a gate that starts at 0 (Flamingo, Alayrac et al. 2022);
    in the stream stands an anchor."""

    @nn.compact
    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        text, *media = segments
        norm = Norm(self.config.backbone.norm, self.config.backbone.norm_eps, name="memory_norm")
        parts = [(norm(s.x), s.document, s.step, jnp.where(s.item > 0, s.kind, 0)) for s in media]
        if not media:  # a memory without vectors
            none = jnp.zeros((len(text.x), 0, self.config.memory_width), text.x.dtype)
            parts = [(norm(none), *3 * (text.document[:, :0],))]
        memory = batch_lib.Memory(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
        return batch_lib.Fused(text.x, memory=memory)


class Resampler(_Fusion):
    """Each picture (tile, clip, sound) becomes `tokens` vectors: learned queries that read its features and each other
    (Perceiver, Jaegle et al. 2021; Flamingo's resampler). They go where `fusion.into` says."""

    reads_prompt = False

    @nn.compact
    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        text, *media = segments
        media = [resampled(self, segment, text, batch, step, keys) for segment in media]
        kind = Concat if self.config.fusion.into == "stream" else CrossAttention
        return kind(self.config, self.layout, name="into")([text, *media], batch, step)


class QFormer(Resampler):
    """A resampler whose queries read the prompt, too (BLIP-2, Li et al. 2023; InstructBLIP, Dai et al. 2023): the text
    of the medium's own block, which is the user's and never trained (of a masked document, which is one block, what its
    positions themselves see of it); as embeddings, so that under rope its order is not known."""

    reads_prompt = True


def resampled(module: Resampler, segment: batch_lib.Segment, text, batch, step, keys) -> batch_lib.Segment:
    """Segment [B,F,D] -> Segment [B,N x tokens,D], in the order of the items. For use in a compact method."""
    c, name = module.config, batch_lib.MEDIA[segment.kind - 1]
    k, at = c.fusion.tokens, getattr(batch, name).at
    item = jnp.repeat(jnp.where(at >= 0, jnp.arange(1, at.shape[1] + 1), 0), k, axis=1)  # [B,N x tokens]

    def of_item(values):
        return jnp.repeat(jnp.where(at >= 0, jnp.take_along_axis(values, jnp.maximum(at, 0), axis=1), 0), k, axis=1)

    def normed(what, x):  # tokens start at 0.02, features at 1: one scale, that both are heard
        return Norm(c.backbone.norm, c.backbone.norm_eps, name=f"{name}_{what}_norm")(x)

    vectors, k_item, law = normed("features", segment.x), segment.item, (item, segment.item)
    if module.reads_prompt:
        # A block is one step of a document: what stands in the medium's is known by that. Of media the own one is read.
        vectors = jnp.concatenate([vectors, normed("prompt", text.x)], axis=1)
        own, block = of_item(_block(batch.document, step)), _block(batch.document * (batch.slot < 0), step)
        k_item = jnp.concatenate([segment.item, 0 * block], axis=1)
        law = (own, jnp.concatenate([_block(segment.document, segment.step), block], axis=1))
    zeros = [jnp.zeros_like(x) for x in law]
    sight = attention.Sight(law[0], zeros[0], law[1], zeros[1], q_item=item, k_item=k_item, reach=vectors.shape[1])
    queries = Table(k, c.backbone.width, name=f"{name}_queries")(jnp.arange(k))
    x = jnp.tile(queries, (len(at), at.shape[1], 1)).astype(vectors.dtype)
    stack = dataclasses.replace(c.backbone, depth=c.fusion.depth, pattern=("cross",))
    stack = Backbone(stack, compute=module.compute, name=f"{name}_resampler")
    x = stack(x, None, attention.bidirectional(item), keys=keys, memory=(vectors, sight))[0]
    return batch_lib.Segment(x, of_item(batch.document), of_item(step), item, segment.kind)


def _block(document, step):
    """-> a number for each block of each document; -1: padding."""
    return jnp.where(document > 0, document * LONGEST + step, -1)


class Pooled(Resampler):
    """Late fusion: a medium becomes one vector, its resampled ones side by side; every n-th block adds a weighted sum
    of the vectors of the media before a position, by weights that do not depend on the text. The vector is `tokens`
    times as wide as the stream: what a question is to find must be apart in it, for no attention looks for it there."""

    @nn.compact
    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        (text, *media), k = segments, self.config.fusion.tokens
        pooled = []
        for segment in media:
            found = resampled(self, segment, text, batch, step, keys)
            x = found.x.reshape(len(found.x), -1, self.config.memory_width)
            document, step_of, item = (values[:, ::k] for values in (found.document, found.step, found.item))
            pooled.append(batch_lib.Segment(x, document, step_of, item, segment.kind))
        return CrossAttention(self.config, self.layout, name="into")([text, *pooled], batch, step)


class EncoderDecoder(_Fusion):
    """Media and the user's text stand in the source, which an encoder reads; every block of the decoder reads that."""

    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        text, *media = segments
        if prompt is None:  # a step of decoding
            return batch_lib.Fused(text.x)
        return batch_lib.Fused(text.x, source=placed(prompt.x, [segment.x for segment in media], batch.source.slot))


class Experts(Concat):
    """As concat; in the blocks each modality's positions have weights of their own, and attention is over all (mixture
    of transformers, Liang et al. 2024)."""

    def __call__(self, segments, batch, step, keys=None, prompt=None) -> batch_lib.Fused:
        fused, slot = super().__call__(segments, batch, step), batch.slot
        counts = [segment.x.shape[1] for segment in segments[1:]]
        place, T = jnp.where(slot >= 0, slot, sum(counts)), slot.shape[1]
        empty = jnp.zeros(sum(counts), jnp.int32)
        at = jax.vmap(lambda place: empty.at[place].set(jnp.arange(T, dtype=jnp.int32), mode="drop"))(place)
        ends = [sum(counts[:k]) for k in range(len(counts) + 1)]
        at = tuple(at[:, first:end] for first, end in zip(ends, ends[1:], strict=False))
        names = tuple(batch_lib.MEDIA[segment.kind - 1] for segment in segments[1:])
        return fused.replace(route=batch_lib.Route(slot, at, names))


KINDS = {
    "concat": Concat, "prefix_lm": Concat, "cross_attention": CrossAttention, "resampler": Resampler,
    "q_former": QFormer, "pooled": Pooled, "encoder_decoder": EncoderDecoder, "experts": Experts,
}  # fmt: skip
