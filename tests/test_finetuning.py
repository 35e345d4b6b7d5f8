"""Fine-tuning as a whole: a text model, a picture's parameters aligned to it, then LoRA on both, and the merge."""

import json

import flax
import jax
import numpy as np
import pytest

from gpt4v_jax import config, evaluate
from gpt4v_jax.generate import decode
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.training import metrics, workdir
from tests.interop.test_command import say
from tests.test_train import run

KERNEL = "backbone/block_0/attention/out/kernel"
CONFIG = '''
from gpt4v_jax import config as config_lib

def get_config():
    config = config_lib.default()
    config.steps, config.batch, config.log_every, config.save_every = 4, 4, 1, 2
    config.data.update(name="{name}", cache="{cache}", vocab=300, turns=2, threads=0)
    config.model.context = 128
    config.model.backbone.update(depth=1, width=16, heads=2)
    config.optim.update(warmup=1, lr=1e-2)
    config.eval.update(every=9, batch=16)
    return config
'''
ALIGN = {
    "model.image.size": 24, "model.image.patch": 12, "model.fusion.kind": "prefix_lm", "optim.frozen": "^(?!image/)",
    "optim.ema": 0.5,
}  # fmt: skip
TUNE = {key: value for key, value in ALIGN.items() if key.startswith("model.")} | {
    "lora.rank": 2, "lora.also": "^image/", "eval.evaluators": ("questions",), "eval.best": "questions/accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def stages(digits_world, tmp_path_factory):
    """-> (folder, {stage: {step: state}}) of text, align, and LoRA, which is killed on the way."""
    folder, states = tmp_path_factory.mktemp("stages"), {}
    lines = [json.dumps({"prefix": f"what is {i}?", "suffix": f"a red {i} on the left"}) for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    text, scenes = folder / "text.py", folder / "scenes.py"
    text.write_text(CONFIG.format(name=f"jsonl:{folder / 'train.jsonl'}", cache=digits_world.cache))
    scenes.write_text(CONFIG.format(name=digits_world.name, cache=digits_world.cache))
    states["text"] = run(text, folder / "text")
    tokens = {"data.tokenizer": str(folder / "text" / "tokenizer.json")}
    states["align"] = run(scenes, folder / "align", **ALIGN, **tokens, **{"init_from.run": str(folder / "text")})
    tune = TUNE | tokens | {"init_from.run": str(folder / "align")}
    states["lora"] = run(scenes, folder / "lora", kill_at=2, **tune) | run(scenes, folder / "lora", **tune)
    return folder, states


def flat(params):
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


def test_what_moves_in_which_stage(stages):
    """The aligned model is the text model to the bit but for image parameters; LoRA moves its leaves and those."""
    _, states = stages
    text, align, tuned = (flat(states[stage][4].params) for stage in ("text", "align", "lora"))
    assert align.keys() - text.keys() == {path for path in align if path.startswith("image/")} != set()
    for path, x in text.items():
        np.testing.assert_array_equal(align[path], x, err_msg=path)
        np.testing.assert_array_equal(flat(states["align"][4].ema)[path], x, err_msg=path)
    started = flat(states["align"][4].ema)
    changed = {path for path, x in tuned.items() if path not in started or (x != started[path]).any()}
    assert changed == {path for path in tuned if path.startswith(("lora/", "image/"))}
    assert {path for path in changed if path.startswith("lora/backbone/block_0/")}


def test_merged(stages, capsys, monkeypatch):
    """The folder without LoRA is the model with it: its matrices, answers, and scores."""
    folder, states = stages
    status, said, _ = say(capsys, monkeypatch, "merge", folder / "lora", f"--out={folder / 'merged'}")
    one, two = (workdir.restore(folder / name) for name in ("lora", "merged"))
    assert status == 0 and f"lora at step {one.step} -> " in said and two.run.lora == config.LoRA()
    for name, out, error in (("lora", "merged", "merged is there already: name another folder"),
                             ("align", "new", "align was trained without LoRA")):  # fmt: skip
        status, _, said = say(capsys, monkeypatch, "merge", folder / name, f"--out={folder / out}")
        assert status == 2 and error in said and not (folder / "new").exists()
    assert not any(path.startswith("lora") for path in flat(two.params))
    jax.tree.map(np.testing.assert_array_equal, two.params, one.params)
    leaves = flat(states["lora"][one.step].params)
    base, a, b = (leaves[path] for path in (KERNEL, f"lora/{KERNEL}/a", f"lora/{KERNEL}/b"))
    np.testing.assert_allclose(flat(two.params)[KERNEL], base + 16 / 2 * np.einsum("nhr,rd->nhd", a, b), atol=1e-6)
    assert np.abs(flat(two.params)[KERNEL] - base).max() > 1e-4

    prompts = [prompts_lib.prompt(trained, "what is it?") for trained in (one, two)]
    answers = [decode.generate(t, [p], (), 8)[0].tokens for t, p in zip((one, two), prompts, strict=True)]
    assert answers[0] == answers[1] and len(answers[0])
    scores = evaluate.evaluate(folder / "merged", ["validation"], ["questions"])["validation"]["questions"].metrics
    logged = [line for line in metrics.read(folder / "lora") if "questions/loss" in line][-1]
    assert scores["loss"] == pytest.approx(logged["questions/loss"], abs=1e-5)
