"""Hugging Face folders <-> our configs and parameters: one engine, both directions, and a table a family.

    imported = load("path/of/llama")                 # Imported(family, config, params): config.Model, Image or Towers
    save(imported, "path/of/copy")                   # from_pretrained takes it: 0 missing, 0 unexpected keys

A family is data (table.Family): keys of its config.json with their defaults, rows of tensor names.
"""

import dataclasses
import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from safetensors.numpy import save_file

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.interop.families import family_of
from gpt4v_jax.interop.folder import INDEX, Folder, local, trim
from gpt4v_jax.interop.table import Family, Tensor, tensors_of, to_config, to_ours, to_theirs, write_config
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.model.towers import Towers

SHARD_BYTES = 4 << 30
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Keys of config.json that are not the model's: they go out as they came in.
KEPT = ("id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
        "forced_eos_token_id", "forced_bos_token_id")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Imported:
    family: Family
    config: Any  # config.Model, config.Image or config.Towers
    params: Any
    theirs: dict[str, Any]  # the folder's config.json


# ---- what a config makes


def module_of(ours):
    """-> (the Flax module of a config, the arguments that it is initialised with)."""
    if isinstance(ours, config.Model):
        # Two positions: the stream's length changes no parameter, and a short one is quick to trace.
        layout = batch_lib.layout(ours, config.Data())
        layout = dataclasses.replace(layout, context=2, source=min(layout.source, 2))
        return GPT4V(ours, layout), (batch_lib.empty(layout, 1),)
    image = ours.image if isinstance(ours, config.Towers) else ours
    pictures = (np.zeros((1, 1, image.patch**2 * 3), np.uint8), np.zeros((1, 1, 3), np.int32))
    if isinstance(ours, config.Image):
        return ImageTower(ours), pictures
    layout = dataclasses.replace(batch_lib.layout(ours.text, config.Data()), context=2)
    return Towers(ours), (*pictures, batch_lib.empty(layout, 1))


def abstract_params(ours) -> dict[str, jax.ShapeDtypeStruct]:
    """-> {path: shape and dtype} of a config's parameters; nothing is computed."""
    module, arguments = module_of(ours)
    tree = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# ---- in


def located(folder: Folder, family: Family, tensors: list[Tensor]) -> tuple[dict[str, str], list[str]]:
    """-> ({a row's name: the name in the folder}, weights that are told but not read).

    Raises InputError naming every tensor that is missing, extra, or of another shape.
    """
    there = {}
    for name in folder.files:
        new = name
        for pattern, replacement in family.renamed:
            new = re.sub(pattern, replacement, new)
        there[new] = name
    if family.base and not any(name.startswith(family.base) for name in there):
        inner = {t.name.removeprefix(family.base) for t in tensors if t.name.startswith(family.base)}
        there = {family.base + new if new in inner else new: name for new, name in there.items()}
    wanted = {t.name: t for t in tensors}
    unread = sorted(name for new, name in there.items() if family.unread and re.search(family.unread, new))
    extra = sorted(
        name for new, name in there.items()
        if new not in wanted and name not in unread and not (family.buffers and re.search(family.buffers, new))
    )  # fmt: skip
    wrong = [f"missing {name}" for name in wanted if name not in there and not _may_lack(family, name)]
    wrong += [f"extra {name} {folder.shapes[name]}" for name in extra]
    wrong += [
        f"{there[name]} has shape {folder.shapes[there[name]]}, the config says {t.shape}"
        for name, t in wanted.items() if name in there and folder.shapes[there[name]] != t.shape
    ]  # fmt: skip
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise config.InputError(f"{folder.path} does not fit its config: {'; '.join(wrong[:8])}{more}")
    return {name: there[name] for name in wanted if name in there}, unread


def _may_lack(family: Family, name: str) -> bool:
    return bool(family.zero and re.search(family.zero, name))


def arrays(folder: Folder, family: Family, tensors: list[Tensor], names: dict[str, str]):
    """-> (path, array) of every parameter, one tensor in memory at a time, a file after the other."""
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.name in names:
            by_file.setdefault(folder.files[names[tensor.name]], []).append(tensor)
        else:
            yield from to_ours(tensor, np.zeros(tensor.shape, np.float32))
    for _, held in sorted(by_file.items()):
        for tensor in held:
            x = folder.tensor(names[tensor.name])
            yield from to_ours(tensor, x)
            del x
            trim()


def load(path: Path | str, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Imported:
    """A folder, or a hub name -> its model. Parameters go straight to their place on `mesh`, a tensor at a time.

    dtype: float32 | bfloat16 | float16 | keep: as in the file.
    """
    folder = Folder(local(path))
    where = str(folder.path / "config.json")
    family = family_of(folder.config, where)
    ours = to_config(family, folder.config, where)
    if dtype != "keep":
        config.one_of("dtype", dtype, (*DTYPES, "keep"))
    ours = tied_as_in(folder, family, ours)
    tensors = tensors_of(family, ours, abstract_params(ours))
    names, _ = located(folder, family, tensors)
    params = {name: put(x, name, DTYPES.get(dtype), mesh) for name, x in arrays(folder, family, tensors, names)}
    return Imported(family, ours, flax.traverse_util.unflatten_dict(params, sep="/"), folder.config)


def put(x: np.ndarray, path: str, dtype, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """An array of the host -> its place on the mesh; each device gets its own part of it alone."""
    dtype = x.dtype if dtype is None else dtype
    if dtype == jnp.float16:
        x = cast(x, dtype, path)
    if mesh is None:
        return jnp.array(x, dtype)
    place = sharding.param_sharding(path, x.shape, mesh)
    parts = []
    for device, at in place.addressable_devices_indices_map(x.shape).items():
        # One after the other: all parts at once would be a second copy of the tensor in the host's memory.
        parts.append(jax.device_put(np.ascontiguousarray(x[at], dtype=dtype).reshape(x[at].shape), device))
        parts[-1].block_until_ready()
    return jax.make_array_from_single_device_arrays(x.shape, place, parts)


def cast(x: np.ndarray, dtype, name: str) -> np.ndarray:
    """Raises InputError where a finite value becomes infinite."""
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if dtype == jnp.float16 and (np.isfinite(x) & ~np.isfinite(y)).any():
        raise config.InputError(f"{name} has values beyond float16's 65,504: use float32 or bfloat16")
    return y


def tied_as_in(folder: Folder, family: Family, ours):
    """A tied matrix may be in a file twice. -> `ours`, untied where the head differs from the table, as the reference
    does it; any other repeat that differs is an error."""
    if not isinstance(ours, config.Model):
        return ours
    names = {row.paths[0]: row.theirs for row in family.rows}
    there = {name if name in folder.files else name.removeprefix(family.base): path for path, name in names.items()}
    table = next((name for name, path in there.items() if path == "text/embed/table" and name in folder.files), None)
    if table is None:  # `located` says so
        return ours
    for name in folder.files:
        if name == table or not re.search(r"(lm_head|embed_tokens|predictions\.decoder)\.weight$", name):
            continue
        if names.get("head/kernel") == name and not ours.tied or folder.same(name, table):
            continue
        if names.get("head/kernel") != name:
            raise config.InputError(f"{folder.path}: {name} repeats {table}, but they differ")
        ours = dataclasses.replace(ours, tied=False)
    return ours


# ---- out


def save(imported: Imported, path: Path | str, tokenizer: str = "", dtype: str = "keep",
         shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """Writes a folder that the reference's from_pretrained takes: config, safetensors, generation_config, tokenizer.

    The folder appears whole or not at all. tokenizer: the text of tokenizer.json.
    """
    path = Path(path)
    if path.exists():
        raise config.InputError(f"{path} is there already: name a folder that is not")
    theirs = write_config(imported.family, imported.config)
    preprocessor = theirs.pop("preprocessor", None)
    kept = {key: imported.theirs[key] for key in KEPT if key in imported.theirs}
    if len(kept.get("id2label") or ()) != len(theirs.get("id2label") or ()):
        kept = {key: value for key, value in kept.items() if key not in ("id2label", "label2id")}
    if "text_config" in theirs:
        text = imported.theirs.get("text_config", {})
        kept["text_config"] = theirs["text_config"] | {key: text[key] for key in KEPT if key in text}
    params = flax.traverse_util.flatten_dict(imported.params, sep="/")
    tensors = tensors_of(imported.family, imported.config, params)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}"))
    except OSError as error:
        raise config.InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        dtypes = _write_shards(temporary, tensors, params, DTYPES.get(dtype), shard_bytes)
        theirs |= kept | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
        _write_json(temporary / "config.json", theirs)
        if imported.family.generates:
            ids = {key: value for key, value in kept.items() if key.endswith("_id")}
            _write_json(temporary / "generation_config.json", imported.theirs.get("generation") or ids)
        if preprocessor is not None:
            size = dict.fromkeys(("height", "width"), theirs.get("vision_config", theirs)["image_size"])
            resample = {k: v for k, v in imported.theirs.get("preprocessor", {}).items() if k == "resample"}
            _write_json(temporary / "preprocessor_config.json", preprocessor | resample | {
                "image_processor_type": imported.family.preprocessor, "do_resize": True, "size": size,
                "do_center_crop": False, "crop_size": size,
            })  # fmt: skip
        if tokenizer:
            (temporary / "tokenizer.json").write_text(tokenizer)
            inner = tokenizers.Tokenizer.from_str(tokenizer)
            ids = {name: kept.get(f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
            tokens = {name: inner.id_to_token(id) for name, id in ids.items() if isinstance(id, int)}
            _write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens)
        temporary.chmod(0o755)
        temporary.rename(path)
    except (OSError, safetensors.SafetensorError) as error:  # such as a full disk
        raise config.InputError(f"{path} cannot be written: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_shards(folder: Path, tensors: list[Tensor], params: dict, dtype, shard_bytes: int) -> set[str]:
    """Writes model.safetensors, or shards with an index; one shard in memory at a time -> the dtypes written."""

    def size(t: Tensor) -> int:
        x = params[t.paths[0]]
        return math.prod(t.shape) * (jnp.dtype(dtype or x.dtype).itemsize)

    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(size, shards[-1])) + size(tensor) > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    dtypes, index = set(), {}
    for number, held in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {t.name: to_theirs(t, params) for t in held}
        if dtype is not None:
            values = {name: cast(x, dtype, name) for name, x in values.items()}
        dtypes |= {x.dtype.name for x in values.values()}
        index |= dict.fromkeys(values, name)
        save_file(values, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(map(size, tensors))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return dtypes
