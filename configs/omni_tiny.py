r"""One small model on text, questions about pictures, clips and speech.

python -m gpt4v_jax.train --config configs/omni_tiny.py --workdir runs/omni_tiny

The same model on one of its data sets, with as many positions of it and the same vocabulary (runs/omni_poetry,
omni_easyvqa, omni_moving_digits, omni_fsdd):

python -m gpt4v_jax.train --config configs/omni_tiny.py:only=fsdd/george --workdir runs/omni_fsdd \
    --config.data.tokenizer=runs/omni_tiny/tokenizer.json

Measured together against alone, at 2602aa2, 47 minutes on one core of two: easy-VQA's test questions 0.841 against
0.795, moving digits' 0.521 against 0.524, digits said by known speakers 0.924 against 0.956 (of 250), songci 5.365
against 5.352 nats a character that is no white space: docs/results/omni.md
"""

from gpt4v_jax import config as config_lib

# How often an epoch reads each: about as many positions of each.
MIXTURE = {"poetry/songci": 1.3, "easyvqa": 0.97, "moving_digits": 0.18, "fsdd/george": 1.45}
# Steps of one row, alone, that read as many positions of a data set as 1,000 steps of four rows of all of them.
ALONE = {"poetry/songci": 895, "easyvqa": 1260, "moving_digits": 938, "fsdd/george": 973}
EVALUATORS = {"poetry/songci": ("windows",), "easyvqa": ("questions", "permuted"),
              "moving_digits": ("questions", "permuted"), "fsdd/george": ("questions", "permuted")}  # fmt: skip


def get_config(arg: str = ""):
    """Arguments: only, one data set of MIXTURE; all of them otherwise."""
    only = config_lib.arguments(arg, only="")["only"]
    if only:
        config_lib.one_of("only", only, tuple(MIXTURE))
    names, rows = ([only], 1) if only else (list(MIXTURE), 4)
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = ALONE.get(only, 1000), rows, 50, 250

    config.model.context = 1024
    config.model.embed_norm = True
    config.model.backbone.update(depth=4, width=128, heads=4, dropout=0.1)
    config.model.image.update(size=64, patch=8, patch_norm=True)
    config.model.video.update(size=40, patch=20, frames=8, tubelet=2, patch_norm=True)
    config.model.audio.update(bins=80, patch=4, seconds=6.0, center=True, patch_norm=True)

    config.data.mixture = tuple(f"{name}: {MIXTURE[name]}" for name in names)
    config.data.update(vocab=4000, turns=4, captions=1, window=64, augment=("shift", "voice", "mask"))
    share = 4 // rows  # of a row is one data set's
    config.data.image.per_row = 3 * share
    config.data.video.per_row = 5 * share
    config.data.audio.update(per_row=10 * share, patches=208 * share)

    config.optim.update(name="muon", lr=5e-3, final=0.0)

    config.eval.update(every=1000, limit=100, batch=8)  # at the end: answers of four data sets take minutes
    at = "@{}" if len(names) > 1 else ""
    config.eval.evaluators = tuple(e + at.format(name) for name in names for e in EVALUATORS[name])
    return config
