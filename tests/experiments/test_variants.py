"""Overrides over a base: where they land, and that all that is wrong with them is said at once."""

import re

import pytest

from experiments import from_json, variants
from gpt4v_jax import config

BASE = "configs/tiny.py"


def test_overrides():
    made = variants.configs(
        BASE,
        {"plain": {}, "other": {"model.image.encoder": {"depth": 1, "width": 8, "heads": 2}, "steps": 7}},
        {"steps": 5, "eval.evaluators": ["questions", "permuted"]},
        {"batch": 2},
    )
    plain, other = made["plain"], made["other"]
    assert (plain.steps, plain.batch, plain.eval.evaluators) == (5, 2, ("questions", "permuted"))
    assert plain.model.backbone.width == 16 and plain.model.image.encoder is None
    assert other.steps == 7 and other.model.image.encoder == config.Backbone(depth=1, width=8, heads=2)
    assert variants.configs("configs/digits_world.py:fusion=prefix_lm", {"a": {}}, {}, {})["a"].model.fusion.kind == (
        "prefix_lm"
    )


def test_everything_that_is_wrong_is_said_at_once():
    bad = {
        "one": {"model.fusoin.kind": "concat", "optim.lr": "fast", "data.turns": 1},
        "two": {"model.fusion.kind": "prefixlm", "model.backbone": {"widht": 3}, "eval.batch": 0},
        "a/b": {},
    }
    with pytest.raises(config.InputError) as error:
        variants.configs(BASE, bad, {"stepz": 3}, {})
    said = re.sub(r"\s+", " ", str(error.value))
    for text in (
        "common: unknown config key config.stepz (did you mean 'steps'?)",
        "one: unknown config key config.model.fusoin (did you mean 'fusion'?)",
        "one: config.optim.lr='fast' must be of type float",
        "two: unknown config key config.model.backbone.widht (did you mean 'width'?)",
        "(did you mean 'prefix_lm'?)",
        "batch=0 must be 1 or more",
        "'a/b' is no name of a variant",
    ):
        assert text in said, said
    assert said.count("stepz") == 1
    with pytest.raises(config.InputError, match="base configs/none.py is no file"):
        variants.configs("configs/none.py", {"a": {}}, {}, {})
    with pytest.raises(config.InputError, match="has no variants"):
        variants.configs(BASE, {}, {}, {})


def test_a_config_comes_back_from_its_file(tmp_path):
    run = variants.configs(BASE, {"a": {"model.image.encoder": {"depth": 1, "width": 8, "heads": 2}}}, {}, {})["a"]
    path = tmp_path / "run.json"
    path.write_text(config.to_json(run))
    assert config.from_flag(from_json.get_config(str(path))) == run
