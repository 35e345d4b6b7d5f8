"""The smallest run with everything in it: pictures, dropout, shuffling, evaluation. It learns next to nothing.

python -m gpt4v_jax.train --config configs/tiny.py --workdir runs/tiny

What make soak runs. Measured: docs/results/exactness.md.
"""

from gpt4v_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 20, 8, 1, 5
    config.model.context = 128
    config.model.image.update(size=24, patch=12)
    config.model.backbone.update(depth=2, width=16, heads=2, dropout=0.1)
    config.optim.warmup = 4
    config.data.update(name="digits_world/small", vocab=400, turns=2)
    config.eval.update(batch=16, limit=4, every=10, evaluators=("questions",), best="questions/accuracy")
    return config
