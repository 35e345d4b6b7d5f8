"""Which way of joining pictures and text is best when the language model is frozen?

python -m experiments.fusion_frozen --workdir runs/fusion_frozen [--size toy|small] [--jobs 2] [--plan]

The source is Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, finding 2): with a frozen language model
cross-attention is better, with one trained by LoRA the fully autoregressive way (`concat`) is. Here a language model of
scenes in words, with questions about them, is trained first, in each run anew; then it stands still, and the image
encoder and what a kind adds to the blocks (gated cross-attention, weights of its own for pictures, a separate encoder)
learn questions about pictures. `_trained`: all learn. experiments/fusion.py has the kinds without a stage before. FLOPs
are counted as if nothing were frozen.
"""

from experiments import fusion, sizes, sweep

FROZEN = {"optim.frozen": r"^(text|embed_norm|backbone)/(?!.*(cross|image_))"}  # not what a kind adds to the blocks
TRAINED = ("concat", "cross_attention")


def variants(steps: int) -> dict[str, dict]:
    """steps: of the stage before, which is the same for all."""
    before = {"before": sizes.words(steps)}
    out = {name: before | FROZEN | own for name, own in fusion.VARIANTS.items()}
    return out | {f"{name}_trained": before | fusion.VARIANTS[name] for name in TRAINED}


SMOKE = sizes.SMOKE | sizes.SMOKE_ENCODER
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, variants(300), sizes.SHORT | sizes.TOY_ENCODER, smoke=SMOKE),
    "small": sweep.Sweep(sizes.BASE, variants(4000), sizes.SMALL | sizes.SMALL_ENCODER, smoke=SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
