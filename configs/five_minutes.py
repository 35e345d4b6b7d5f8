"""Each way of joining pictures and text in five minutes of two cores: quickstart.py with half the blocks.

python -m gpt4v_jax.train --config configs/five_minutes.py:KIND --workdir runs/five_minutes/KIND
python -m gpt4v_jax.evaluate --workdir runs/five_minutes/KIND
"""

from configs import quickstart
from gpt4v_jax import config as config_lib

STEPS = {"concat": 1200, "prefix_lm": 1200, "cross_attention": 1000, "resampler": 1000, "q_former": 1000,
         "pooled": 1100, "encoder_decoder": 1000, "experts": 1000}  # fmt: skip


def get_config(kind: str = "concat"):
    config_lib.one_of("kind", kind, tuple(STEPS))
    config = quickstart.get_config(f"fusion={kind}")
    config.steps, config.eval.every, config.save_every = STEPS[kind], 0, 10_000
    config.model.backbone.depth = 2
    if kind == "encoder_decoder":
        # A row holds five conversations; an answer reads its own question, not all before it.
        config.model.context, config.model.source_context, config.data.image.per_row = 96, 136, 5
        config.model.fusion.latest = True
    if kind == "pooled":
        config.model.fusion.update(tokens=9, every=1)  # a query for each cell of the scene
    if kind == "cross_attention":
        config.model.fusion.every = 1
    return config
