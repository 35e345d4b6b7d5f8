"""The dataclasses of a run: its model, data, optimizer, devices, and how its steps are computed."""

import dataclasses

from gpt4v_jax.config.check import InputError, at_least, one_of, shares
from gpt4v_jax.config.model import Model


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a row has room for of one modality; packing fills it as it fills the row."""

    per_row: int = 4  # media; not `items`, which is a method of every ConfigDict, so that no flag could set it
    patches: int = 0  # positions of all of them together; 0: per_row x those of the largest

    def __post_init__(self):
        at_least(1, per_row=self.per_row)
        at_least(0, patches=self.patches)


METRICS = ("accuracy", "loss", "loss_a_character", "loss_a_letter", "wer", "bleu", "chrf", "plain", "R@1",
           "R@5", "R@10")  # by which a checkpoint may be the best  # fmt: skip
AUGMENT = ("shift", "flip", "voice", "mask")
OBJECTIVES = ("next_token", "masked", "span", "prefix")


@dataclasses.dataclass(frozen=True)
class Data:
    name: str = "digits_world"  # of ours, or tfds:NAME, llava:FILE, jsonl:FILE, folder:DIR; docs/data.md
    mixture: tuple[str, ...] = ()  # instead of name, several: "name: weight" or "name: first:10%"; docs/data.md
    objective: str = "next_token"  # of OBJECTIVES; docs/objectives.md
    objectives: tuple[str, ...] = ()  # of data sets that have another one, as "songci=masked"
    dir: str = ""  # where raw files are looked for; "" means the environment's GPT4V_DATA_DIR
    cache: str = ""  # where prepared data sets go; "" means GPT4V_CACHE_DIR, else ~/.cache/gpt4v_jax
    tokenizer: str = "bpe"  # byte | bpe | wordpiece | char: from the training split | a file; docs/tokenizers.md
    vocab: int = 512  # upper bound on the vocabulary of a trained BPE or WordPiece
    start: tuple[str, ...] = ()  # tokens with which an encoder-decoder's answer starts
    end: tuple[str, ...] = ("<end>",)  # tokens that end an answer; imported tokenizers have their own
    blank: tuple[str, ...] = ()  # image | video | audio that are grey, or silent: the blind baseline's
    augment: tuple[str, ...] = ()  # in training: shift, flip pictures and clips | voice, mask: sounds
    turns: int = 8  # questions of one record in one training document, at most; 0: none is asked
    captions: int = 4  # captions of one picture in an epoch, at most, each in a document of its own
    window: int = 0  # plain texts are read in windows of so many tokens; 0: of the context
    image: Budget = Budget()  # pictures that a row has room for
    video: Budget = Budget()
    audio: Budget = Budget()
    bad: float = 0.01  # share of records that may be unusable before the run stops
    limit: int = 0  # use only so many training records; 0 means all
    threads: int = 2  # that read ahead; 0 reads in line

    def __post_init__(self):
        for objective in self.kinds:
            one_of("objective", objective, OBJECTIVES)
        for name in self.blank:
            one_of("blank", name, ("image", "video", "audio"))
        for name in self.augment:
            one_of("augment", name, AUGMENT)
        at_least(0, turns=self.turns, captions=self.captions, limit=self.limit, window=self.window,
                 threads=self.threads)  # fmt: skip
        at_least(1, vocab=self.vocab)
        if not 0 <= self.bad <= 1:
            raise InputError(f"bad={self.bad} must be a share, from 0 to 1")

    @property
    def own(self) -> dict[str, str]:
        """`objectives` by data set."""
        return dict(text.rpartition("=")[::2] for text in self.objectives)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every objective that is named."""
        return tuple(dict.fromkeys((self.objective, *self.own.values())))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of terms, each its coefficient times its sum / weight. docs/objectives.md"""

    answers_only: bool = True  # False: every text token is a target, also the user's, where no query sees it
    z_loss: float = 0.0  # coefficient of logsumexp(logits)^2 (PaLM, Chowdhery et al. 2022; ST-MoE, Zoph et al. 2022)
    contrastive: float = 0.0  # coefficient of the loss on pairs of a medium and its text; needs model.embed
    contrastive_loss: str = "sigmoid"  # sigmoid (SigLIP, Zhai et al. 2023) | softmax (CLIP, Radford et al. 2021)
    masked: float = 0.15  # share of the tokens that data.objective "masked" and "span" take away
    span: float = 3.0  # tokens of a span, in the mean

    def __post_init__(self):
        one_of("contrastive_loss", self.contrastive_loss, ("sigmoid", "softmax"))
        at_least(0, z_loss=self.z_loss, contrastive=self.contrastive)
        at_least(1, span=self.span)
        if not 0 < self.masked < 1:
            raise InputError(f"masked={self.masked} must be a share, above 0 and below 1")


@dataclasses.dataclass(frozen=True)
class Optim:
    name: str = "adamw"  # adamw | adafactor | lion | sgd | muon: matrices of the blocks by Muon, the rest by AdamW
    lr: float = 1e-3
    final: float = 0.1  # last learning rate of cosine, linear and wsd, as a share of lr
    warmup: int = 100  # steps
    schedule: str = "cosine"  # cosine | linear | wsd: constant, then down | rsqrt: lr sqrt(warmup / step) | constant
    cooldown: float = 0.2  # share of the run's steps in which wsd goes down (Hu et al. 2024)
    b1: float = 0.9
    b2: float = 0.99
    momentum: float = 0.95  # of muon and sgd
    weight_decay: float = 0.1  # decoupled: times the learning rate (Loshchilov & Hutter 2019)
    decay: str = r"(kernel|table)$"  # which parameter paths decay
    frozen: str = ""  # which parameter paths do not move; they have no optimizer state
    lr_factors: tuple[str, ...] = ()  # such as "^image/=0.1": learning rate of the parameter paths that match first
    clip: float = 1.0  # global norm; 0 means none
    state_dtype: str = "float32"  # of the optimizer's moments: float32 | bfloat16
    ema: float = 0.0  # decay of a moving average of the weights, which is then what is evaluated; 0: none is kept

    def __post_init__(self):
        one_of("name", self.name, ("adamw", "adafactor", "lion", "sgd", "muon"))
        one_of("schedule", self.schedule, ("cosine", "linear", "wsd", "rsqrt", "constant"))
        one_of("state_dtype", self.state_dtype, ("float32", "bfloat16"))
        at_least(0, lr=self.lr, final=self.final, warmup=self.warmup, weight_decay=self.weight_decay, clip=self.clip)
        shares(b1=self.b1, b2=self.b2, momentum=self.momentum, cooldown=self.cooldown, ema=self.ema)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Matrices stand still, and beside each a product of a low rank is trained (Hu et al. 2021); docs/finetuning.md."""

    rank: int = 0  # of the products; 0: there are none
    alpha: float = 16.0  # a product counts alpha / rank times
    pattern: str = r"(attention|cross|mlp)/.*kernel$"  # beside which matrices, by their parameter paths
    also: str = ""  # which other parameter paths move, such as "connector|embed_norm"; "": none

    def __post_init__(self):
        at_least(0, rank=self.rank, alpha=self.alpha)
        if self.rank and not self.alpha:
            raise InputError(f"alpha={self.alpha} with rank={self.rank}: nothing would be trained; set it above 0")
        if self.also and not self.rank:
            raise InputError(f"also={self.also!r} needs rank: with rank=0 all parameters move but optim.frozen's")


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = 0  # steps; 0: at the end of every epoch. And at the end of the run
    batch: int = 64  # rows
    limit: int = 0  # records in the evaluations during training; 0 means all
    best: str = ""  # the metric by which the best checkpoint is kept, as "evaluator/metric"
    best_mode: str = "max"  # max | min
    evaluators: tuple[str, ...] = ()  # names of gpt4v_jax.eval.EVALUATORS
    split: str = "validation"  # of the evaluations during training; many sets of TFDS have "test" alone
    prompts: tuple[str, ...] = ()  # of zero_shot, such as "a picture of {}": what an answer is put into; (): nothing

    def __post_init__(self):
        for prompt in self.prompts:
            if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", "")):
                raise InputError(f"prompts: {prompt!r} must have one {{}}, the answer's place, and no other braces")
        one_of("best_mode", self.best_mode, ("max", "min"))
        at_least(0, every=self.every, limit=self.limit)
        at_least(1, batch=self.batch)
        if self.best:
            if not self.evaluators:
                evaluator = self.best.partition("/")[0]
                raise InputError(f"best={self.best!r} needs the evaluator {evaluator!r}: name it, or set best to ''")
            # Names of data sets have slashes, too.
            evaluator = max((e for e in self.evaluators if self.best.startswith(f"{e}/")), key=len, default="")
            one_of("best", evaluator or self.best.partition("/")[0], self.evaluators)
            one_of("best", self.best[len(evaluator) + 1 :].partition("/")[0], METRICS)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: as many as there are."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    across: str = "data"  # the axis whose neighbours may be on different hosts (or TPU slices); the others stay inside

    def __post_init__(self):
        one_of("across", self.across, ("data", "fsdp", "tensor"))


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a step is computed. Everything but `dtype` changes the result by rounding at most."""

    dtype: str = "float32"  # float32 | bfloat16: of matrix products and activations; parameters stay float32
    remat: str = "none"  # which of a block's values the backward pass computes again: none | minimal: all but products
    # | full: all | offload: all but products, which wait in host memory
    scan: int = 0  # 0: the blocks are a list; n: one compiled loop over them, n periods of the pattern at a time
    accumulate: int = 1  # micro-batches that make up a step
    vocab_chunks: int = 1  # the loss sees the vocabulary in so many pieces, and never holds all logits

    def __post_init__(self):
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "minimal", "full", "offload"))
        at_least(0, scan=self.scan)
        at_least(1, accumulate=self.accumulate, vocab_chunks=self.vocab_chunks)


@dataclasses.dataclass(frozen=True)
class Guard:
    """A step whose loss, gradient or learning rate is not finite, or whose loss jumps, changes nothing, is counted."""

    spike: float = 10.0  # a loss beyond so many times its running average is skipped, too, once 20 steps have made one;
    # 0: none is
    limit: int = 10  # skipped steps in a row after which the run stops (1: at the first)

    def __post_init__(self):
        at_least(1 if self.spike else 0, spike=self.spike)
        at_least(1, limit=self.limit)


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Folders of trained weights, by the part that they fill; "": it starts from random values."""

    backbone: str = ""  # a language model (folder or hub name): text embedding, backbone, head
    image: str = ""  # an image encoder (folder or hub name)
    run: str = ""  # a workdir: its best checkpoint
    run_parameters: str = ""  # which parameter paths are taken from it; "": all that this model has


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 1000
    batch: int = 16  # rows per step, over all devices
    log_every: int = 50
    save_every: int = 500
    keep_last: int = 2  # newest checkpoints kept; the older ones are what a damaged one falls back to
    keep_every: int = 0  # at multiples of so many steps a checkpoint is saved and kept for good; 0: none
    mesh: Mesh = Mesh()
    compute: Compute = Compute()
    model: Model = Model()
    init_from: InitFrom = InitFrom()
    data: Data = Data()
    objective: Objective = Objective()
    optim: Optim = Optim()
    lora: LoRA = LoRA()
    guard: Guard = Guard()
    eval: Eval = Eval()

    def __post_init__(self):
        at_least(0, seed=self.seed, keep_every=self.keep_every)
        at_least(1, steps=self.steps, batch=self.batch, log_every=self.log_every, save_every=self.save_every,
                 keep_last=self.keep_last)  # fmt: skip
        if self.batch % self.compute.accumulate:
            raise InputError(f"batch={self.batch} is not a multiple of compute.accumulate={self.compute.accumulate}")
        if self.objective.contrastive and not (self.model.embed and (self.model.image or self.model.video
                                                                     or self.model.audio)):  # fmt: skip
            raise InputError(f"objective.contrastive={self.objective.contrastive} needs a space and media: set "
                             "model.embed, and model.image, video or audio")
        if self.init_from.run_parameters and not self.init_from.run:
            raise InputError(f"init_from.run_parameters={self.init_from.run_parameters!r} needs init_from.run")
