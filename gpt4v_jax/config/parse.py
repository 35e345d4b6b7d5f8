"""ConfigDict and JSON on one side, the dataclasses on the other: the only code that knows ml_collections."""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from gpt4v_jax.config.backbone import BIASES, Backbone
from gpt4v_jax.config.check import InputError, nearest
from gpt4v_jax.config.run import Budget, Config


def default() -> ml_collections.ConfigDict:
    """-> every key with its default value; a config file changes some of them and returns it."""
    return section(Config)


def section(cls) -> ml_collections.ConfigDict:
    """-> the defaults of one dataclass, such as `section(Backbone)` for an image encoder of one's own."""
    values = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            values[field.name] = section(type(field.default))
        elif field.default is None:
            values[field.name] = ml_collections.config_dict.placeholder(ml_collections.ConfigDict)
        else:
            values[field.name] = field.default
    return ml_collections.ConfigDict(values)


def sections(values: Mapping) -> ml_collections.ConfigDict:
    """A nested mapping -> what `update` of a config file's section takes, also where a section is None by default."""
    return ml_collections.ConfigDict(dict(values))


def arguments(arg: str, **defaults: str) -> dict[str, str]:
    """A config file's text after the colon, "fusion=prefix_lm,pictures=blank" -> its values over the defaults."""
    given = dict(part.partition("=")[::2] for part in arg.split(",") if part)
    for key in given:
        if key not in defaults:
            raise InputError(f"unknown config argument {key!r}{nearest(key, defaults)} of {', '.join(defaults)}")
    return defaults | given


def parse(values: Mapping, cls=Config, path: str = "config"):
    """A nested mapping (ConfigDict, or JSON read back) -> the frozen dataclass `cls`.

    Raises InputError for an unknown key, naming the nearest one, and for a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if cls is Budget and "items" in values:  # as runs before 23 November 2026 have it on disk
        values = {"per_row" if key == "items" else key: values[key] for key in values}
    for key in values:
        if key not in fields:
            raise InputError(f"unknown config key {path}.{key}{nearest(key, fields)}")
    if cls is Backbone and isinstance(values.get("bias"), bool):  # as runs before November 2026 have it on disk
        values = {**values, "bias": BIASES if values["bias"] else ()}
    hints = typing.get_type_hints(cls)
    parsed = {key: _parse_value(values[key], hints[key], f"{path}.{key}") for key in values}
    try:
        return cls(**parsed)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """-> {key such as "model.backbone.width": its values in the two}, where they differ.

    A section that only one of them has is one value: None, and what it has to be given.
    """

    def walk(a, b, path):
        for field in dataclasses.fields(a):
            pair = getattr(a, field.name), getattr(b, field.name)
            if all(map(dataclasses.is_dataclass, pair)):
                yield from walk(*pair, f"{path}{field.name}.")
            elif pair[0] != pair[1]:
                yield f"{path}{field.name}", tuple(_given(x) if dataclasses.is_dataclass(x) else x for x in pair)

    return dict(walk(one, other, ""))


def _given(section) -> dict[str, Any]:
    """-> the values that make the section, without those that follow from the others."""
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    for name in reversed(given):
        rest = {key: value for key, value in given.items() if key != name}
        with contextlib.suppress(InputError):
            given = rest if type(section)(**rest) == section else given
    return {key: value for key, value in dataclasses.asdict(section).items() if key in given}


def _parse_value(value: Any, hint: Any, path: str):
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{path}={value!r} must be a section of the config, with the keys of {hint.__name__}")
        return parse(value, hint, path)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)) and options[0] is float:
            value = tuple(float(item) if type(item) is int else item for item in value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, options[0]) for item in value):
            raise InputError(f"{path}={value!r} must be a list of {options[0].__name__}")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{path}={value!r} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    return parse(json.loads(text))


def from_flag(values: ml_collections.ConfigDict) -> Config:
    """The value of a config_flags flag -> Config. One whose file was not found raises only when it is touched."""
    try:
        return parse(values.to_dict())
    except OSError as error:
        raise InputError("--config: " + " ".join(str(error).split())) from error
