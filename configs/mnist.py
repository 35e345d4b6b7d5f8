"""Handwritten digits, answered in text.

python -m gpt4v_jax.train --config configs/mnist.py --workdir runs/mnist

Measured: 0.991 (0.989 to 0.992) of 10,000 test digits in 12.9 minutes on 2 cores, at cfb7bcd:
docs/results/modalities.md
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config_lib.arguments(arg)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 1500, 32, 100, 500

    config.model.context = 100  # four digits a row
    config.model.embed_norm = True
    config.model.image.update(size=28, patch=7, patch_norm=True)
    config.model.backbone.update(depth=4, width=128, heads=4)

    config.data.update(name="mnist", vocab=300, augment=("shift",))
    config.data.image.per_row = 4

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.update(evaluators=("questions",), every=500, limit=1000, best="questions/accuracy")
    return config
