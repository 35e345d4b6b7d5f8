"""Which objective on plain text is the best start for a model that answers questions about pictures?

python -m experiments.objective --workdir runs/objective [--size toy|small] [--jobs 2] [--plan]

Next tokens (GPT), masked tokens read both ways (BERT, Devlin et al. 2019), or what follows a prefix that is read both
ways (Raffel et al. 2020, arXiv 1910.10683, section 3.2): there encoder-decoders that fill in spans do best, and of
models with one stack the prefix-LM is ahead of the causal one. Here the text is digits world's in words (a caption,
then questions with answers), the task its questions about pictures, and both stages together have the same FLOPs.
"""

from typing import Any

from experiments import sizes, sweep


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """steps: of training on text."""
    text = {"data.name": "digits_world/plain", "model.image.size": 0, "steps": steps}
    objectives = {"causal": "next_token", "masked": "masked", "prefix": "prefix"}
    return {"nothing": {}} | {
        name: {"before": text | {"data.objective": objective}} for name, objective in objectives.items()
    }


SIZES = {
    "toy": sweep.Sweep(sizes.BASE, variants(400), sizes.TOY, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, variants(6000), sizes.SMALL, smoke=sizes.SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
