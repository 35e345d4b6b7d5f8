"""Should a model that answers questions about pictures first be trained contrastively, or on captions?

python -m experiments.contrastive_first --workdir runs/contrastive_first [--size toy|small] [--jobs 2] [--plan]

Vision-language models mostly begin with encoders trained on pairs (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023,
arXiv 2303.15343). CapPa (Tschannen et al. 2023, arXiv 2306.07915): with the same data and compute, encoders that were
trained by captioning classify about as well, and are ahead in tasks of pictures and language. Here the whole model,
with an encoder of its own for pictures, learns from pairs of a scene and a caption, or from captions, or from nothing,
and then from questions; all stages together have the same FLOPs.
"""

from typing import Any

from experiments import sizes, sweep


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """steps: of the stage before."""
    pairs = {"objective.contrastive": 1.0, "model.embed": 64, "data.turns": 0, "data.captions": 0, "steps": steps}
    return {
        "nothing": {},
        "captions": {"before": {"data.turns": 0, "data.captions": 4, "steps": steps}},
        "sigmoid": {"before": pairs},
        "softmax": {"before": pairs | {"objective.contrastive_loss": "softmax"}},
    }


COMMON = {"data.captions": 0}  # the last stage of all: questions alone
SMOKE = sizes.SMOKE | sizes.SMOKE_ENCODER
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, variants(400), sizes.TOY | sizes.TOY_ENCODER | COMMON, smoke=SMOKE),
    "small": sweep.Sweep(sizes.BASE, variants(6000), sizes.SMALL | sizes.SMALL_ENCODER | COMMON, smoke=SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
