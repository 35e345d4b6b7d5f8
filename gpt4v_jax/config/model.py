"""A model: the stacks and media that it has, and how they meet."""

import dataclasses
import functools

from gpt4v_jax.config.backbone import ACTIVATIONS, READS, Backbone
from gpt4v_jax.config.check import InputError, at_least, one_of
from gpt4v_jax.config.media import Audio, Image, Video

FUSIONS = ("concat", "prefix_lm", "cross_attention", "resampler", "q_former", "pooled", "encoder_decoder", "experts")
CONNECTORS = ("linear", "mlp2x_gelu", "pool", "pixel_shuffle")
RESAMPLED = ("resampler", "q_former", "pooled")


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How the modalities meet; docs/fusion.md. `kind` is all that has to be set."""

    kind: str = "concat"  # one of FUSIONS
    every: int = 2  # cross_attention, pooled: the blocks n, 2n, ... read the media
    latest: bool = False  # of a memory: a position reads the latest medium of a modality before it, not all of them;
    # encoder_decoder: the text of the latest turn alone, which has read those before it, and all media
    into: str = "stream"  # resampler, q_former: where their vectors go: stream | memory, as cross_attention's
    tokens: int = 8  # resampler, q_former: vectors that a picture (a tile, a clip, a sound) becomes; pooled: how many
    # times as wide as the stream its one vector is
    depth: int = 1  # resampler, q_former, pooled: blocks of learned queries
    connector: str = "linear"  # from an encoder's features to the stream, one of CONNECTORS
    side: int = 2  # pool, pixel_shuffle: side x side patches become one vector; of a sound, side
    gain: float = 1.0  # of the connector's first values; 0: it starts as zero (PaliGemma, Beyer et al. 2024)
    inject: int = 0  # so many blocks after the first get features of an earlier layer of the encoder at the media's
    # positions (DeepStack, Meng et al. 2024)

    def __post_init__(self):
        one_of("kind", self.kind, FUSIONS)
        one_of("connector", self.connector, CONNECTORS)
        one_of("into", self.into, ("stream", "memory"))
        at_least(1, every=self.every, tokens=self.tokens, depth=self.depth, side=self.side)
        at_least(0, gain=self.gain, inject=self.inject)
        if self.inject and (self.place != "stream" or self.kind in RESAMPLED):
            raise InputError(f"inject={self.inject} adds to patches in the stream: kind={self.kind!r} has none there")
        if self.latest and (self.place == "stream" or self.kind == "q_former"):
            raise InputError(f"latest=True is for a memory, whose media have a step each: kind={self.kind!r} has none")

    @property
    def place(self) -> str:
        """Where the vectors of media go: stream | memory, which blocks read: one anchor stands in the stream | source:
        a separate encoder reads them with the prompt."""
        if self.kind in ("cross_attention", "pooled") or self.kind in RESAMPLED and self.into == "memory":
            return "memory"
        return "source" if self.kind == "encoder_decoder" else "stream"

    @property
    def merges(self) -> int:
        """Side of the square of patches that becomes one vector."""
        return self.side if self.connector in ("pool", "pixel_shuffle") else 1


@dataclasses.dataclass(frozen=True)
class Model:
    vocab: int = 0  # 0: taken from the tokenizer
    context: int = 256  # positions in a row of the stream, T
    causal: bool = True  # False: every position of a document sees all of it (BERT)
    position: str = "rope"  # rope | learned: a table of absolute positions | none
    axes: int = 1  # of rope's positions: 1 | 3: (time, row, column) of patches, three times the same of text
    position_offset: int = 0  # the table's first rows, which no position reads (BART has 2)
    token_types: int = 0  # rows of the table for Batch.token_type (BERT has 2); 0: none
    embed_scale: float = 1.0  # of token embeddings (Gemma: sqrt(width))
    embed_norm: bool = False  # norm of the fused stream: every modality enters the blocks at one scale
    tied: bool = True  # the head is the embedding table
    head_hidden: str = ""  # activation of a dense layer and a norm before the head (BERT); "": none
    head_bias: bool = False
    logit_scale: float = 1.0  # of the hidden states before the head (tied T5: width^-1/2)
    logit_cap: float = 0.0  # logits become cap tanh(logit / cap) (Gemma 2); 0: no cap
    embed: int = 0  # width of the space of media and texts (objective.contrastive); 0: there is none
    init_std: float = 0.02  # of the embedding tables and the head; other matrices start at 1 / sqrt(fan-in)
    backbone: Backbone = Backbone()
    source: Backbone | None = None  # the encoder of Batch.source, which `cross` blocks of the backbone read; under
    # encoder_decoder None: as the backbone
    source_context: int = 0  # positions of Batch.source; 0: as `context`
    image: Image = Image()
    video: Video = Video()
    audio: Audio = Audio()
    fusion: Fusion = Fusion()

    def __post_init__(self):
        one_of("position", self.position, ("rope", "learned", "none"))
        if self.head_hidden:
            one_of("head_hidden", self.head_hidden, ACTIVATIONS)
        at_least(1, context=self.context)
        if self.axes not in (1, 3) or self.axes == 3 and self.position != "rope":
            raise InputError(f"axes={self.axes} must be 1, or with position='rope' 3")
        at_least(0, position_offset=self.position_offset, token_types=self.token_types, logit_cap=self.logit_cap,
                 embed=self.embed, source_context=self.source_context)  # fmt: skip
        for stack in (self.backbone, self.source):
            if stack and self.position == "rope" and stack.head_dim % 2:
                raise InputError(f"backbone.head_dim={stack.head_dim} must be even, for rope turns pairs")
        turned = [medium.encoder for medium in (self.image, self.video, self.audio) if medium.position == "rope"]
        for stack in turned + ([self.backbone] if self.axes == 3 else []):
            if stack.head_dim < 6 or stack.head_dim % 2:
                raise InputError(f"head_dim={stack.head_dim} must be even and 6 or more for rope over three axes")
        if self.backbone.count("gated", "pooled", "inject"):
            raise InputError(f"backbone.pattern={self.backbone.pattern}: gated, pooled, inject are set by model.fusion")
        if self.fusion.kind != "encoder_decoder" and bool(self.backbone.count("cross")) != (self.source is not None):
            raise InputError(f"backbone.pattern={self.backbone.pattern}: cross blocks and model.source need each other")
        if self.source and (self.source.width != self.backbone.width or self.source.count(*READS)):
            raise InputError(f"model.source needs width {self.backbone.width} as the backbone, and no cross blocks")
        if self.source and self.fusion.place != "stream" and self.fusion.kind != "encoder_decoder":
            raise InputError(f"fusion.kind={self.fusion.kind!r} needs the blocks that read model.source: leave one out")
        every, inject, depth = self.fusion.every, self.fusion.inject, self.backbone.depth
        if self.fusion.place == "memory" and every > depth:
            raise InputError(f"fusion.every={every} is beyond backbone.depth={depth}: no block would read the media")
        if inject >= depth:
            raise InputError(f"fusion.inject={inject} must be less than backbone.depth={depth}: they follow the first")
        bare = [m for m in (self.image, self.video, self.audio) if m and not m.encoder]
        if self.fusion.gain != 1 and bare and self.fusion.connector in ("linear", "pool"):
            raise InputError(f"fusion.gain={self.fusion.gain} is a connector's, and without an encoder "
                             f"{self.fusion.connector!r} is none: set an encoder, or another connector")
        if not self.causal and self.fusion.kind == "encoder_decoder":
            raise InputError("fusion.kind='encoder_decoder' has a causal decoder: leave model.causal at True")

    @property
    def drops(self) -> bool:
        """Whether any of its stacks has dropout."""
        encoders = [medium and medium.encoder for medium in (self.image, self.video, self.audio)]
        return any(stack and stack.dropout for stack in (self.backbone, self.source, *encoders))

    @functools.cached_property
    def decoder(self) -> Backbone:
        """The backbone, with what the fusion has its blocks do besides."""
        fusion = self.fusion
        if fusion.kind == "encoder_decoder" and not self.backbone.count("cross"):
            return self.backbone.also("cross", 1)
        if fusion.place == "memory":
            return self.backbone.also("pooled" if fusion.kind == "pooled" else "gated", fusion.every)
        return self.backbone.first("inject", fusion.inject)

    @property
    def memory_width(self) -> int:
        """Of the vectors that blocks read beside the stream."""
        return self.backbone.width * (self.fusion.tokens if self.fusion.kind == "pooled" else 1)

    @functools.cached_property
    def encoder(self) -> Backbone | None:
        """What reads Batch.source."""
        if self.source or self.fusion.kind != "encoder_decoder":
            return self.source
        pattern = tuple("+".join(part for part in kind.split("+") if part not in READS) or "global"
                        for kind in self.backbone.pattern)  # fmt: skip
        return dataclasses.replace(self.backbone, pattern=pattern)


@dataclasses.dataclass(frozen=True)
class Towers:
    """An image and a text encoder into one space (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023)."""

    image: Image = Image()
    text: Model = Model()
    width: int = 512  # of the space
    text_bias: bool = False  # of the text tower's projection
    logit_bias: bool = False  # SigLIP
