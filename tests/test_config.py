"""The door: keys, types, JSON, and every file in configs/."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import ml_collections
import pytest

from configs import five_minutes, two_stage
from gpt4v_jax import config

FILES = sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.name != "__init__.py")


def load(path: Path) -> config.Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config configs/{path.name}" in module.__doc__, "a config opens with its command"
    return config.from_flag(module.get_config())


def test_default_is_the_dataclass():
    assert config.from_flag(config.default()) == config.Config()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_files(path):
    run = load(path)
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize("stage", ["text", "align", "instruct", "lora"])
def test_stages(stage):
    run = config.from_flag(two_stage.get_config(f"stage={stage},from=runs/before"))
    trained = {"text": "text/ image/", "align": "image/", "instruct": "text/ image/", "lora": "text/ image/"}[stage]
    assert bool(run.model.image) == (stage != "text") and (run.init_from.run == "runs/before") == (stage != "text")
    assert bool(run.lora.rank) == (stage == "lora") and bool(run.optim.frozen) == (stage == "align")
    still = run.optim.frozen or (f"^(?!lora/|{run.lora.also[1:]})" if run.lora.rank else "$^")
    assert [path for path in ("text/", "image/") if not re.search(still, path)] == trained.split()


def test_five_minutes_of_every_kind():
    kinds = [config.from_flag(five_minutes.get_config(f"fusion={kind}")).model.fusion.kind for kind in config.FUSIONS]
    assert tuple(kinds) == config.FUSIONS
    with pytest.raises(config.InputError, match="fusion='pool' is none of"):
        five_minutes.get_config("fusion=pool")


def test_differences():
    """A section that one of them has not is one value: what it has to be given, and nothing that follows from it."""
    encoder = config.Backbone(depth=2, width=64, heads=2, rope_scaling=config.RopeScaling("linear", 4.0))
    one, other = (
        config.Config(model=config.Model(context=context, image=config.Image(size=8, patch=4, encoder=stack)))
        for context, stack in ((8, None), (16, encoder))
    )
    found = config.differences(one, other)
    assert found.keys() == {"model.context", "model.image.encoder"} and found["model.context"] == (8, 16)
    nothing, given = found["model.image.encoder"]
    assert nothing is None and config.parse(given, config.Backbone) == encoder
    assert given.keys() == {"depth", "width", "heads", "rope_scaling"}
    assert config.differences(other, one)["model.image.encoder"] == (given, None)
    assert config.differences(one, one) == {}


def test_json_round_trip():
    run = config.Config(
        steps=7, model=config.Model(image=config.Image(size=32, encoder=config.Backbone(width=64))),
        eval=config.Eval(evaluators=("questions", "windows")), optim=config.Optim(lr=1e-4),
    )  # fmt: skip
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize("values, message", [
    ({"stepz": 1}, r"unknown config key config.stepz \(did you mean 'steps'\?\)"),
    ({"model": {"backbone": {"widht": 1}}}, r"unknown config key config.model.backbone.widht .*'width'"),
    ({"model": {"image": {"encoder": {"dept": 1}}}}, r"config.model.image.encoder.dept .*'depth'"),
    ({"xyz": 1}, r"unknown config key config.xyz$"),
    ({"steps": "ten"}, r"config.steps='ten' must be of type int, not str"),
    ({"steps": 1.5}, r"config.steps=1.5 must be of type int"),
    ({"steps": True}, r"config.steps=True must be of type int"),
    ({"steps": None}, r"config.steps=None must be of type int"),
    ({"optim": {"lr": "1e-3"}}, r"config.optim.lr='1e-3' must be of type float"),
    ({"model": {"tied": 1}}, r"config.model.tied=1 must be of type bool"),
    ({"model": 3}, r"config.model=3 must be a section"),
    ({"model": {"image": {"encoder": 3}}}, r"config.model.image.encoder=3 must be a section"),
    ({"eval": {"evaluators": "questions"}}, r"config.eval.evaluators='questions' must be a list of str"),
    ({"eval": {"evaluators": [1]}}, r"config.eval.evaluators=\[1\] must be a list of str"),
    ({"eval": {"evaluators": 5}}, r"config.eval.evaluators=5 must be a list of str"),
    ({"optim": {"name": "adam"}}, r"name='adam' is none of adamw, adafactor, lion, sgd, muon \(did you mean 'adamw'"),
    ({"model": {"position": "rop"}}, r"position='rop' is none of .*'rope'"),
    ({"model": {"backbone": {"norm": "batch"}}}, r"norm='batch' is none of rms, rms_plus_one, layer"),
    ({"model": {"backbone": {"heads": 4, "kv_heads": 3}}}, r"heads=4 is not a multiple of kv_heads=3"),
    ({"model": {"image": {"size": 70, "patch": 16}}}, r"size=70 is not a multiple of image.patch=16"),
])  # fmt: skip
def test_bad_values(values, message):
    for form in (values, ml_collections.ConfigDict(values).to_dict()):
        with pytest.raises(config.InputError, match=message):
            config.parse(form)


def test_values_that_are_taken():
    run = config.parse({"optim": {"lr": 1}, "eval": {"evaluators": ["windows"]}, "model": {"image": {"encoder": None}}})
    assert run.optim.lr == 1.0 and isinstance(run.optim.lr, float)
    assert run.eval.evaluators == ("windows",) and run.model.image.encoder is None


def test_derived_sizes():
    block = config.Backbone(width=96, heads=6)
    assert (block.kv_heads, block.head_dim, block.hidden) == (6, 16, 384)
    assert dataclasses.replace(block, kv_heads=2).kv_heads == 2


def test_one_of():
    config.one_of("kind", "a", ("a", "b"))
    with pytest.raises(config.InputError, match="kind='concta' is none of concat, prefix_lm .did you mean 'concat'"):
        config.one_of("kind", "concta", ("concat", "prefix_lm"))


def test_runs_from_when_bias_was_a_bool():
    """config.json of older workdirs."""
    text = '{"model": {"backbone": {"bias": true}, "image": {"size": 32, "encoder": {"bias": false}}}}'
    model = config.from_json(text).model
    assert model.backbone.bias == config.BIASES and model.image.encoder.bias == ()


def test_runs_from_when_a_budget_had_items():
    """Its name was that of a method of ConfigDict, so that no flag could set it."""
    assert config.from_json('{"data": {"image": {"items": 3, "patches": 8}}}').data.image == config.Budget(3, 8)
    assert config.from_json('{"data": {"image": {"per_row": 2}}}').data.image == config.Budget(2)


def test_the_best_metric_of_a_data_set_whose_name_has_slashes():
    names = ("questions@fsdd/george", "wer@fsdd/george")
    for best in ("questions@fsdd/george/accuracy/digit", "wer@fsdd/george/wer"):
        assert config.Eval(evaluators=names, best=best).best == best
    with pytest.raises(config.InputError, match="best='questions@fsdd' is none of questions@fsdd/george"):
        config.Eval(evaluators=names, best="questions@fsdd/accuracy")
    with pytest.raises(config.InputError, match="best='acuracy' .*did you mean 'accuracy'"):
        config.Eval(evaluators=names, best="questions@fsdd/george/acuracy")
