"""Which way of joining pictures and text is best at an equal number of FLOPs?

python -m experiments.fusion --workdir runs/fusion [--size toy|small|paper] [--jobs 2] [--plan]
python -m experiments.fusion --frozen --workdir runs/fusion_frozen --text runs/two_stage_text     # the backbone frozen

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, section 3.2, finding 2): with the language model frozen
cross-attention does better, with all trained the fully autoregressive way (`concat`) does, although it has fewer
parameters. Shukor et al. 2025 (arXiv 2504.07951) find early fusion at least as good as late at small sizes. Comparing
at equal steps misleads: a picture of digits world takes 9 positions of a row under `concat`, and one under
`cross_attention`. Here each kind gets the steps that make its FLOPs those of `concat`.
"""

from experiments import sweep
from gpt4v_jax.model import presets

BASE = "configs/digits_world.py"
VARIANTS = {
    "concat": {},
    "prefix_lm": {"model.fusion.kind": "prefix_lm"},
    "cross_attention": {"model.fusion.kind": "cross_attention", "data.image.items": 12},
    "resampler": {"model.fusion.kind": "resampler", "model.fusion.tokens": 9},
    "encoder_decoder": {
        "model.fusion.kind": "encoder_decoder", "model.context": 96, "model.source_context": 192,
        "data.image.items": 7,
    },
    "experts": {"model.fusion.kind": "experts"},
}  # fmt: skip
TOY = {"steps": 700, "log_every": 50, "save_every": 350, "eval.every": 350, "eval.evaluators": ("questions",)}
SMALL = {
    "steps": 20_000, "batch": 64, "log_every": 100, "save_every": 1000, "eval.every": 2000, "compute.dtype": "bfloat16",
    "model.backbone.depth": 8, "model.backbone.width": 384, "model.backbone.heads": 6, "optim.lr": 2e-3,
    "optim.warmup": 500, "eval.evaluators": ("questions",),
}  # fmt: skip
SMOKE = {"data.name": "digits_world/small", "model.backbone.depth": 2, "model.backbone.width": 16,
         "model.backbone.heads": 2}  # fmt: skip
# Idefics2's set-up, finding 2: SigLIP So400m and Mistral 7B; 64 vectors of a picture by a perceiver of 3 blocks.
PAPER = {
    "model": {**presets.MODELS["mistral-7b-v0.1"], "vocab": 32_003, "context": 2048, "embed_norm": False},
    "model.image": {**presets.IMAGES["siglip-image-so400m/14-384"], "pool": "none", "patch_norm": False},
    "model.fusion": {"tokens": 64, "depth": 3}, "data.image.items": 8, "batch": 1024, "steps": 5000,
    "compute.dtype": "bfloat16",
}  # fmt: skip
PAPER_VARIANTS = {
    "autoregressive": {"model.fusion.kind": "resampler"},
    "cross_attention": {"model.fusion.kind": "resampler", "model.fusion.into": "memory"},
}
SIZES = {
    "toy": sweep.Sweep(BASE, VARIANTS, TOY, smoke=SMOKE),
    "small": sweep.Sweep(BASE, VARIANTS, SMALL, smoke=SMOKE),
    "paper": sweep.Sweep(BASE, PAPER_VARIANTS, PAPER, smoke=SMOKE, plan_only=True),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
