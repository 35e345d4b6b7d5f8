"""How much of the training should be captions, and how much plain text, for questions about pictures?

python -m experiments.mixture --workdir runs/mixture [--size toy|small] [--jobs 2] [--plan]

MM1 (McKinzie et al. 2024, arXiv 2403.09611) settles on captions, interleaved documents and text at 5 : 5 : 1:
interleaved data help with few examples, text keeps what the model knows of text. Here a picture has a document of up to
eight questions and up to four of a caption each, and the plain text is the scenes in words; an epoch of the mixture
reads a share of it. FLOPs are equal, so what is read more of one is read less of the others.
"""

from experiments import sizes, sweep


def text(share: float) -> dict:
    return {"data.mixture": ("digits_world", f"digits_world/plain: {share}")}


VARIANTS = {
    "captions_4": {},
    "captions_1": {"data.captions": 1},
    "questions_alone": {"data.captions": 0},
    "text_quarter": text(0.25),
    "text_whole": text(1),
}
METRIC = "questions@digits_world/accuracy"  # evaluators name their data set where several are read
COMMON = {"data.mixture": ("digits_world",), "eval.evaluators": ("questions@digits_world",), "eval.best": METRIC}
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.TOY | COMMON, metric=METRIC, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL | COMMON, metric=METRIC, smoke=sizes.SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
