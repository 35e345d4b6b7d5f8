"""A language model learns to see in two stages (Liu et al. 2023): what reads pictures is aligned to it by captions
while it stands still; then both learn to answer questions, with all of their parameters or, by LoRA, with few.

python -m gpt4v_jax.train --config configs/two_stage.py:stage=text --workdir runs/two_stage/text
python -m gpt4v_jax.train --config configs/two_stage.py:stage=align --workdir runs/two_stage/align
python -m gpt4v_jax.train --config configs/two_stage.py:stage=instruct --workdir runs/two_stage/instruct
python -m gpt4v_jax.train --config configs/two_stage.py:stage=lora --workdir runs/two_stage/lora
python -m gpt4v_jax.interop merge runs/two_stage/lora --out runs/two_stage/merged

stage=text is the model to align to: captions of scenes without their pictures. The image encoder starts from random
values, so it is aligned with its connector.

Measured (d74027f; lora 20276b5), one seed, a shared machine: of 4,672 test questions stage=instruct has 0.348,
stage=lora 0.326, permuted pictures 0.227 and 0.225, counted answers 0.244. docs/finetuning.md has the parts.
"""

from gpt4v_jax import config as config_lib

STEPS = {"text": 300, "align": 600, "instruct": 600, "lora": 600}
BEFORE = {"text": "", "align": "text", "instruct": "align", "lora": "align"}  # each begins with the weights of another


def get_config(arg: str = ""):
    """Arguments: stage=text|align|instruct|lora; from, the workdir of the stage before."""
    arg = config_lib.arguments(arg, stage="text", **{"from": ""})
    stage = arg["stage"]
    config_lib.one_of("stage", stage, tuple(STEPS))
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = STEPS[stage], 8, 50, 200

    config.model.context = 256
    config.model.embed_norm = True
    config.model.backbone.update(depth=4, width=128, heads=4)
    config.optim.update(name="muon", lr=5e-3, final=0.0, warmup=50)

    config.data.update(name="digits_world/text", turns=0)
    if stage == "text":
        return config

    before = arg["from"] or f"runs/two_stage/{BEFORE[stage]}"
    config.init_from.run, config.data.tokenizer = before, f"{before}/tokenizer.json"  # the same tokens in the table
    config.data.name = "digits_world"
    config.data.image.per_row = 7
    encoder = config_lib.section(config_lib.Backbone)
    encoder.update(depth=2, width=128, heads=4)
    config.model.image.update(size=72, patch=24, patch_norm=True, encoder=encoder)
    if stage == "align":
        config.optim.frozen = "^(?!image/)"
        return config

    config.data.update(turns=8, captions=0)
    config.eval.update(evaluators=("questions", "permuted"), every=300, limit=100, best="questions/accuracy")
    if stage == "instruct":
        config.optim.lr = 2e-3
    else:
        # The table, too: captions have taught it no word of a question.
        config.lora.update(rank=16, pattern=r"^backbone/.*(attention|mlp)/.*kernel$", also="^(image|text)/")
    return config
