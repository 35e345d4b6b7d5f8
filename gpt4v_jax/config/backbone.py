"""A stack of transformer blocks: the backbone of a model, its source, a medium's encoder."""

import dataclasses
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
