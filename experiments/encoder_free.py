"""Does a picture need an encoder of its own, or may its patches go straight into the language model?

python -m experiments.encoder_free --workdir runs/encoder_free [--size toy|small|paper] [--jobs 2] [--plan]

PaliGemma (Beyer et al. 2024, arXiv 2407.07726, section 5) tries raw patches in the place of its encoder, as Fuyu has
them: they are behind, but get better with more training. Shukor et al. 2025 (arXiv 2504.07951) find early fusion, all
from scratch, at least as good as late at small sizes. Here nothing is trained before, and steps make FLOPs equal: an
encoder's blocks are paid for with steps.

Measured: toy, 41.6 minutes on 2 cores (a8beaf8): raw 0.406, one block 0.392, two 0.375 of the test questions, no pair
told apart: docs/results/encoder_free.md
"""

from experiments import sizes, sweep

SIZES = {
    "toy": sweep.Sweep(
        sizes.BASE, {"raw": {}, "encoder_1": sizes.encoder(1, 128, 4), "encoder_2": sizes.TOY_ENCODER},
        sizes.TOY | {"steps": 600, "eval.every": 300}, smoke=sizes.SMOKE,
    ),
    "small": sweep.Sweep(
        sizes.BASE, {"raw": {}, "encoder_2": sizes.encoder(2, 384, 6), "encoder_4": sizes.SMALL_ENCODER}, sizes.SMALL,
        smoke=sizes.SMOKE,
    ),
    "paper": sweep.Sweep(
        sizes.BASE, {"encoder": {}, "raw": {"model.image.encoder": None}}, sizes.PALIGEMMA, plan_only=True
    ),
}  # fmt: skip

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
