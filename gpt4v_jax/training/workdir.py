"""A run on disk: workdir/{config.json, environment.json, tokenizer.json, metrics.jsonl, checkpoints/, eval/, ...}."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import datasets, mixture
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import checkpoint
from gpt4v_jax.training import lora as lora_lib
from gpt4v_jax.training import step as step_lib

# What may differ when a run goes on. Not what is best: checkpoints that are there were kept by it.
MAY_CHANGE = (
    r"steps|log_every|save_every|keep_last|keep_every|mesh\..*|compute\.(remat|scan|accumulate|vocab_chunks)|guard\..*"
    r"|init_from\..*|eval\.(every|batch|evaluators)|data\.(dir|cache|threads)"
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A restored model with everything that it takes to use it; what LoRA has learnt is in its matrices."""

    run: config.Config
    layout: batch_lib.Layout
    tokenizer: tokenizer_lib.Tokenizer
    mesh: jax.sharding.Mesh
    model: GPT4V
    params: Any
    step: int
    texts: tuple[str, ...] | None = None  # data sets that were read as plain text; None: their names say it

    def is_text(self, name: str) -> bool:
        """Whether this data set is plain text, and no conversations."""
        return datasets.is_text(name) if self.texts is None else name in self.texts

    @property
    def chats(self) -> bool:
        """Whether a prompt is a user's turn; else it is text that the model goes on with."""
        names = [entry.name for entry in mixture.entries(self.run.data)]
        model = self.run.model
        reads = model.source is None or model.fusion.place == "source"  # else an encoder reads the bare prompt
        chat = reads and not all(map(self.is_text, names))
        return chat and "<user>" in self.tokenizer.special


@contextlib.contextmanager
def written(path: Path):
    """What a disk has against writing `path` is the user's to mend: OSError becomes InputError."""
    try:
        yield
    except OSError as error:
        raise config.InputError(f"{path} cannot be written: {error.strerror}; what is there stays as it is") from error


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises InputError where the disk refuses."""
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def create(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise config.InputError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def describe(workdir: Path, run: config.Config, tokenizer: tokenizer_lib.Tokenizer, data: dict | None = None) -> None:
    """Writes what the run is, what is known of its `data`, and where it runs."""
    write(workdir / "config.json", config.to_json(run))
    write(workdir / "environment.json", json.dumps(environment() | {"data": data or {}}, indent=2))
    write(workdir / "tokenizer.json", tokenizer.to_json())


def check_same(workdir: Path, run: config.Config, pattern: str) -> None:
    """Raises InputError where a key that matches `pattern` differs from the run in the folder and a resumed run may
    not change it: a run whose data or model changed on the way is no run that anybody can repeat."""
    for key, (there, here) in config.differences(load_config(workdir), run).items():
        if re.match(pattern, key) and not re.fullmatch(MAY_CHANGE, key):
            raise config.InputError(
                f"--workdir={workdir} holds a run with {key}={there!r}, in this config it is {here!r}: use its config, "
                "or another --workdir"
            )


def data_of(workdir: Path) -> dict:
    """-> what `describe` was told of the data; {} where it was told nothing."""
    path = workdir / "environment.json"
    return json.loads(path.read_text()).get("data", {}) if path.is_file() else {}


def check_data(workdir: Path, data: dict) -> None:
    """Raises InputError where a resumed run reads other documents than it began with: its rows would be others."""
    there = data_of(workdir)
    if there.get("plan", data["plan"]) != data["plan"]:
        raise config.InputError(
            f"--workdir={workdir}: its data were {there['documents']:,} documents, and are {data['documents']:,} or of "
            "other lengths now: bring back what was there, or begin another --workdir"
        )


def environment() -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "command": shlex.join(["python", "-m", "gpt4v_jax." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),  # it may use
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git here
        return "unknown"


def load_config(workdir: Path) -> config.Config:
    path = workdir / "config.json"
    if not path.is_file():
        raise config.InputError(f"{workdir} holds no run: {path.name} is missing; train one there first")
    return config.from_json(path.read_text())


def restore(workdir: Path, step: int | None = None) -> Trained:
    """-> the best checkpoint (by the run's metric, else the newest) or the one at `step`; nothing is written."""
    run = load_config(workdir)
    tokenizer = tokenizer_lib.load(workdir / "tokenizer.json", run.data.end)
    layout = batch_lib.layout(run.model, run.data)
    # Devices may be fewer than in training: all of them along data.
    mesh = sharding.make_mesh(config.Mesh())
    jax.set_mesh(mesh)
    model = GPT4V(run.model, layout, run.compute)
    checkpoints = checkpoint.Checkpoints(workdir, run.eval.best, run.eval.best_mode, read_only=True)
    step = checkpoints.best() if step is None else step
    if step is None:
        raise config.InputError(f"--workdir={workdir} has no checkpoint yet; train a little longer")
    params = checkpoints.restore_params(step_lib.abstract_params(model, lora=run.lora), mesh, step)
    params = lora_lib.merged(params, run.lora)
    checkpoints.close()
    texts = data_of(workdir).get("texts")
    return Trained(run, layout, tokenizer, mesh, model, params, step, None if texts is None else tuple(texts))
