"""Questions about clips of moving handwritten digits: which one, which way, how many, who came first.

python -m gpt4v_jax.train --config configs/moving_digits.py --workdir runs/moving_digits
python -m gpt4v_jax.train --config configs/moving_digits.py:frames=1 --workdir runs/moving_digits_still

Measured: 0.855 (0.844 to 0.865) of 4,716 test questions, 0.341 with a single frame; question alone 0.212. 36.1 minutes
each on one core of two, at 29a0414: docs/results/modalities.md. The bar is 0.30 above a single frame.
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    """Arguments: frames=8 (1: the same model sees a single frame, the middle one)."""
    arg = config_lib.arguments(arg, frames="8")
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 3000, 8, 100, 500

    config.model.context = 256  # clips with their questions
    config.model.embed_norm = True
    tubelet = 2 if arg["frames"] == "8" else 1
    config.model.video.update(size=40, patch=20, frames=int(arg["frames"]), tubelet=tubelet, patch_norm=True)
    config.model.backbone.update(depth=4, width=128, heads=4)

    config.data.update(name="moving_digits", vocab=320, turns=8, captions=1)
    config.data.video.per_row = 6

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.update(evaluators=("questions", "permuted"), every=500, limit=200, best="questions/accuracy")
    return config
