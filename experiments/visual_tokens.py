"""How many patches should a picture have, at an equal number of FLOPs?

python -m experiments.visual_tokens --workdir runs/visual_tokens [--size toy|small] [--jobs 2] [--plan]

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, finding 4): there fewer visual tokens, by learned
pooling, are cheaper and do better. Here a picture of digits world, 3 x 3 cells of 24 pixels, is cut into 36, 9 or 4
patches: with 9 a patch is a cell, with 4 it holds parts of several. `pool` takes the mean of the 36, 2 x 2 or 3 x 3
at a time, after their linear map. A row has room for as many pictures as it can hold.
"""

from experiments import sizes, sweep


def pool(side: int) -> dict:
    return {"model.image.patch": 12, "model.fusion": {"connector": "pool", "side": side}}


VARIANTS = {
    "patch_24": {"model.image.patch": 24, "data.image.per_row": 7},
    "patch_12": {"model.image.patch": 12, "data.image.per_row": 4},
    "patch_36": {"model.image.patch": 36, "data.image.per_row": 8},
    "pool_24": {**pool(2), "data.image.per_row": 7},
    "pool_36": {**pool(3), "data.image.per_row": 8},
}
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.TOY, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL, smoke=sizes.SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
