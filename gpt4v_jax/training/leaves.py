"""What a checkpoint holds, leaf by leaf, and what to say where a run wants something else."""

from pathlib import Path

import jax
import jax.numpy as jnp

from gpt4v_jax import config, sharding
from gpt4v_jax.training.step import State

Leaves = dict[str, tuple[tuple[int, ...], str]]  # path -> (shape, dtype)
ITEMS = {"params": "params", "optimizer": "opt_state", "watch": "watch", "ema": "ema"}  # item -> field of State
_WHAT = {  # item -> what it holds, what a leaf of it is called, and what to do when it is another
    "params": ("another model", "parameter ", "use its config"),
    "optimizer": ("another optimizer's state", "", "use its config.optim"),
    "watch": ("another guard's memory", "", "use the version of gpt4v_jax that wrote it"),
    "ema": ("another moving average of the weights", "parameter ", "use its config"),
}
_FRESH = "train in another --workdir, with config.init_from.run naming this one"
_MISSING = {  # item -> what to say of a checkpoint without it, where the run has it
    "optimizer": f"holds a model without the state of an optimizer: {_FRESH}",
    "watch": f"holds no memory of the guard: {_FRESH}",
    "ema": f"holds no moving average of the weights, and config.optim.ema asks for one: set it to 0, or {_FRESH}",
}
_EXTRA = {  # and where the run does not have it
    "optimizer": f"holds the state of an optimizer, and this run has none: {_FRESH}",
    "watch": f"holds the memory of a guard, and this run has none: {_FRESH}",
    "ema": "holds a moving average of the weights, and config.optim.ema=0 keeps none: set it as it was, or " + _FRESH,
}


def items(state: State) -> dict:
    """-> {item: its tree}, without those that have no leaf."""
    return {item: getattr(state, name) for item, name in ITEMS.items() if jax.tree.leaves(getattr(state, name))}


def of(tree) -> Leaves:
    """Of arrays or shapes."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): (tuple(x.shape), str(x.dtype)) for path, x in flat}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check_items(where: Path, there: dict, here: dict) -> None:
    """Raises InputError for the first item that only one of checkpoint and run has."""
    for item in ITEMS:
        if (item in there) != (item in here):
            raise config.InputError(f"{where} {(_EXTRA if item in there else _MISSING)[item]}")


def compare(where: Path, item: str, there: Leaves, here: Leaves) -> list[str]:
    """-> lines that say what is converted; raises InputError naming the first leaf that cannot be taken."""
    cast: dict[tuple[str, str], list[str]] = {}
    for path in sorted(here.keys() | there.keys()):
        shape_there, shape_here, change = _differs(there.get(path), here.get(path))
        if shape_there != shape_here:
            what, leaf, do = _WHAT[item]
            raise config.InputError(
                f"{where} holds {what}: {leaf}{path} is {shape_there} there and {shape_here} in this config; {do}, or "
                "another --workdir"
            )
        if change:
            cast.setdefault(change, []).append(path)
    return [f"{where}: {item}: {converted(*change, paths)}" for change, paths in cast.items()]


def converted(there: str, here: str, paths: list[str]) -> str:
    more = f" and {len(paths) - 1} more" if paths[1:] else ""
    return f"{paths[0]}{more}: {there} there, converted to {here}"


def castable(there: str, here: str) -> bool:
    """Between floating types only: a count that becomes a fraction, or the other way, is another thing."""
    return there == here or all(jnp.issubdtype(jnp.dtype(x), jnp.floating) for x in (there, here))


def _differs(there, here) -> tuple[str, str, tuple[str, str] | None]:
    """Two leaves, None where there is none -> (text, text, a change of dtype); the texts differ if they do not fit."""
    if there is None or here is None:
        return *("absent" if leaf is None else str(leaf[0]) for leaf in (there, here)), None
    if there[0] == here[0] and not castable(there[1], here[1]):
        return f"{there[0]} {there[1]}", f"{here[0]} {here[1]}", None
    return str(there[0]), str(here[0]), (there[1], here[1]) if there[1] != here[1] else None
