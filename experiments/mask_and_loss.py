"""Should a picture and its prompt see each other (prefix-LM), or is a causal mask enough?

python -m experiments.mask_and_loss --workdir runs/mask_and_loss [--size toy|small|paper] [--jobs 2] [--plan]

The source is PaliGemma (Beyer et al. 2024, arXiv 2407.07726, section 5): there prefix-LM, with the loss on the answer
alone, does best in the mean over its transfer tasks. Here both variants train on answers and captions alone, and a mask
costs no FLOPs in the count that is matched, so steps are equal.
"""

from experiments import sweep
from gpt4v_jax.model import presets

VARIANTS = {
    "causal": {},  # a picture is a block that sees itself; the prompt is causal
    "prefix_lm": {"model.fusion.kind": "prefix_lm"},  # picture and prompt, up to the first answer, are one block
}
TOY = {"steps": 1200, "log_every": 50, "save_every": 300, "eval.every": 300, "eval.evaluators": ("questions",)}
SMALL = {
    "steps": 20_000, "batch": 64, "log_every": 100, "save_every": 1000, "eval.every": 2000, "compute.dtype": "bfloat16",
    "model.backbone.depth": 8, "model.backbone.width": 384, "model.backbone.heads": 6, "optim.lr": 2e-3,
    "optim.warmup": 500, "eval.evaluators": ("questions",),
}  # fmt: skip
SMOKE = {"data.name": "digits_world/small", "model.backbone.depth": 2, "model.backbone.width": 16,
         "model.backbone.heads": 2}  # fmt: skip
BASE = "configs/digits_world.py"
# PaliGemma's first stage: SigLIP So400m, Gemma 2B, 256 patches of a picture and 128 tokens of text, 1e9 examples,
# one a row. How many rows a step has is ours: FLOPs are those of rows x steps.
PAPER = {
    "model": {**presets.MODELS["gemma-2b"], "vocab": 257_152, "context": 384, "embed_norm": False},
    "model.image": {**presets.IMAGES["siglip-image-so400m/14-224"], "pool": "none", "patch_norm": False},
    "data.image.items": 1, "batch": 8192, "steps": 10**9 // 8192, "compute.dtype": "bfloat16",
}  # fmt: skip
SIZES = {
    "toy": sweep.Sweep(BASE, VARIANTS, TOY, smoke=SMOKE),
    "small": sweep.Sweep(BASE, VARIANTS, SMALL, smoke=SMOKE),
    "paper": sweep.Sweep(BASE, VARIANTS, PAPER, plan_only=True),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
