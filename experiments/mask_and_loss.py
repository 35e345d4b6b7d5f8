"""Should a picture and its prompt see each other (prefix-LM), and should the loss be on answers alone?

python -m experiments.mask_and_loss --workdir runs/mask_and_loss [--size toy|small|paper] [--jobs 2] [--plan]

The source is PaliGemma (Beyer et al. 2024, arXiv 2407.07726, section 5): there prefix-LM, with the loss on the answer
alone, does best in the mean over its transfer tasks. `_all_text` also trains the questions, but for those that lie in
a block: a prompt that sees itself whole cannot be predicted, so under prefix-LM a document's first question is left
out. A mask costs no FLOPs in the count that is matched, so steps are equal.

Measured: toy, 45 minutes on 2 cores (617ca20): 0.376 to 0.384 of the test questions, and nothing tells the four apart:
docs/results/mask_and_loss.md
"""

from experiments import sizes, sweep

ALL_TEXT = {"objective.answers_only": False}
VARIANTS = {
    "causal": {},  # a picture is a block that sees itself; the prompt is causal
    "prefix_lm": {"model.fusion.kind": "prefix_lm"},  # picture and prompt, up to the first answer, are one block
    "causal_all_text": ALL_TEXT,
    "prefix_lm_all_text": {"model.fusion.kind": "prefix_lm", **ALL_TEXT},
}
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.TOY | {"steps": 500, "eval.every": 250}, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL, smoke=sizes.SMOKE),
    "paper": sweep.Sweep(sizes.BASE, VARIANTS, sizes.PALIGEMMA, plan_only=True),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
