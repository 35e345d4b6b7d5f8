"""A model's folder on disk: what can be trusted in it. Nothing that a folder brings is executed."""

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import safetensors

from gpt4v_jax import config

INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")


class Folder:
    """A model's folder, read: config, and where every tensor lies. Raises InputError for all that cannot be trusted."""

    def __init__(self, path: Path | str, weights: bool = True):
        self.path = Path(path)
        if not self.path.is_dir():
            raise config.InputError(
                f"{path} is no folder: give one with config.json and model.safetensors, or a name of the hub such as "
                "org/model, which is looked up where there is no folder org here"
            )
        self.config = read_json(self.path / "config.json")
        refuse_code(self.path / "config.json", self.config)
        for name in ("tokenizer", "processor", "preprocessor", "generation"):
            path = self.path / f"{name}_config.json"
            if path.is_file():
                self.config[name] = read_json(path)  # "preprocessor" and "generation" are read as sections
                refuse_code(path, self.config[name])
            else:
                self.config.pop(name, None)
        self.files = {}  # name of a tensor -> the file that holds it
        self.shapes = {}
        if not weights:
            return
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
            if (self.path / "model.safetensors").is_file():
                raise config.InputError(f"{self.path} has model.safetensors and {INDEX}: remove the one that is wrong")
            shards = [self.path / name for name in sorted(set(self._index().values()))]
            for shard in shards:
                if shard.parent != self.path:
                    raise config.InputError(f"{self.path / INDEX} names {shard}, outside of the folder: refused")
                if not shard.is_file():
                    raise config.InputError(f"{shard} is missing: {INDEX} names it; download the folder again")
            return shards
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        pickled = [file.name for file in sorted(self.path.iterdir()) if file.suffix in PICKLED]
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

    def check(self, name: str) -> None:
        """Raises InputError where a tensor is of a dtype that we do not read."""
        with opened(self.files[name]) as file:
            dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise config.InputError(f"{self.files[name]}: {name} holds {dtype}: only {', '.join(DTYPES)} are read")

    def tensor(self, name: str):
        """-> the array. The file is opened anew each time, so that pages of what was read before are not kept."""
        self.check(name)
        with opened(self.files[name]) as file:
            return file.get_tensor(name)

    def same(self, one: str, other: str) -> bool:
        """Are two tensors equal? Compared in pieces, for they may be large."""
        if self.shapes[one] != self.shapes[other]:
            return False
        self.check(one)
        self.check(other)
        if not self.shapes[one]:
            return self.tensor(one).tobytes() == self.tensor(other).tobytes()
        n = self.shapes[one][0]
        with opened(self.files[one]) as file, opened(self.files[other]) as other_file:
            left, right = file.get_slice(one), other_file.get_slice(other)
            pieces = (slice(i, min(i + 4096, n)) for i in range(0, n, 4096))
            return all(left[at].tobytes() == right[at].tobytes() for at in pieces)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise config.InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise config.InputError(f"{path} holds {type(values).__name__}, not an object")
    return values


def refuse_code(path: Path, values) -> None:
    """Raises InputError where a config, or a section of it, asks for code of its own."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (dict, list)):
            refuse_code(path, value)
    for key in ("auto_map", "trust_remote_code"):
        if isinstance(values, dict) and values.get(key):
            raise config.InputError(f"{path} has {key}: it asks to run code of its own; refused")


def opened(file: Path):
    """A safetensors file, its header checked by the library: sizes, offsets, overlaps."""
    try:
        return safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise config.InputError(f"{file} is no whole safetensors file: {error}") from error


def local(path: Path | str) -> Path:
    """A folder -> itself; a hub name such as "org/model" -> its files, downloaded by huggingface_hub."""
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) and not Path(path).parts[0].startswith(".")
    if not is_name or Path(path).exists() or Path(path).parent != Path() and Path(path).parent.exists():
        return Path(path)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            str(path), allow_patterns=["*.json", "model*.safetensors"], ignore_patterns=["*/*"]
        ))  # fmt: skip
    except Exception as error:  # one of many kinds: no network, no such model, no right to it
        text = " ".join(str(error).split()).partition(". ")[0]
        raise config.InputError(f"{path} is no folder here, and could not be had from the hub: {text}") from error


def trim() -> None:
    """Gives freed memory back: glibc keeps it for later, and the peak would grow with every tensor (the ledger)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)
