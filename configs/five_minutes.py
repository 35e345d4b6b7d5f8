"""Each way of joining pictures and text in five minutes of two cores: quickstart.py with two blocks in place of four,
media read in each, and steps that fit; encoder_decoder and pooled have settings of their own.

python -m gpt4v_jax.train --config configs/five_minutes.py:fusion=KIND --workdir runs/five_minutes/KIND
python -m gpt4v_jax.evaluate --workdir runs/five_minutes/KIND

Measured: 3.7 to 4.8 minutes of training; of 4,672 test questions cross_attention 0.666, concat 0.590, prefix_lm 0.580,
resampler 0.562, q_former 0.529, encoder_decoder 0.503, pooled 0.491, experts 0.474; blind (counted answers) 0.244:
docs/results/five_minutes.md
"""

from configs import quickstart
from gpt4v_jax import config as config_lib

STEPS = {"concat": 1000, "prefix_lm": 1000, "cross_attention": 850, "resampler": 950, "q_former": 950, "pooled": 900,
         "encoder_decoder": 950, "experts": 800}  # fmt: skip


def get_config(arg: str = ""):
    """Argument: fusion=KIND (docs/fusion.md)."""
    kind = config_lib.arguments(arg, fusion="concat")["fusion"]
    config_lib.one_of("fusion", kind, tuple(STEPS))
    config = quickstart.get_config(f"fusion={kind}")
    config.steps, config.eval.every, config.save_every = STEPS[kind], 0, 1000
    config.model.backbone.depth = 2
    config.model.fusion.every = 1
    if kind == "encoder_decoder":
        # A row holds five conversations; an answer reads its own question, not all before it.
        config.model.context, config.model.source_context, config.data.image.per_row = 96, 136, 5
        config.model.fusion.latest = True
    if kind == "pooled":
        config.model.fusion.tokens = 9  # a query for each cell of the scene
    return config
