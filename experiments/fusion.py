"""Which way of joining pictures and text is best at an equal number of FLOPs?

python -m experiments.fusion --workdir runs/fusion [--size toy|small|paper] [--jobs 2] [--plan]
python -m experiments.fusion_frozen --workdir runs/fusion_frozen     # the language model trained before, and frozen

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, section 3.2, finding 2): with the language model frozen
cross-attention does better, with it trained (by LoRA) the fully autoregressive way (`concat`) does, although it has
fewer parameters. Shukor et al. 2025 (arXiv 2504.07951) find early fusion at least as good as late at small sizes. Here
all is trained from scratch. Comparing at equal steps misleads: a picture of digits world takes 9 positions of a row
under `concat`, and one under `cross_attention`. So each kind gets the steps that make its FLOPs those of `concat`.

Measured, size toy: cross_attention 0.523, experts 0.486, prefix_lm 0.477, concat 0.445, resampler 0.419,
encoder_decoder 0.358 of the test questions, 83 minutes in all at c047134: docs/results/fusion.md
"""

from experiments import sizes, sweep
from gpt4v_jax.model import presets

VARIANTS = {
    "concat": {},
    "prefix_lm": {"model.fusion.kind": "prefix_lm"},
    "cross_attention": {"model.fusion.kind": "cross_attention", "data.image.per_row": 12},
    "resampler": {"model.fusion.kind": "resampler", "model.fusion.tokens": 9},
    "encoder_decoder": {
        "model.fusion.kind": "encoder_decoder", "model.context": 96, "model.source_context": 192,
        "data.image.per_row": 7,
    },
    "experts": {"model.fusion.kind": "experts"},
}  # fmt: skip

# Idefics2's models, finding 2: SigLIP So400m and Mistral 7B; 64 vectors of a picture by a perceiver of 3 blocks; the
# language model frozen, or with LoRA. Rows, steps, rank, optimizer and data are ours.
PAPER = {
    "model": {**presets.MODELS["mistral-7b-v0.1"], "context": 2048, "embed_norm": False},
    "model.image": {**presets.IMAGES["siglip-image-so400m/14-384"], "pool": "none", "patch_norm": False},
    "model.fusion": {"tokens": 64, "depth": 3}, "data.image.per_row": 8, "batch": 1024, "steps": 5000,
    "compute.dtype": "bfloat16",
}  # fmt: skip
KEPT = r"^(text|backbone|head)/(?!.*cross)"  # the language model, less what cross-attention adds to its blocks
OURS = r"^(image|fusion)/|cross"  # what is trained beside LoRA's matrices
PAPER_WAYS = {"autoregressive": {}, "cross_attention": {"model.fusion.into": "memory"}}
PAPER_TRAINING = {
    "lora": {"lora.rank": 64, "lora.pattern": r"^backbone/.*/(attention|mlp)/.*kernel$", "lora.also": OURS},
    "frozen": {"optim.frozen": KEPT},
}
PAPER_VARIANTS = {
    f"{way}_{training}": {"model.fusion.kind": "resampler", **PAPER_WAYS[way], **PAPER_TRAINING[training]}
    for way in PAPER_WAYS for training in PAPER_TRAINING
}  # fmt: skip
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SHORT, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL, smoke=sizes.SMOKE),
    "paper": sweep.Sweep(sizes.BASE, PAPER_VARIANTS, PAPER, plan_only=True),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
