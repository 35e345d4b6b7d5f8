"""The folders of checkpoints on disk: which are finished, which are whole, and how one is taken away.

A folder whose name is a number and which holds checksums is a finished step. Any other name is no step: what is being
written (`400.unfinished`), removed (`400.deleted`), or was found damaged (`400.damaged`).
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from gpt4v_jax.training import checksums

MANIFEST = "manifest.json"  # of a step: its number, its leaves
METRICS = "metrics.json"  # of an evaluation at this step, if there was one; it comes later
_LEFT = re.compile(r"\d+\.(unfinished|deleted|orbax-checkpoint-tmp).*")  # by a process that was stopped


def named(folder: Path) -> list[int]:
    """-> every step that a folder is named after, newest first."""
    return sorted((int(path.name) for path in folder.glob("*/") if path.name.isdigit()), reverse=True)


def finished(folder: Path) -> list[int]:
    """-> the steps with checksums, newest last."""
    return [step for step in reversed(named(folder)) if (folder / str(step) / checksums.NAME).exists()]


def is_empty(path: Path) -> bool:
    return not any(path.iterdir())


def manifest(folder: Path, step: int) -> dict:
    return json.loads((folder / str(step) / MANIFEST).read_text())


def damage(folder: Path, step: int) -> str:
    """-> "" for a step whose every file is what was written, else the file and what is wrong with it."""
    path = folder / str(step)
    if path.is_dir() and is_empty(path):
        return f"{path}: is an empty folder"
    if (path / "position").is_dir() and not (path / checksums.NAME).exists():
        return f"{path}: has no checksums; an older version of gpt4v_jax wrote it, and can read it"
    if wrong := checksums.damage(path, MANIFEST):
        return f"{path}/{wrong}"
    if (other := manifest(folder, step)["step"]) != step:
        return f"{path}/{MANIFEST}: is of step {other}"
    return ""


def measured(folder: Path, metric: str, say: Callable[[str], None] = lambda line: None) -> dict[int, float]:
    """-> {finished step: its metric}, of those that have one which is what was written; of another it is said."""
    found = {}
    for step in finished(folder) if metric else ():
        path = folder / str(step)
        if not checksums.lists(path, METRICS):
            continue
        if wrong := checksums.damage(path, MANIFEST, [METRICS]):
            say(f"{path}/{wrong}: step {step} counts as not evaluated")
            continue
        value = json.loads((path / METRICS).read_text()).get(metric, math.nan)
        if math.isfinite(value):
            found[step] = value
    return found


def aside(folder: Path, step: int, name: str) -> Path:
    """Renames a step to <step>.<name>, at once: what is half removed must never look like a step -> where it is."""
    path = folder / f"{step}.{name}"
    shutil.rmtree(path, ignore_errors=True)
    return (folder / str(step)).rename(path)


def clean(folder: Path, beginning: str = "") -> list[str]:
    """Removes what is no step yet, or no more -> the names."""
    left = [path for path in folder.glob(f"{beginning}*") if _LEFT.fullmatch(path.name)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left)
