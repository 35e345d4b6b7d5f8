"""Sentences of film reviews, negative or positive: a small classifier of texts, which answers with the label's name.

python -m gpt4v_jax.train --config configs/polarity.py --workdir runs/polarity
python -m gpt4v_jax.evaluate --workdir runs/polarity

Measured, one run: 0.739 (0.712 to 0.765) of 1,066 test questions, counted answers 0.464, validation 0.768, at b1d3c20,
in 13.7 minutes on two cores with other work beside it. Context: 0.793 TF-IDF and logistic regression, on another tenth;
0.761 a convolution from scratch in ten folds (Kim 2014, from memory). docs/moderation.md uses it.
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
