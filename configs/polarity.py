"""Sentences of film reviews, negative or positive: a small classifier of texts, which answers with the label's name.

python -m gpt4v_jax.train --config configs/polarity.py --workdir runs/polarity
"""

from gpt4v_jax import config as config_lib


def get_config(arg: str = ""):
    config_lib.arguments(arg)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 600, 16, 50, 100

    config.model.context = 128
    config.model.embed_norm = True
    config.model.backbone.update(depth=2, width=128, heads=4, dropout=0.3)
    config.model.fusion.kind = "prefix_lm"  # a sentence is read both ways

    config.data.update(name="sentence_polarity", vocab=4000)

    config.optim.update(name="muon", lr=3e-3, final=0.0)

    config.eval.update(evaluators=("questions", "counted"), every=100, best="questions/accuracy")
    return config
