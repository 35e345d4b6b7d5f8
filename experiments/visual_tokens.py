"""How many vectors should a picture have, at an equal number of FLOPs?

python -m experiments.visual_tokens --workdir runs/visual_tokens [--size toy|small] [--jobs 2] [--plan]

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, finding 4): there fewer visual tokens, by learned
pooling, are cheaper and do better. Here a picture of digits world, 3 x 3 cells of 24 pixels, is cut into 36 patches;
`pool` takes the mean of them, 2 x 2 or 3 x 3 at a time, after their linear map, `resampler` as many vectors by learned
queries. Of larger patches 9 are a cell each, and 4 hold parts of several. A row has room for as many pictures as it can
hold.
"""

from experiments import sizes, sweep


def pool(side: int) -> dict:
    return {"model.fusion": {"connector": "pool", "side": side}}


def resampler(tokens: int) -> dict:
    return {"model.fusion": {"kind": "resampler", "tokens": tokens}}


VARIANTS = {
    "all_36": {"data.image.per_row": 4},
    "pool_9": {**pool(2), "data.image.per_row": 7},
    "pool_4": {**pool(3), "data.image.per_row": 8},
    "resampler_9": {**resampler(9), "data.image.per_row": 7},
    "resampler_4": {**resampler(4), "data.image.per_row": 8},
    "patches_9": {"model.image.patch": 24, "data.image.per_row": 7},
    "patches_4": {"model.image.patch": 36, "data.image.per_row": 8},
}
PATCH = {"model.image.patch": 12}
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.TOY | PATCH, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL | PATCH, smoke=sizes.SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
