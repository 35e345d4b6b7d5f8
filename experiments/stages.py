"""Must a model learn to see in stages, with parts of it frozen, or may it learn all at once?

python -m experiments.stages --workdir runs/stages [--size toy|small] [--jobs 2] [--plan]

LLaVA (Liu et al. 2023) has two stages: what reads pictures is aligned to a frozen language model, then both are
trained. Prismatic (Karamcheti et al. 2024, arXiv 2402.07865, section 4.1): one stage does as well and saves 20 to 25 %
of the compute. PaliGemma (Beyer et al. 2024, arXiv 2407.07726, section 5): it is best when nothing is frozen. Here the
language model has read scenes in words, with questions; what that takes counts: all have the same FLOPs together.
FLOPs are counted as if nothing were frozen, so stages with frozen parts are charged a little more than they take.
"""

from typing import Any

from experiments import sizes, sweep

FROZEN = {"optim.frozen": "^(?!image/)"}
LORA = {"lora.rank": 16, "lora.pattern": r"^backbone/.*(attention|mlp)/.*kernel$", "lora.also": "^image/"}


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """steps: of each stage before the last."""
    words, align = sizes.words(steps), {"data.turns": 0, "steps": steps, **FROZEN}
    return {
        "at_once": {},
        "text_all": {"before": words},
        "text_frozen": {"before": words, **FROZEN},
        "text_align_all": {"before": (words, align)},
        "text_lora": {"before": words, **LORA},
    }


SMOKE = sizes.SMOKE | sizes.SMOKE_ENCODER
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, variants(300), sizes.TOY | sizes.TOY_ENCODER, smoke=SMOKE),
    "small": sweep.Sweep(sizes.BASE, variants(4000), sizes.SMALL | sizes.SMALL_ENCODER, smoke=SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
