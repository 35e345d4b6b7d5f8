"""The well-known character-level Shakespeare set-up for a CPU.

python -m gpt4v_jax.train --config configs/char_shakespeare.py --workdir runs/char_shakespeare

The published validation loss of this set-up is 1.88. Measured: 1.677 (docs/results/shakespeare.md).
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config = config_lib.default()
    config.steps, config.batch = 2000, 12
    config.save_every = 1000
    config.data.name, config.data.tokenizer = "tiny_shakespeare", "char"
    config.model.context = 64
    config.model.backbone.update(depth=4, width=128, heads=4, dropout=0.0)
    config.eval.evaluators, config.eval.every = ("windows",), 500
    return config
