"""The dataclasses of a model."""

import dataclasses
import functools
import math

from gpt4v_jax.config.check import InputError, at_least, one_of

BIASES = ("qkv", "out", "mlp")
READS = ("cross", "gated", "pooled")  # what a block may do with a memory
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu")  # the last two have a gate


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies changed for contexts longer than those of the first training; model.attention has formulas."""

    kind: str = "none"  # none | linear (Chen et al. 2023) | llama3 (Llama 3.1) | yarn (Peng et al. 2023)
    factor: float = 1.0
    original: int = 0  # llama3, yarn: the context of the first training
    low: float = 1.0  # llama3: turns in `original` below which a frequency is divided by the whole factor
    high: float = 4.0  # llama3: turns above which it stays
    beta_fast: float = 32.0  # yarn: turns above which a frequency stays
    beta_slow: float = 1.0  # yarn: turns below which it is divided by the whole factor
    attention: float = 0.0  # yarn: factor of sin and cos; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the bounds are whole dimensions

    def __post_init__(self):
        one_of("kind", self.kind, ("none", "linear", "llama3", "yarn"))
        at_least(1, factor=self.factor)
        if self.kind in ("llama3", "yarn"):
            at_least(1, original=self.original)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A stack of transformer blocks; the text model's, an image encoder's (`Image.encoder`) and `Model.source`."""

    depth: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads; fewer: grouped-query attention (Ainslie et al. 2023)
    head_dim: int = 0  # 0: width / heads
    hidden: int = 0  # 0: 4 x width
    pattern: tuple[str, ...] = ("global",)  # kinds of the blocks, repeated over the depth: global | local, and what
    # they do besides, such as "local+cross": cross | gated | pooled | inject; "cross" alone is "global+cross"
    window: int = 0  # positions that a local block sees, its own included (Beltagy et al. 2020)
    norm: str = "rms"  # rms | rms_plus_one: its scale is 1 + w | layer
    norm_eps: float = 1e-6
    norm_place: str = "pre"  # pre | post: after the residual sum (Vaswani et al. 2017) | sandwich: pre, and on branches
    activation: str = "gelu_tanh"  # one of ACTIVATIONS
    bias: tuple[str, ...] = ()  # which matrices have one, of BIASES
    qk_norm: bool = False  # RMSNorm on q and k, a head at a time (Henry et al. 2020)
    attention_scale: float = 0.0  # of q k; 0: head_dim^-1/2
    attention_cap: float = 0.0  # scores become cap tanh(score / cap) (Gemma 2); 0: no cap
    rope_theta: float = 10_000.0  # used where Model.position is "rope"
    rope_scaling: RopeScaling = RopeScaling()
    local_theta: float = 0.0  # of local blocks, which are not scaled; 0: theta and scaling of the others
    buckets: int = 0  # relative position biases of T5 (Raffel et al. 2020), shared by all blocks; 0: none
    bucket_distance: int = 128  # from where on all positions share the last bucket
    layer_scale: float = 0.0  # start value of a learned scale of both branches (Touvron et al. 2021); 0: none
    dropout: float = 0.0  # on the embedded stream and on the residual branches

    def __post_init__(self):
        at_least(1, depth=self.depth, width=self.width, heads=self.heads, rope_theta=self.rope_theta)
        at_least(0, kv_heads=self.kv_heads, head_dim=self.head_dim, hidden=self.hidden, window=self.window,
                 attention_scale=self.attention_scale, attention_cap=self.attention_cap, local_theta=self.local_theta,
                 buckets=self.buckets, layer_scale=self.layer_scale)  # fmt: skip
        for name, default in (("kv_heads", self.heads), ("head_dim", self.width // self.heads),
                              ("hidden", 4 * self.width)):
            object.__setattr__(self, name, getattr(self, name) or default)
        if not self.head_dim:
            raise InputError(f"width={self.width} is less than heads={self.heads}: there is no dimension for each head")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: choose a divisor")
        one_of("norm", self.norm, ("rms", "rms_plus_one", "layer"))
        one_of("norm_place", self.norm_place, ("pre", "post", "sandwich"))
        one_of("activation", self.activation, ACTIVATIONS)
        for part in self.bias:
            one_of("bias", part, BIASES)
        for kind in self.pattern:
            for part in kind.split("+"):
                one_of("pattern", part, ("global", "local", *READS, "inject"))
        if not self.pattern or any("local" in kind for kind in self.pattern) and not self.window:
            raise InputError(f"pattern={self.pattern}, window={self.window}: name kinds, and for local set a window")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    def count(self, *parts: str) -> int:
        """-> how many blocks do one of these."""
        return sum(any(part in kind.split("+") for part in parts) for kind in self.kinds)

    def also(self, part: str, every: int) -> "Backbone":
        """-> the same stack, every n-th block of which does `part`, too."""
        period = math.lcm(len(self.pattern), every)
        kinds = [
            f"{self.pattern[i % len(self.pattern)]}+{part}" if i % every == every - 1 else
            self.pattern[i % len(self.pattern)] for i in range(min(period, self.depth))
        ]  # fmt: skip
        return dataclasses.replace(self, pattern=tuple(kinds))

    def first(self, part: str, count: int) -> "Backbone":
        """-> the same stack, whose blocks 1, ..., count do `part`, too."""
        kinds = [f"{kind}+{part}" if 1 <= i <= count else kind for i, kind in enumerate(self.kinds)]
        return dataclasses.replace(self, pattern=tuple(kinds)) if count else self


@dataclasses.dataclass(frozen=True)
class Image:
    """How pictures enter. `size` 0: the model reads none."""

    size: int = 0  # pixels of the longer side at most; right and bottom beyond whole patches are left out
    resize: str = "square"  # square: to size x size | pad: on grey, the aspect stays | native: the aspect stays, packed
    tiles: int = 0  # a picture larger than size is its thumbnail and at most so many tiles of size x size; 0: no tiles
    patch: int = 16  # a patch is patch x patch x 3 values
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green, blue in [0, 1]: x becomes (x - mean) / std
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    patch_norm: bool = False  # LayerNorm of a patch's values and of what they are mapped to (Kumar et al. 2023)
    patch_bias: bool = True
    position: str = "learned"  # learned: added to the patches | rope: of the encoder, by row and column | none
    class_token: bool = False  # a learned vector before the patches, with a position of its own
    mask_token: bool = False  # a learned vector for hidden patches (DINOv2); kept, not used yet
    pre_norm: bool = False  # LayerNorm before the encoder (CLIP)
    encoder: Backbone | None = None  # None: encoder-free, patches go straight into the stream
    layer: int = -1  # of the encoder that gives the features: -1 the last, with its norm; -2 the one before (LLaVA's)
    pool_norm: bool = False  # the last norm is on the pooled vector alone, patches go on without it (CLIP)
    pool: str = "none"  # of an ImageTower: none | class: the class token | map: attention by a learned query (SigLIP)
    classes: int = 0  # of an ImageTower: outputs of its head; 0: no head
    head_bias: bool = True

    def __bool__(self) -> bool:
        """Whether the model reads pictures."""
        return self.size > 0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.size // self.patch

    @property
    def values(self) -> int:
        """Of one patch."""
        return self.patch**2 * 3

    def __post_init__(self):
        one_of("position", self.position, ("learned", "rope", "none"))
        one_of("resize", self.resize, ("square", "pad", "native"))
        one_of("pool", self.pool, ("none", "class", "map"))
        at_least(0, size=self.size, tiles=self.tiles)
        at_least(1, patch=self.patch)
        _check_pixels("image", self)
        _check_layer("image", self)
        if self.tiles == 1 or self.tiles and self.resize != "square":
            raise InputError(f"image.tiles={self.tiles} with image.resize={self.resize!r}: 2 tiles or more, of "
                             "pictures that are resized square; of native ones raise image.size instead")
        if (self.class_token or self.pre_norm) and not self.encoder:
            raise InputError("image.class_token and image.pre_norm are an encoder's: set image.encoder")
        if self.class_token and self.position == "rope":
            raise InputError("image.class_token has no row and column: with image.position='rope' set it to False")
        if self.pool == "map" and self.pool_norm:
            raise InputError("image.pool='map' norms all vectors: set image.pool_norm to False")
        if self.pool == "class" and not self.class_token:
            raise InputError("image.pool='class' needs image.class_token")


@dataclasses.dataclass(frozen=True)
class Video:
    """How clips enter: frames of size x size pixels, in patches of `tubelet` frames (ViViT, Arnab et al. 2021)."""

    size: int = 0  # 0: the model reads no clips
    patch: int = 16
    frames: int = 8  # of a clip at most, evenly over it
    rate: float = 0.0  # frames a second, as long as they are not more than `frames`; 0: always `frames`, if it has them
    tubelet: int = 1  # frames that a patch spans; 1: each frame by itself
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    patch_norm: bool = False
    patch_bias: bool = True
    position: str = "learned"  # learned: tables of place and of time | rope: of the encoder | none
    encoder: Backbone | None = None
    layer: int = -1

    def __bool__(self) -> bool:
        return self.size > 0

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def values(self) -> int:
        return self.tubelet * self.patch**2 * 3

    def __post_init__(self):
        one_of("position", self.position, ("learned", "rope", "none"))
        at_least(0, size=self.size, rate=self.rate)
        at_least(1, patch=self.patch, frames=self.frames, tubelet=self.tubelet)
        _check_pixels("video", self)
        _check_layer("video", self)


@dataclasses.dataclass(frozen=True)
class Audio:
    """How sound enters: log-mel frames, 100 a second (Radford et al. 2022), `patch` of them in a position."""

    bins: int = 0  # of the mel scale: 80 | 128; 0: the model reads no sound
    patch: int = 4
    seconds: float = 30.0  # longer sounds fit no row: training leaves them out, evaluation counts them as wrong
    center: bool = False  # each bin less its mean over the loud frames: microphones and voices differ by it
    front: str = "patch"  # patch: one linear map | conv: two convolutions with GELU, the second of stride `patch`
    patch_norm: bool = False  # LayerNorm of a patch's values and of what they are mapped to
    position: str = "sinusoid"  # added to the patches | rope: of the encoder | none
    encoder: Backbone | None = None
    layer: int = -1

    def __bool__(self) -> bool:
        return self.bins > 0

    @property
    def values(self) -> int:
        return self.patch * self.bins

    def __post_init__(self):
        one_of("position", self.position, ("sinusoid", "rope", "none"))
        one_of("front", self.front, ("patch", "conv"))
        at_least(0, bins=self.bins)
        at_least(1, patch=self.patch)
        at_least(0.01, seconds=self.seconds)
        _check_layer("audio", self)
        if self.bins > 128:
            raise InputError(f"audio.bins={self.bins} is more than 128: so narrow mel filters can hold no frequency")
        if self.position == "rope" and not self.encoder:
            raise InputError("audio.position='rope' is an encoder's: set audio.encoder, or another position")
        if self.patch_norm and self.front == "conv":
            raise InputError("audio.patch_norm=True is for audio.front='patch': set one of them otherwise")


def _check_pixels(name: str, c: "Image | Video") -> None:
    if 0 < c.size < c.patch:
        raise InputError(f"{name}.size={c.size} is less than {name}.patch={c.patch}: it holds no patch")
    if c.size % c.patch and not c.encoder:  # encoders leave the rest out, as a convolution does
        raise InputError(f"{name}.size={c.size} is not a multiple of {name}.patch={c.patch}")
    if c.position == "rope" and not c.encoder:
        raise InputError(f"{name}.position='rope' is an encoder's: set {name}.encoder, or another position")
    for key, values in (("mean", c.mean), ("std", c.std)):
        if len(values) != 3 or key == "std" and min(values) <= 0:
            raise InputError(f"{name}.{key}={values} must be three numbers{', each above 0' * (key == 'std')}")


def _check_layer(name: str, c: "Image | Video | Audio") -> None:
    depth = c.encoder.depth if c.encoder else 1
    if not -depth <= c.layer <= -1:
        raise InputError(f"{name}.layer={c.layer} must be from -{depth}, the encoder's first block, to -1, its last")


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
    tokens: int = 8  # resampler, q_former, pooled: vectors that a picture (a tile, a clip, a sound) becomes
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
