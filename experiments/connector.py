"""What should stand between an image encoder and the language model, at an equal number of FLOPs?

python -m experiments.connector --workdir runs/connector [--size toy|small|paper] [--jobs 2] [--plan]

Publications disagree. PaliGemma (Beyer et al. 2024, arXiv 2407.07726, section 5): a linear map is at least as good as
an MLP. LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): an MLP of two layers is better than a linear map. MM1 (McKinzie
et al. 2024, arXiv 2403.09611): the connector hardly matters beside resolution and the number of visual tokens. Here
linear and MLP keep the 36 patches of a picture, the others make 9 of them, so that a row holds more pictures.
"""

from experiments import sizes, sweep

NINE = {"data.image.per_row": 7}  # pictures of 9 vectors that a row has room for
VARIANTS = {
    "linear": {},
    "mlp2x_gelu": {"model.fusion.connector": "mlp2x_gelu"},
    "pool": {"model.fusion.connector": "pool", **NINE},
    "pixel_shuffle": {"model.fusion.connector": "pixel_shuffle", **NINE},
    "resampler": {"model.fusion.kind": "resampler", "model.fusion.tokens": 9, **NINE},
}
COMMON = {"model.image.patch": 12, "data.image.per_row": 4}
TOY = sizes.SHORT | sizes.TOY_ENCODER | COMMON
PAPER = {name: VARIANTS[name] for name in ("linear", "mlp2x_gelu")}  # PaliGemma's comparison
SMOKE = sizes.SMOKE | sizes.SMOKE_ENCODER
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, TOY, smoke=SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL | sizes.SMALL_ENCODER | COMMON, smoke=SMOKE),
    "paper": sweep.Sweep(sizes.BASE, PAPER, sizes.PALIGEMMA, plan_only=True),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
