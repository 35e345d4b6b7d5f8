"""Which way of joining pictures and text is best for questions about easy-VQA's pictures, at an equal number of FLOPs?

python -m experiments.fusion_easyvqa --workdir runs/fusion_easyvqa [--size toy|small] [--jobs 2] [--plan]

experiments/fusion.py's question, its sources and its kinds, on another data set: one shape a picture of 64 x 64 pixels,
64 patches, and the questions of the set's authors (vqa-easyvqa; docs/data.md says where it comes from). A picture takes
64 positions of a row under `concat`, 9 under `resampler`, one under `cross_attention`.
"""

from experiments import sizes, sweep

VARIANTS = {
    "concat": {},
    "prefix_lm": {"model.fusion.kind": "prefix_lm"},
    "cross_attention": {"model.fusion.kind": "cross_attention", "model.context": 120},
    "resampler": {"model.fusion.kind": "resampler", "model.fusion.tokens": 9, "model.context": 128},
    "encoder_decoder": {
        "model.fusion.kind": "encoder_decoder", "model.context": 48, "model.source_context": 176,
    },
    "experts": {"model.fusion.kind": "experts"},
}  # fmt: skip
BASE = "configs/easyvqa.py"
TOY = {"steps": 600, "log_every": 50, "save_every": 300, "eval.every": 300, "eval.evaluators": ("questions",)}
SMALL = sizes.SMALL | {"steps": 10_000, "eval.every": 1000}
SMOKE = {"model.backbone.depth": 2, "model.backbone.width": 16, "model.backbone.heads": 2}
SIZES = {
    "toy": sweep.Sweep(BASE, VARIANTS, TOY, smoke=SMOKE),
    "small": sweep.Sweep(BASE, VARIANTS, SMALL, smoke=SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
