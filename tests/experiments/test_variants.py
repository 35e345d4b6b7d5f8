"""Overrides over a base: where they land, and that all that is wrong with them is said at once."""

import re

import pytest

from experiments import from_json, variants
from gpt4v_jax import config

BASE = "configs/tiny.py"


def test_overrides():
    made = variants.configs(
        BASE,
        {"plain": {}, "other": {"model.image.encoder": {"depth": 1, "width": 8, "heads": 2}, "steps": 7},
         "defaults": {"model.image.encoder": {}}},
        {"steps": 5, "eval.evaluators": ["questions", "permuted"]},
        {"batch": 2},
    )
    [plain], [other], [defaults] = made["plain"], made["other"], made["defaults"]
    assert defaults.model.image.encoder == config.Backbone(), "an empty section is a section"
    assert (plain.steps, plain.batch, plain.eval.evaluators) == (5, 2, ("questions", "permuted"))
    assert plain.model.backbone.width == 16 and plain.model.image.encoder is None
    assert other.steps == 7 and other.model.image.encoder == config.Backbone(depth=1, width=8, heads=2)
    [run] = variants.configs("configs/digits_world.py:fusion=prefix_lm", {"a": {}}, {}, {})["a"]
    assert run.model.fusion.kind == "prefix_lm"


def test_stages():
    """Each has the base and the common overrides, none of the others'; those before the last are not evaluated."""
    common = {"steps": 9, "batch": 3, "eval.evaluators": ("questions",), "eval.best": "questions/accuracy"}
    align = {"steps": 4, "optim.frozen": "^(?!image/)"}
    made = variants.configs(
        BASE,
        {"one": {"before": align, "data.turns": 1}, "two": {"before": ({"data.turns": 0}, align)}, "none": {}},
        common, {"optim.warmup": 1},
    )  # fmt: skip
    assert [len(stages) for stages in made.values()] == [2, 3, 1]
    for stages in made.values():
        *before, last = stages
        assert [run.init_from.run for run in stages] == [""] + [variants.BEFORE] * len(before)
        assert all(run.batch == 3 and run.optim.warmup == 1 for run in stages)
        assert all(run.eval.evaluators == () and not run.eval.best for run in before)
        assert last.eval.best == "questions/accuracy" and last.steps == 9 and not last.optim.frozen
    before, last = made["one"]
    assert (before.steps, before.data.turns, last.data.turns) == (4, 2, 1) and before.optim.frozen
    assert [run.data.turns for run in made["two"]] == [0, 2, 2] and [run.steps for run in made["two"]] == [9, 4, 9]
    with pytest.raises(config.InputError, match="one, stage 1: unknown config key config.stepz"):
        variants.configs(BASE, {"one": {"before": {"stepz": 1}}}, {}, {})


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
    [run] = variants.configs(BASE, {"a": {"model.image.encoder": {"depth": 1, "width": 8, "heads": 2}}}, {}, {})["a"]
    path = tmp_path / "run.json"
    path.write_text(config.to_json(run))
    assert config.from_flag(from_json.get_config(str(path))) == run
