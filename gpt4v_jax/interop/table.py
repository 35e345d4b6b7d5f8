"""A family as data: keys of config.json, rows of tensors; and what they say of a config and of a parameter's shape.

Both directions: `to_config` and `to_ours` come from the reference, `write_config` and `to_theirs` go to it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import einops
import numpy as np

from gpt4v_jax import config


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of config.json (dots go into sections) <-> keys of our config, which all get its value.

    ours (): we have no such choice, and another value than the default is refused. values: theirs -> ours where they
    differ; what is not in it goes through as it is.
    """

    theirs: str
    ours: tuple[str, ...]
    default: Any
    values: tuple[tuple[Any, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor <-> one parameter. {i} in both is the number of a block; `shape` is an einops pattern, theirs -> ours.

    Several parameters lie one behind the other along `axis` of the tensor. only: a parameter that the model must have
    for this row to count, or with "!" in front one that it must not have.
    """

    theirs: str
    ours: str | tuple[str, ...]
    shape: str
    axis: int = 0
    only: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that sets a family apart. `kind`: the dataclass of our config that it makes."""

    model_type: str
    architectures: tuple[str, ...]  # the first one is what `save` writes
    kind: type
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]
    fixed: dict[str, Any]  # values of our config that every model of the family has
    read: Callable[[dict], dict] = lambda theirs: {}  # config.json -> more values of ours, where no Key can say it
    write: Callable[[Any], dict] = lambda ours: {}  # and back
    base: str = ""  # prefix of names that a file of the bare inner model lacks
    buffers: str = ""  # names that are no weights, or repeat one: not read (a pattern)
    zero: str = ""  # names of weights that a file may lack: they are 0 then
    unread: str = ""  # names of weights that our model has no place for: not read, but told
    renamed: tuple[tuple[str, str], ...] = ()  # older names -> those of the rows (patterns)
    doubles: tuple[str, ...] = ()  # sections that "<name>_dict" stands in for where it is there
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else `save` writes into config.json
    preprocessor: str = ""  # image models: the class in preprocessor_config.json
    generates: bool = False


# ---- configs


def to_config(family: Family, theirs: dict[str, Any], where: str = "config.json"):
    """A config.json's values -> our config: config.Model, config.Image or config.Towers."""
    flat = dict(family.fixed)
    try:
        for section in family.doubles:
            if theirs.get(f"{section}_dict") is not None:
                theirs = theirs | {section: theirs[f"{section}_dict"]}
        for key in family.keys:
            value = _get(theirs, key.theirs, key.default)
            if not key.ours and value != key.default and (value is not None or key.default):
                raise config.InputError(f"{key.theirs}={value!r} is not supported, only {key.default!r} is")
            if isinstance(value, str) and any(isinstance(t, str) for t, _ in key.values):
                config.one_of(key.theirs, value, tuple(t for t, _ in key.values))
            value = dict(key.values).get(value, value) if isinstance(value, (str, int, float, type(None))) else value
            flat |= dict.fromkeys(key.ours, value)
        flat |= family.read(theirs)
        return config.parse(_nested(flat), family.kind)
    except config.InputError as error:
        raise config.InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise config.InputError(f"{where}: it is no config of a {family.model_type}: {error!r}") from error


def write_config(family: Family, ours) -> dict[str, Any]:
    """Our config -> the family's config.json. Raises InputError where the family cannot say what the config says."""
    if not isinstance(ours, family.kind):
        kind = family.kind.__name__
        raise config.InputError(f"a {family.model_type} is a config.{kind}, not a config.{type(ours).__name__}")
    image = ours.image if isinstance(ours, config.Towers) else ours
    if isinstance(image, config.Image) and image.encoder is None:
        raise config.InputError(f"a {family.model_type} has an image encoder, here image.encoder is None")
    flat = _flat(dataclasses.asdict(ours))
    theirs: dict[str, Any] = {}
    for key in family.keys:
        value = flat.get(key.ours[0], key.default) if key.ours else key.default
        if isinstance(value, (str, int, float)):
            value = {o: t for t, o in reversed(key.values)}.get(value, value)  # the first of several names
        _set(theirs, key.theirs, list(value) if isinstance(value, tuple) else value)
    theirs |= {"model_type": family.model_type, "architectures": [family.architectures[0]]}
    theirs = _merge(_merge(theirs, family.extra), family.write(ours))
    again = to_config(family, theirs, f"a {family.model_type}")
    for name, (here, there) in config.differences(ours, again).items():
        if name.rpartition(".")[2] not in ("dropout", "init_std"):  # those matter to training alone
            family_ = family.model_type
            raise config.InputError(f"a {family_} cannot have {name}={here!r}, only {there!r}: try another family")
    return theirs


def _get(values: dict, path: str, default):
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return default
        values = values[name]
    return values


def _set(values: dict, path: str, value) -> None:
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _merge(one: dict, other: dict) -> dict:
    both = one | other
    return both | {k: _merge(one[k], other[k]) for k in one.keys() & other.keys() if isinstance(other[k], dict)}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path in sorted(flat, key=lambda p: p.count(".")):  # a whole section before single keys of it
        value = flat[path]
        _set(values, path, dict(value) if isinstance(value, dict) else value)
    return values


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ---- tensors


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A Row at one block: its tensor's name and shape, and the parameters that it holds."""

    name: str
    row: Row
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: tuple[dict[str, int], ...]  # of the pattern's axes, a parameter each


def tensors_of(family: Family, ours, params: dict[str, Any]) -> list[Tensor]:
    """-> every tensor of a model of `family` with these parameters {path: shape}. Each parameter is in just one."""
    image = ours.image if isinstance(ours, config.Towers) else ours
    known = {"P": image.patch, "Q": image.patch, "C": 3} if isinstance(image, config.Image) else {}
    depth = 1 + max((int(i) for path in params for i in re.findall(r"block_(\d+)/", path)), default=0)
    made = []
    for row in family.rows:
        for i in range(depth if "{i}" in row.theirs else 1):
            paths = tuple(path.replace("{i}", str(i)) for path in row.paths)
            here = [path for path in paths if path in params]
            only = row.only.replace("{i}", str(i))
            if not here or only and (only.removeprefix("!") in params) == only.startswith("!"):
                continue
            if len(here) != len(paths):
                raise ValueError(f"{family.model_type}: {row.theirs} holds {paths}, the model has only {here}")
            sizes = tuple(_sizes(row.shape, params[path].shape, known) for path in paths)
            shapes = [_their_shape(row.shape, s) for s in sizes]
            shape = list(shapes[0])
            if len(shapes) > 1:
                shape[row.axis] = sum(s[row.axis] for s in shapes)
            made.append(Tensor(row.theirs.replace("{i}", str(i)), row, paths, tuple(shape), sizes))
    held = [path for tensor in made for path in tensor.paths]
    if sorted(held) != sorted(params):
        odd = sorted(set(params) - set(held)) or sorted(path for path in held if held.count(path) > 1)
        raise config.InputError(f"a {family.model_type} has no place for the parameter {odd[0]}: try another family")
    return made


def _sizes(pattern: str, shape: tuple[int, ...], known: dict[str, int]) -> dict[str, int]:
    right = re.findall(r"\([^)]*\)|\S+", pattern.split("->")[1])
    if len(right) != len(shape):
        raise ValueError(f"the pattern {pattern!r} has {len(right)} dimensions, the parameter {shape}")
    sizes = {axis: n for axis, n in zip(right, shape, strict=True) if not axis.startswith("(")}
    names = set(re.findall(r"[A-Z]\w*", pattern))
    return {name: sizes.get(name, known.get(name)) for name in names}


def _their_shape(pattern: str, sizes: dict[str, int]) -> tuple[int, ...]:
    left = re.findall(r"\([^)]*\)|\S+", pattern.split("->")[0])
    return tuple(math.prod(sizes.get(axis, 1) for axis in re.findall(r"\w+", part)) for part in left)


def _rearranged(x, pattern: str, sizes: dict[str, int]):
    return x.reshape(()) if not sizes else einops.rearrange(x, pattern, **sizes)


def to_ours(tensor: Tensor, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Their array -> (path, our array), views where that is possible."""
    start = 0
    for path, sizes in zip(tensor.paths, tensor.sizes, strict=True):
        part = x
        if len(tensor.paths) > 1:
            width = _their_shape(tensor.row.shape, sizes)[tensor.row.axis]
            part = x[(slice(None),) * tensor.row.axis + (slice(start, start + width),)]
            start += width
        yield path, _rearranged(part, tensor.row.shape, sizes)


def to_theirs(tensor: Tensor, params: dict[str, Any]) -> np.ndarray:
    """Our parameters {path: array} -> their array."""
    left, right = tensor.row.shape.split("->")
    parts = []
    for path, sizes in zip(tensor.paths, tensor.sizes, strict=True):
        x = np.asarray(params[path])
        parts.append(_rearranged(x, f"{right} -> {left}", sizes).reshape(_their_shape(tensor.row.shape, sizes)))
    return np.asarray(np.concatenate(parts, tensor.row.axis) if len(parts) > 1 else parts[0], order="C")
