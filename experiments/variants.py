"""What the variants of a sweep are: a base config and dotted overrides, all of them checked before anything runs.

A variant's key "before" is not the config's: it holds the overrides of a run before it, or of several in their order.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config

ROOT = Path(__file__).parent.parent
NAME = r"[A-Za-z0-9][\w.+]*"  # of a variant: it names folders, and "-" stands before the seed
BEFORE = "the stage before"  # in the place of its workdir, which is known when it runs
UNSEEN = {"eval.evaluators": (), "eval.best": ""}  # a stage before is not evaluated: its last checkpoint goes on
SINGLE = re.compile(r"unknown config key|must be (of type|a list of|a section)")  # said of one key by itself


def base(path: str) -> dict[str, Any]:
    """"configs/digits_world.py" or "configs/digits_world.py:pictures=blank" -> its values, nested; the path is the
    repository's."""
    file, _, arg = path.partition(":")
    if not (ROOT / file).is_file():
        raise config.InputError(f"the sweep's base {file} is no file of the repository")
    spec = importlib.util.spec_from_file_location("base", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([arg] if arg else [])).to_dict()


def flat(overrides: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"model.image.encoder": {"depth": 2}} -> {"model.image.encoder.depth": 2}: one key a value. An empty section is
    one: it is there, with its defaults."""
    out = {}
    for key, value in overrides.items():
        out |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) and value else {f"{path}{key}": value}
    return out


def applied(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """-> nested values with flat overrides; a section that is None becomes one where a key of it is set."""
    out = {key: applied(value, {}) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in overrides.items():
        *sections, last = key.split(".")
        at = out
        for name in sections:
            if not isinstance(at.get(name), dict):
                at[name] = {}
            at = at[name]
        at[last] = value
    return out


def stages(overrides: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A variant's overrides -> those of each of its runs, the last of which is scored."""
    before = overrides.get("before", ())
    last = {key: value for key, value in overrides.items() if key != "before"}
    return [*([before] if isinstance(before, Mapping) else before), last]


def configs(path: str, variants: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any],
            last: Mapping[str, Any]) -> dict[str, tuple[config.Config, ...]]:  # fmt: skip
    """-> {variant: the config of each of its stages}: the base, then what all have in common, then the stage's, then
    what stands last. Each stage but the first has init_from.run=BEFORE.

    Raises InputError that names every bad key and value of all of them.
    """
    values, wrong, made = base(path), [], {}
    if not variants:
        raise config.InputError("the sweep has no variants: name two or more")
    for name, overrides in variants.items():
        if not re.fullmatch(NAME, name):
            wrong.append(f"{name!r} is no name of a variant: use letters, digits and _ . +")
        made[name] = ()
        for k, own in enumerate(stages(overrides), 1):
            called = f"{name}, stage {k}" if "before" in overrides else name
            given = {"common": flat(common), called: flat(own), "last": flat(last)}
            for of, keys in given.items():
                for key in list(keys):
                    if error := _alone(key, keys[key]):
                        wrong.append(f"{of}: {error}")
                        del keys[key]
            unseen = UNSEEN if k < len(stages(overrides)) else {}
            joint = given["common"] | unseen | given[called] | given["last"]
            run, errors = _parsed(values, joint | ({"init_from.run": BEFORE} if k > 1 else {}))
            made[name] += (run,)
            wrong += [f"{called}: {error}" for error in errors]
    if wrong:
        raise config.InputError("\n  ".join(["the sweep's overrides:", *dict.fromkeys(wrong)]))
    return made


def _alone(key: str, value: Any) -> str:
    """-> what is wrong with one override whatever the others are: an unknown key, or a value of another type."""
    try:
        config.parse(applied({}, {key: value}))
    except config.InputError as error:
        return str(error) if SINGLE.search(str(error)) else ""
    return ""


def _parsed(values: Mapping[str, Any], overrides: dict[str, Any]) -> tuple[config.Config | None, list[str]]:
    """-> (the config, what is wrong with it). What an error names is left out, to find the next one."""
    errors, left = [], dict(overrides)
    while True:
        try:
            run = config.parse(applied(values, left))
            batch_lib.layout(run.model, run.data)
            return run, errors
        except config.InputError as error:
            errors.append(str(error))
            named = [key for key in left if re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", str(error))]
            if not named:
                return None, errors
            left = {key: value for key, value in left.items() if key not in named}
