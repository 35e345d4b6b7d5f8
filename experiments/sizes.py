"""What experiments on digits world have in common: how long a run of each size is, how large its model, what --smoke
makes smaller. A file's own overrides go over these."""

from typing import Any

from gpt4v_jax.model import presets

BASE = "configs/digits_world.py"
TOY = {"steps": 1200, "log_every": 50, "save_every": 300, "eval.every": 300, "eval.evaluators": ("questions",)}
SHORT = TOY | {"steps": 700, "save_every": 350, "eval.every": 350}
SMALL = {
    "steps": 20_000, "batch": 64, "log_every": 100, "save_every": 1000, "eval.every": 2000, "compute.dtype": "bfloat16",
    "model.backbone.depth": 8, "model.backbone.width": 384, "model.backbone.heads": 6, "optim.lr": 2e-3,
    "optim.warmup": 500, "eval.evaluators": ("questions",),
}  # fmt: skip
SMOKE = {"data.name": "digits_world/small", "model.backbone.depth": 2, "model.backbone.width": 16,
         "model.backbone.heads": 2}  # fmt: skip
# The models and the budget of PaliGemma's first stage: SigLIP So400m, Gemma 2B, 256 patches of a picture and 128 tokens
# of text, 1e9 examples, one a row. Rows a step, optimizer and data are ours: it is there for its plan.
PALIGEMMA = {
    "model": {**presets.MODELS["gemma-2b"], "vocab": 257_152, "context": 384, "embed_norm": False},
    "model.image": {**presets.IMAGES["siglip-image-so400m/14-224"], "pool": "none", "patch_norm": False},
    "data.image.per_row": 1, "batch": 8192, "steps": 10**9 // 8192, "compute.dtype": "bfloat16",
}  # fmt: skip


def encoder(depth: int, width: int, heads: int) -> dict[str, Any]:
    """-> the overrides that give pictures an encoder of their own."""
    return {"model.image.encoder": {"depth": depth, "width": width, "heads": heads}}


TOY_ENCODER, SMALL_ENCODER, SMOKE_ENCODER = encoder(2, 128, 4), encoder(4, 384, 6), encoder(1, 16, 2)


def words(steps: int) -> dict[str, Any]:
    """-> a stage of so many steps that makes a language model of scenes in words, without pictures: of captions
    with questions that they answer, and of conversations as they come later, whose form alone can be learnt."""
    mixture = ("digits_world/plain", "digits_world/text")
    return {"data.mixture": mixture, "model.image.size": 0, "steps": steps}
