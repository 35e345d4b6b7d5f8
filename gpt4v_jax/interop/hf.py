"""Hugging Face folders <-> our configs and parameters: one engine, both directions, and a table a family.

    imported = load("path/of/llama")                 # Imported(family, config, params): config.Model, Image or Towers
    save(imported, "path/of/copy")                   # from_pretrained takes it: 0 missing, 0 unexpected keys

A family is data (Family): keys of its config.json with their defaults, rows of tensor names, and what it can hold.
Nothing that a folder brings is executed: tensors come from safetensors alone, and configs that name code are refused.
"""

import ctypes
import dataclasses
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import einops
import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.model.towers import Towers

SHARD_BYTES = 4 << 30
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
INDEX = "model.safetensors.index.json"


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
    unread: str = ""  # names of weights that our model has no place for: not read, but told
    renamed: tuple[tuple[str, str], ...] = ()  # older names -> those of the rows (patterns)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else `save` writes into config.json
    preprocessor: str = ""  # image models: the class in preprocessor_config.json
    generates: bool = False


@dataclasses.dataclass(frozen=True)
class Imported:
    family: Family
    config: Any  # config.Model, config.Image or config.Towers
    params: Any
    theirs: dict[str, Any]  # the folder's config.json


# ---- folders


class Folder:
    """A model's folder, read: config, and where every tensor lies. Raises InputError for all that cannot be trusted."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise config.InputError(f"{path} is no folder: give one with config.json and model.safetensors")
        self.config = read_json(self.path / "config.json")
        for name in ("config.json", "tokenizer_config.json"):
            values = read_json(self.path / name) if (self.path / name).is_file() else {}
            for key in ("auto_map", "trust_remote_code"):
                if values.get(key):
                    raise config.InputError(f"{self.path / name} has {key}: it asks to run code of its own; refused")
        if (self.path / "preprocessor_config.json").is_file():
            self.config = self.config | {"preprocessor": read_json(self.path / "preprocessor_config.json")}
        self.files = {}  # name of a tensor -> the file that holds it
        self.shapes = {}
        for file in self._shards():
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    if name in self.files:
                        raise config.InputError(f"{file} and {self.files[name]} both hold the tensor {name}")
                    self.files[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
        self._check_index()

    def _shards(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            shards = [self.path / name for name in sorted(set(self._index().values()))]
            for shard in shards:
                if shard.parent != self.path:
                    raise config.InputError(f"{self.path / INDEX} names {shard}, which is outside of the folder; refused")
                if not shard.is_file():
                    raise config.InputError(f"{shard} is missing: {INDEX} names it; download the folder again")
            return shards
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        pickled = [f.name for f in sorted(self.path.iterdir()) if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")]
        if pickled:
            raise config.InputError(
                f"{self.path} has its weights in {pickled[0]}: reading such a file can run code, so it is refused; "
                "convert it to model.safetensors where you trust it"
            )
        raise config.InputError(f"{self.path} holds neither model.safetensors nor {INDEX}")

    def _index(self) -> dict[str, str]:
        weights = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
            raise config.InputError(f"{self.path / INDEX} has no weight_map of names to files")
        return weights

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        for name, file in self._index().items():
            if self.files.get(name) != self.path / file:
                raise config.InputError(f"{self.path / INDEX} says that {file} holds {name}: it does not")
        others = {f for f in self.path.glob("model-*.safetensors")} - set(self.files.values())
        if others or self.files.keys() != self._index().keys():
            odd = min(others).name if others else min(self.files.keys() - self._index().keys())
            raise config.InputError(f"{odd} is in {self.path}, but {INDEX} does not name it: which of them is right?")


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise config.InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise config.InputError(f"{path} holds {type(values).__name__}, not an object")
    return values


def opened(file: Path):
    """A safetensors file, its header checked by the library: sizes, offsets, overlaps."""
    try:
        return safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise config.InputError(f"{file} is no whole safetensors file: {error}") from error


# ---- configs


def family_of(theirs: dict[str, Any], where: str = "config.json") -> Family:
    """-> the family of a config.json, by its model_type."""
    from gpt4v_jax.interop.families import FAMILIES

    known = tuple(FAMILIES)
    name = theirs.get("model_type")
    if name not in FAMILIES:
        near = config.nearest(str(name), known)
        raise config.InputError(f"{where}: model_type={name!r} is none of {', '.join(known)}{near}")
    return FAMILIES[name]


def read_config(theirs: dict[str, Any], where: str = "config.json"):
    """A config.json's values -> our config: config.Model, config.Image or config.Towers."""
    family = family_of(theirs, where)
    flat = dict(family.fixed)
    try:
        for key in family.keys:
            value = _get(theirs, key.theirs, key.default)
            if not key.ours and value != key.default:
                raise config.InputError(f"{key.theirs}={value!r} is not supported, only {key.default!r} is")
            if isinstance(value, str) and any(isinstance(t, str) for t, _ in key.values):
                config.one_of(key.theirs, value, tuple(t for t, _ in key.values))
            value = dict(key.values).get(value, value) if isinstance(value, (str, int, float, type(None))) else value
            flat |= dict.fromkeys(key.ours, value)
        flat |= family.read(theirs)
        return config.parse(_nested(flat), family.kind)
    except config.InputError as error:
        raise config.InputError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # values of types that no such config has
        raise config.InputError(f"{where}: it is no config of a {family.model_type}: {error!r}") from error


def write_config(family: Family, ours) -> dict[str, Any]:
    """Our config -> the family's config.json. Raises InputError where the family cannot say what the config says."""
    if not isinstance(ours, family.kind):
        raise config.InputError(f"a {family.model_type} is a config.{family.kind.__name__}, not a {type(ours).__name__}")
    flat = _flat(dataclasses.asdict(ours))
    theirs: dict[str, Any] = {}
    for key in family.keys:
        value = flat.get(key.ours[0], key.default) if key.ours else key.default
        value = {o: t for t, o in key.values}.get(value, value) if isinstance(value, (str, int, float)) else value
        _set(theirs, key.theirs, list(value) if isinstance(value, tuple) else value)
    theirs |= {"model_type": family.model_type, "architectures": [family.architectures[0]]}
    theirs = _merge(_merge(theirs, family.extra), family.write(ours))
    again = read_config(theirs, f"a {family.model_type}")
    for name, (here, there) in config.differences(ours, again).items():
        if name.rpartition(".")[2] not in ("dropout", "init_std"):  # those matter to training alone
            raise config.InputError(f"a {family.model_type} cannot have {name}={here!r}, only {there!r}: try another family")
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


# ---- parameters


def module_of(ours):
    """-> (the Flax module of a config, the arguments that it is initialised with)."""
    if isinstance(ours, config.Model):
        # Two positions: the stream's length changes no parameter, and a short one is quick to trace.
        layout = batch_lib.layout(ours, config.Data())
        layout = dataclasses.replace(layout, context=2, source=min(layout.source, 2))
        return GPT4V(ours, layout), (batch_lib.empty(layout, 1),)
    image = ours.image if isinstance(ours, config.Towers) else ours
    patches = np.zeros((1, image.grid**2, image.patch**2 * 3), np.uint8)
    pictures = (patches, np.zeros((*patches.shape[:2], 3), np.int32))
    if isinstance(ours, config.Image):
        return ImageTower(ours), pictures
    return Towers(ours), (*pictures, batch_lib.empty(dataclasses.replace(batch_lib.layout(ours.text, config.Data()), context=2), 1))


def abstract_params(ours) -> dict[str, jax.ShapeDtypeStruct]:
    """-> {path: shape and dtype} of a config's parameters; nothing is computed."""
    module, arguments = module_of(ours)
    tree = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


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
    wrong = [f"missing {name}" for name in wanted if name not in there]
    wrong += [f"extra {name} {folder.shapes[name]}" for name in extra]
    wrong += [
        f"{there[name]} has shape {folder.shapes[there[name]]}, the config says {t.shape}"
        for name, t in wanted.items() if name in there and folder.shapes[there[name]] != t.shape
    ]  # fmt: skip
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise config.InputError(f"{folder.path} does not fit its config: {'; '.join(wrong[:8])}{more}")
    return {name: there[name] for name in wanted}, unread


def arrays(folder: Folder, family: Family, tensors: list[Tensor], names: dict[str, str]):
    """-> (path, array) of every parameter, one tensor in memory at a time, a file after the other."""
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in tensors:
        by_file.setdefault(folder.files[names[tensor.name]], []).append(tensor)
    for file, held in sorted(by_file.items()):
        for tensor in held:
            with opened(file) as source:  # anew, so that pages of tensors that were read are not kept
                x = source.get_tensor(names[tensor.name])
            if x.dtype.kind not in "fV" and x.dtype.name not in DTYPES:
                raise config.InputError(f"{file}: {tensor.name} holds {x.dtype}: only floating-point weights are read")
            yield from to_ours(tensor, x)
            del x
            _trim()


def _trim() -> None:
    """glibc keeps freed memory for later: without this the peak grows with every tensor, by twice a shard at 1 B."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)


def load(path: Path | str, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Imported:
    """A folder, or a hub name -> its model. Parameters go straight to their place on `mesh`, a tensor at a time.

    dtype: float32 | bfloat16 | float16 | keep: as in the file.
    """
    folder = Folder(local(path))
    family = family_of(folder.config, str(folder.path / "config.json"))
    ours = read_config(folder.config, str(folder.path / "config.json"))
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
    if mesh is None:
        return jnp.array(x, dtype)
    place = sharding.param_sharding(path, x.shape, mesh)
    parts = []
    for device, at in place.addressable_devices_indices_map(x.shape).items():
        # One after the other: all parts at once would be a second copy of the tensor in the host's memory.
        parts.append(jax.device_put(np.ascontiguousarray(x[at], dtype=dtype).reshape(x[at].shape), device))
        parts[-1].block_until_ready()
    return jax.make_array_from_single_device_arrays(x.shape, place, parts)


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
        if names.get("head/kernel") == name and not ours.tied or _same(folder, name, table):
            continue
        if names.get("head/kernel") != name:
            raise config.InputError(f"{folder.path}: {name} repeats {table}, but they differ")
        ours = dataclasses.replace(ours, tied=False)
    return ours


def _same(folder: Folder, one: str, other: str) -> bool:
    """Are two tensors equal? Compared in pieces, for they may be large."""
    if folder.shapes[one] != folder.shapes[other]:
        return False
    with opened(folder.files[one]) as file, opened(folder.files[other]) as other_file:
        left, right = file.get_slice(one), other_file.get_slice(other)
        pieces = range(0, folder.shapes[one][0], 4096)
        return all(np.array_equal(left[i : i + 4096], right[i : i + 4096]) for i in pieces)


def local(path: Path | str) -> Path:
    """A folder -> itself; a hub name such as "org/model" -> its files, downloaded by huggingface_hub."""
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        return Path(path)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # one of many kinds: no network, no such model, no right to it
        text = " ".join(str(error).split())[:200]
        raise config.InputError(f"{path} is no folder here, and could not be had from the hub: {text}") from error


def save(imported: Imported, path: Path | str, tokenizer: str = "", generation: dict | None = None,
         dtype: str = "keep", shard_bytes: int = SHARD_BYTES) -> None:  # fmt: skip
    """Writes a folder that the reference's from_pretrained takes: config, safetensors, generation_config, tokenizer.

    The folder appears whole or not at all. tokenizer: the text of tokenizer.json. generation: generation_config.json.
    """
    path = Path(path)
    if path.exists():
        raise config.InputError(f"{path} is there already: name a folder that is not")
    theirs = write_config(imported.family, imported.config)
    preprocessor = theirs.pop("preprocessor", None)
    kept = {key: imported.theirs[key] for key in KEPT if key in imported.theirs}
    if "text_config" in theirs:
        text = imported.theirs.get("text_config", {})
        kept["text_config"] = theirs["text_config"] | {key: text[key] for key in KEPT if key in text}
    params = flax.traverse_util.flatten_dict(imported.params, sep="/")
    tensors = tensors_of(imported.family, imported.config, params)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}"))
    try:
        dtypes = _write_shards(temporary, tensors, params, DTYPES.get(dtype), shard_bytes)
        theirs |= kept | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
        _write_json(temporary / "config.json", theirs)
        if imported.family.generates:
            _write_json(temporary / "generation_config.json", generation or {k: kept[k] for k in KEPT if k in kept})
        if preprocessor is not None:
            size = theirs.get("vision_config", theirs)["image_size"]
            _write_json(temporary / "preprocessor_config.json", preprocessor | {
                "image_processor_type": imported.family.preprocessor, "do_resize": True, "do_rescale": True,
                "do_normalize": True, "rescale_factor": 1 / 255, "size": {"height": size, "width": size},
            })  # fmt: skip
        if tokenizer:
            (temporary / "tokenizer.json").write_text(tokenizer)
            _write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        temporary.chmod(0o755)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id",
        "forced_bos_token_id")  # fmt: skip


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
            values = {k: x.astype(dtype) for k, x in values.items()}
        dtypes |= {x.dtype.name for x in values.values()}
        index |= dict.fromkeys(values, name)
        save_file(values, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(map(size, tensors))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return dtypes
