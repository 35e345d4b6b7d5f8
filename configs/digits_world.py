"""Questions about scenes of handwritten digits and shapes.

python -m gpt4v_jax.train --config configs/digits_world.py --workdir runs/digits_world
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config = config_lib.default()
    config.steps, config.batch = 4000, 16
    config.log_every = 100
    config.model.context = 256
    config.model.image.update(size=72, patch=12)
    config.model.backbone.update(depth=4, width=128, heads=4)
    config.data.media = 4
    config.eval.evaluators = ("questions", "permuted")
    config.eval.best = "questions/accuracy"
    return config
