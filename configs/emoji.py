"""Captions of emoji in five languages, and which caption belongs to which picture.

python -m gpt4v_jax.train --config configs/emoji.py --workdir runs/emoji

Measured: recall at 1 0.074 (0.050 to 0.101) among 176 test pictures, in 20.9 minutes on one core of two, at 4f64968; a
neighbour by colour has 0.163: docs/results/modalities.md
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config_lib.arguments(arg)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 1400, 16, 100, 350

    config.model.context = 192
    config.model.embed_norm = True
    config.model.image.update(size=72, patch=12, patch_norm=True)
    config.model.backbone.update(depth=4, width=128, heads=4, dropout=0.1)

    config.data.update(name="emoji", vocab=2000, turns=1, augment=("shift",))
    config.data.image.per_row = 4

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    # Pictures times captions are scored: of 50 pictures in training, of all of a split by gpt4v_jax.evaluate.
    config.eval.update(evaluators=("questions", "retrieval"), every=700, limit=50)
    config.eval.best = "retrieval/accuracy"
    return config
