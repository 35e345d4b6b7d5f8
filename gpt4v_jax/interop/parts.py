"""Parts of a model from folders of others: `init_from: {backbone: DIR, image: DIR}` of a run's config.

A language model gives text embedding, backbone and head; a ViT, CLIP, SigLIP or DINOv2 gives the image encoder without
what pools it. What both configs say of a part must be the same, or the weights would mean something else.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gpt4v_jax import config
from gpt4v_jax.interop import families, hf, table
from gpt4v_jax.interop.folder import Folder, local
from gpt4v_jax.training.partial import grouped

# Values of config.Model and config.Image that change what the weights of a part mean, beside the stack's own.
_MODEL = ("causal", "position", "position_offset", "token_types", "embed_scale", "tied", "head_hidden", "head_bias",
          "logit_scale", "logit_cap")  # fmt: skip
_IMAGE = ("size", "patch", "mean", "std", "patch_norm", "patch_bias", "position", "class_token", "pre_norm",
          "pool_norm")  # fmt: skip
_OWN = ("image", "fusion", "context")
# Parameters that may have more rows than the folder's, or for positions fewer: path -> the axis of the rows.
_ROWS = {"text/embed/table": 0, "text/position/table": 0, "head/kernel": 1, "head_bias/value": 0}


def settings(path: Path | str):
    """A folder's config for a config file: `config.model.update(settings(DIR))`, of an image encoder
    `config.model.image.update(settings(DIR))`. Not the context: the length of a run's rows is the run's own."""
    there = local(path)
    if any(there.glob("*.safetensors")):
        ours = _read(path)[2]
    else:  # a resumed run needs no weights
        ours = families.read_config(Folder(there, weights=False).config, str(path))
    if isinstance(ours, config.Model):
        values = dataclasses.asdict(ours)
        return config.sections({k: v for k, v in values.items() if k not in _OWN and v is not None})
    image = ours.image if isinstance(ours, config.Towers) else ours
    return config.sections(dataclasses.asdict(dataclasses.replace(image, pool="none", classes=0, mask_token=False)))


def vocab(run: config.Config) -> int:
    """The vocabulary of the folder that fills the backbone, which may be padded beyond its tokenizer's; 0: none."""
    return _read(run.init_from.backbone)[2].vocab if run.init_from.backbone else 0


def initialise(params: Any, run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, list[str]]:
    """Initial parameters -> (the same with the parts that run.init_from names, lines that say what came from where)."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    lines, filled = [], set()
    for part, with_part in (("backbone", _backbone), ("image", _image)):
        if path := getattr(run.init_from, part):
            taken, left, notes, family = with_part(flat, run.model, path, mesh, f"init_from.{part}={path}")
            filled |= taken.keys()
            flat |= taken
            values = sum(x.size for x in taken.values())
            lines.append(f"init_from.{part}  {path} ({family}): {len(taken)} parameters, {values:,} values")
            lines += [f"  {note}" for note in notes]
            if left:
                lines.append(f"  left out: {grouped(left)}")
    if lines:
        new = [path for path in flat if path not in filled]
        lines.append(f"newly initialised: {grouped(new) or 'nothing'}")
    return flax.traverse_util.unflatten_dict(flat, sep="/"), lines


def _backbone(flat: dict, model: config.Model, path: str, mesh, what: str):
    folder, family, theirs = _read(path)
    if not isinstance(theirs, config.Model):
        raise config.InputError(f"{what}: a {family.model_type} is no language model")
    _compare(what, model, theirs, _MODEL)
    _compare(f"{what}: backbone", model.backbone, theirs.backbone)
    if model.source or theirs.source:
        if not (model.source and theirs.source):
            lacking = "this config's model.source is None" if theirs.source else "the folder has no encoder"
            raise config.InputError(f"{what}: {lacking}: config.model.update(parts.settings(DIR)) takes the folder's")
        _compare(f"{what}: source", model.source, theirs.source)
    paths = {path: path for path in hf.abstract_params(theirs)}
    # What a fusion adds to the blocks (gates, cross-attention, an encoder) starts anew, and is said to.
    plain = model if model.source else dataclasses.replace(model, fusion=config.Fusion())
    whole = tuple(p for p in hf.abstract_params(plain) if p.startswith(("backbone/", "source/", "text/", "head")))
    return _take(flat, folder, family, theirs, paths, mesh, what, whole)


def _image(flat: dict, model: config.Model, path: str, mesh, what: str):
    folder, family, theirs = _read(path)
    image = theirs.image if isinstance(theirs, config.Towers) else theirs
    if not isinstance(image, config.Image):
        raise config.InputError(f"{what}: a {family.model_type} has no image encoder")
    if model.image.encoder is None:
        raise config.InputError(f"{what}: model.image.encoder is None, so there is nothing to fill: config.model.image."
                                "update(parts.settings(DIR)) sets it")  # fmt: skip
    _compare(what, model.image, image, _IMAGE)
    _compare(f"{what}: image.encoder", model.image.encoder, image.encoder)
    prefix = "image/" if isinstance(theirs, config.Towers) else ""
    kept = tuple(f"{prefix}{name}" for name in ("image/", "pre_norm/", "encoder/"))
    paths = {p: "image/" + p.removeprefix(prefix) for p in hf.abstract_params(theirs) if p.startswith(kept)}
    return _take(flat, folder, family, theirs, paths, mesh, what, ("image/encoder/", "image/image/", "image/pre_norm"))


def _read(path: str):
    folder = Folder(local(path))
    where = str(folder.path / "config.json")
    family = families.family_of(folder.config, where)
    return folder, family, hf.tied_as_in(folder, family, families.read_config(folder.config, where))


def _compare(what: str, ours, theirs, names: tuple[str, ...] | None = None) -> None:
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name, None)
        if (names is None or field.name in names) and field.name not in ("dropout", "init_std") and here != there:
            raise config.InputError(
                f"{what}: the folder has {field.name}={there!r}, this config {here!r}: "
                "config.model.update(parts.settings(DIR)) takes over all of them"
            )


def _take(flat, folder, family, theirs, paths: dict[str, str], mesh, what: str, whole: tuple[str, ...]):
    """-> ({our path: array}, what the folder has and we do not take, notes, the family's name).

    paths: the folder's parameters -> ours. whole: beginnings of our paths that must all come from the folder.
    """
    tensors = table.tensors_of(family, theirs, hf.abstract_params(theirs))
    names, unread = hf.located(folder, family, tensors)
    wanted = {there: here for there, here in paths.items() if here in flat}
    left = sorted({*unread} | {t.name for t in tensors if not set(t.paths) & wanted.keys()})
    missing = sorted(p for p in flat if p.startswith(whole) and p not in wanted.values())
    if missing:
        raise config.InputError(f"{what}: the folder has nothing for {missing[0]} {flat[missing[0]].shape}")
    taken, notes = {}, []
    for there, x in hf.arrays(folder, family, [t for t in tensors if set(t.paths) & wanted.keys()], names):
        if there not in wanted:
            continue
        here = wanted[there]
        old = flat[here]
        if x.shape == old.shape:
            taken[here] = hf.put(x, here, old.dtype, mesh)
            continue
        axis = _ROWS.get(here)
        same_but_rows = axis is not None and x.ndim == old.ndim and _without(x.shape, axis) == _without(old.shape, axis)
        if not same_but_rows or (x.shape[axis] > old.shape[axis] and here != "text/position/table"):
            hint = "; model.vocab may be larger than the folder's, not smaller" if axis is not None else ""
            raise config.InputError(
                f"{what}: {here} has shape {x.shape} in the folder and {old.shape} in this config{hint}"
            )
        rows = min(x.shape[axis], old.shape[axis])
        at = (slice(None),) * axis + (slice(rows),)
        taken[here] = jax.device_put(old.at[at].set(jnp.asarray(x[at], old.dtype)), old.sharding)
        notes.append(f"{here}: {rows:,} rows; the folder has {x.shape[axis]:,}, this model {old.shape[axis]:,}")
    return taken, left, notes, family.model_type


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
