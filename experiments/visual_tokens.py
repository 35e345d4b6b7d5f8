"""How many patches should a picture have, at an equal number of FLOPs?

python -m experiments.visual_tokens --workdir runs/visual_tokens [--size toy|small] [--jobs 2] [--plan]

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, finding 4): there fewer visual tokens, by learned
pooling, are cheaper and do better. Here a picture of digits world, 3 x 3 cells of 24 pixels, is cut into 36, 9 or 4
patches: with 9 a patch is a cell, with 4 it holds parts of several. A row has room for as many pictures as it can hold.
"""

from experiments import mask_and_loss, sweep

VARIANTS = {
    "patch_24": {"model.image.patch": 24, "data.image.items": 7},
    "patch_12": {"model.image.patch": 12, "data.image.items": 4},
    "patch_36": {"model.image.patch": 36, "data.image.items": 8},
}
BASE, SMOKE = mask_and_loss.BASE, mask_and_loss.SMOKE
SIZES = {
    "toy": sweep.Sweep(BASE, VARIANTS, mask_and_loss.TOY, smoke=SMOKE),
    "small": sweep.Sweep(BASE, VARIANTS, mask_and_loss.SMALL, smoke=SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
