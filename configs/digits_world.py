"""Questions about scenes of real handwritten digits and drawn shapes, answered from the picture.

python -m gpt4v_jax.train --config configs/digits_world.py --workdir runs/digits_world
python -m gpt4v_jax.train --config configs/digits_world.py:pictures=blank --workdir runs/digits_world_blank

Measured: 0.945 of 4,672 test questions, "what digit is the red one?" 0.955, in 22.8 minutes on 2 cores, beside 0.244 by
counted answers and 0.210 with pictures permuted; of pairs never seen in training 0.795: docs/results/digits_world.md
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    """Arguments: fusion=KIND (docs/fusion.md), pictures=real|blank (blank trains the blind baseline)."""
    arg = config_lib.arguments(arg, fusion="concat", pictures="real")
    config = config_lib.default()
    config.steps, config.batch, config.log_every = 4000, 8, 100

    config.model.context = 256
    config.model.embed_norm = True
    config.model.image.update(size=72, patch=24, patch_norm=True)  # 3 x 3 patches: each is a cell of the scene
    config.model.backbone.update(depth=4, width=128, heads=4)
    config.model.fusion.kind = arg["fusion"]

    config.data.name = "digits_world"
    config.data.blank = ("image",) if arg["pictures"] == "blank" else ()
    config.data.image.per_row = 7

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.evaluators = ("questions", "permuted")
    config.eval.every, config.eval.limit = 500, 100
    config.eval.best = "questions/accuracy"
    return config
