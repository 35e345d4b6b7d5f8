"""Parameters from the checkpoint of another run: `init_from: {run: WORKDIR, run_parameters: PATTERN}` of a config."""

import re
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.training import checkpoint, leaves, lora, steps, workdir

# Keys of config.Model that may differ: they change no meaning of a weight, or only how many there are.
_STACKS = r"(backbone|source|(image|video|audio)\.encoder)"
_MAY_DIFFER = rf"model\.(vocab|context|source_context|init_std|embed|fusion\..*|{_STACKS}\.(dropout|depth))"
_OWN = ("image", "video", "audio", "source")  # sections of config.Model that only their own parameters depend on


def check(run: config.Config, tokenizer) -> None:
    """Raises InputError where that run's weights would mean something else here: another key of the model that they
    are part of, or another tokenizer's tokens in the table."""
    init, there = run.init_from, Path(run.init_from.run)
    theirs, wanted = workdir.load_config(there), _pattern(init.run_parameters)
    finished = steps.finished(there / "checkpoints")
    if not finished:
        raise config.InputError(f"init_from.run={there} has no checkpoint yet; train it a little longer")
    saved = _without_lora(steps.manifest(there / "checkpoints", finished[-1])["items"]["params"])
    taken = {path.split("/")[0] for path in saved if wanted.search(path)}
    taken -= {name for name in batch_lib.MEDIA if not getattr(run.model, name)}  # there is no place for them here
    for key, (that, this) in _differences(theirs, run, taken).items():
        if not re.fullmatch(_MAY_DIFFER, key):
            raise config.InputError(
                f"init_from.run={there} has {key}={that!r}, this config {this!r}: its weights would mean something "
                "else. Use its value, or leave these parameters out with init_from.run_parameters"
            )
    tokens = any(wanted.search(path) for path in saved if path.startswith(("text/embed", "head/", "head_bias")))
    if tokens and (there / "tokenizer.json").read_text() != tokenizer.to_json():
        raise config.InputError(
            f"init_from.run={there} has another tokenizer: set data.tokenizer={str(there / 'tokenizer.json')!r}, or "
            "leave its table of tokens out with init_from.run_parameters='^(?!text/embed|head)'"
        )


def _differences(theirs: config.Config, run: config.Config, taken: set[str]) -> dict[str, tuple[Any, Any]]:
    """-> {key of the model: its values there and here}, of keys that parameters below the names `taken` depend on."""

    def concerned(part: str) -> set[str]:
        if part in _OWN:
            return taken & {part}
        if part == "fusion":  # connectors, and what stands beside them
            return taken
        if part == "axes":  # of text all three are the same, and turn it as one does
            return taken & {*batch_lib.MEDIA}
        return taken - {*batch_lib.MEDIA}

    return {
        key: both for key, both in config.differences(theirs, run).items()
        if key.startswith("model.") and concerned(key.split(".")[1])
    }  # fmt: skip


def load(params: Any, run: config.Config) -> tuple[Any, list[str]]:
    """Initial parameters -> (the same with those of another run's best checkpoint, lines: what came from where).

    Taken is what both have and what re.search finds init_from.run_parameters in ("": all of it): the moving average
    where that run keeps one, into the dtype and sharding that are here; of a run with LoRA what its matrices have
    become. That run's folder is not changed. Raises InputError for a folder without a whole checkpoint, a pattern that
    takes nothing, a parameter of another shape.
    """
    init, what = run.init_from, f"init_from.run={run.init_from.run}"
    wanted = _pattern(init.run_parameters)
    there = Path(init.run)
    theirs = workdir.load_config(there)
    checkpoints = checkpoint.Checkpoints(there, theirs.eval.best, theirs.eval.best_mode, read_only=True)
    step = checkpoints.best()
    if step is None:
        raise config.InputError(f"{what} has no checkpoint yet; train it a little longer")
    item, there_are = checkpoints.parameters(step)
    saved = _without_lora(there_are)
    here = flax.traverse_util.flatten_dict(params, sep="/")
    paths = [path for path in here if path in saved and wanted.search(path)]
    if not paths:
        raise config.InputError(_nothing(what, init.run_parameters, here, saved))
    changed: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        (shape, dtype), x = saved[path], here[path]
        if shape != x.shape or not leaves.castable(dtype, str(x.dtype)):
            raise config.InputError(
                f"{what}: parameter {path} is {shape} {dtype} there and {x.shape} {x.dtype} in this config: use that "
                "run's config.model, or leave the parameter out with init_from.run_parameters, a pattern such as "
                f"'^(?!{re.escape(path)}$)'"
            )
        if dtype != str(x.dtype):
            changed.setdefault((dtype, str(x.dtype)), []).append(path)
    target = leaves.abstract({path: here[path] for path in paths})
    for path in paths:
        beside = {leaf: there_are[leaf] for leaf in lora.leaves_of(path) if leaf in there_are}
        target |= {leaf: _placed(leaf, *what, here[path].sharding) for leaf, what in beside.items()}
    nested = flax.traverse_util.unflatten_dict(target, sep="/")
    read = lora.merged(checkpoints.read(step, item, nested, partial=True), theirs.lora)
    taken = flax.traverse_util.flatten_dict(read, sep="/")
    values = sum(x.size for x in taken.values())
    kind = "moving average of the weights" if item == "ema" else "weights"
    kind += f" with its LoRA of rank {theirs.lora.rank}" if len(target) > len(paths) else ""
    others = _differences(theirs, run, {path.split("/")[0] for path in paths})
    lines = [
        f"init_from.run  {there} (step {step}, {kind}): {len(taken)} parameters, {values:,} values",
        f"  loaded: {grouped(taken)}",
        *(f"  {leaves.converted(*change, names)}" for change, names in changed.items()),
        *(f"  another {key}: {that!r} there, {this!r} here" for key, (that, this) in others.items()),
        f"  skipped, in the folder and not taken: {grouped(path for path in saved if path not in taken) or 'nothing'}",
        f"  newly initialised: {grouped(path for path in here if path not in taken) or 'nothing'}",
    ]
    return flax.traverse_util.unflatten_dict(here | taken, sep="/"), lines


def _without_lora(saved: dict) -> dict:
    return {path: what for path, what in saved.items() if not path.startswith("lora/")}


def _placed(path: str, shape: tuple[int, ...], dtype: str, beside: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Where a leaf of LoRA is read to, on the devices of its matrix."""
    on_mesh = isinstance(beside, jax.sharding.NamedSharding)
    place = sharding.param_sharding(path, shape, beside.mesh) if on_mesh else beside
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)


def grouped(names) -> str:
    """Names of parameters or tensors, all blocks of one kind as one."""
    groups: dict[str, int] = {}
    for name in names:
        group = re.sub(r"([._])\d+([./])", r"\1{i}\2", name)
        groups[group] = groups.get(group, 0) + 1
    return ", ".join(f"{group} x {n}" if n > 1 else group for group, n in groups.items())


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise config.InputError(f"init_from.run_parameters={text!r} is no regular expression: {error}") from None


def _nothing(what: str, pattern: str, here: dict, saved: dict) -> str:
    both = [path for path in here if path in saved]
    if not both:
        return f"{what}: none of its parameters is in this model; it has, for example, {', '.join(list(saved)[:3])}"
    return (
        f"init_from.run_parameters={pattern!r} matches no parameter that both {what} and this model have; there are, "
        f"for example, {', '.join(both[:3])}"
    )
