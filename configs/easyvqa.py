"""Questions about one shape in a picture: what it is, and of which colour.

python -m gpt4v_jax.train --config configs/easyvqa.py --workdir runs/easyvqa
python -m gpt4v_jax.train --config configs/easyvqa.py:pictures=blank --workdir runs/easyvqa_blank

Measured: 0.961 (0.955 to 0.967) of the 9,673 test questions, in 28.6 minutes on one core of two, beside other work, at
585d5e6; counted answers 0.668, permuted pictures 0.592: docs/results/modalities.md
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    """Arguments: pictures=real|blank (blank trains the blind baseline)."""
    arg = config_lib.arguments(arg, pictures="real")
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 1600, 16, 100, 400

    config.model.context = 176  # a picture with its questions
    config.model.embed_norm = True
    config.model.image.update(size=64, patch=8, patch_norm=True)
    config.model.backbone.update(depth=4, width=128, heads=4)

    config.data.update(name="easyvqa", vocab=384, turns=10, augment=("shift", "flip"))
    config.data.blank = ("image",) if arg["pictures"] == "blank" else ()
    config.data.image.per_row = 1

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.update(evaluators=("questions", "permuted"), every=400, limit=200, best="questions/accuracy")
    return config
