"""How pictures, clips and sounds enter a model."""

import dataclasses

from gpt4v_jax.config.backbone import Backbone
from gpt4v_jax.config.check import InputError, at_least, one_of


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
