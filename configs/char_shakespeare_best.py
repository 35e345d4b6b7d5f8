"""Character-level Shakespeare: the best recipe found for about ten minutes of two CPU cores.

python -m gpt4v_jax.train --config configs/char_shakespeare_best.py --workdir runs/char_shakespeare_best

The budget: 1,600 steps of 2,048 characters, 3.28 million in all, 19.4 GFLOP a step, 31 TFLOP in all.
Measured: 1.469, in 10.3 minutes (docs/results/shakespeare.md).
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config_lib.arguments(arg)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 1600, 8, 50, 400

    config.model.context = 256
    config.model.embed_norm = True
    config.model.backbone.update(depth=6, width=128, heads=4)

    config.data.update(name="tiny_shakespeare", tokenizer="char")
    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.evaluators, config.eval.every = ("windows",), 400
    config.eval.best, config.eval.best_mode = "windows/loss", "min"
    return config
