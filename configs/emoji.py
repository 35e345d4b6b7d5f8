"""Captions of emoji in five languages, and which caption belongs to which picture.

python -m gpt4v_jax.train --config configs/emoji.py --workdir runs/emoji

Measured: not yet.
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config_lib.arguments(arg)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 1200, 16, 100, 300

    config.model.context = 192
    config.model.embed_norm = True
    config.model.image.update(size=72, patch=12, patch_norm=True)
    config.model.backbone.update(depth=4, width=128, heads=4, dropout=0.1)

    config.data.update(name="emoji", vocab=4000, turns=2, augment=("shift",))
    config.data.image.items = 3

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.update(evaluators=("retrieval",), every=300)
    return config
