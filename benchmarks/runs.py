"""The runs that a page of docs/results is made from: trained and evaluated where they are not yet."""

import subprocess
import sys
from pathlib import Path

from gpt4v_jax import config
from gpt4v_jax.training import steps


def make_runs(runs: Path, commands: dict[str, list[str]], evaluations: dict[str, list[list[str]]] | None = None):
    """commands: {workdir: what gpt4v_jax.train is to be told}, in their order; evaluations: {workdir: what each
    gpt4v_jax.evaluate is to be told}, once and nothing where it is not in it. A run that was cut off goes on, one that
    is done and was evaluated is left alone. Raises InputError where one fails."""
    for name, arguments in commands.items():
        folder = runs / name
        done = folder / "evaluated"  # the step that was
        print(f"{name}: {' '.join(arguments)}", flush=True)
        _run("train", folder, *arguments)
        last = str(steps.finished(folder / "checkpoints")[-1])
        if not done.is_file() or done.read_text() != last:
            for told in (evaluations or {}).get(name, [[]]):
                _run("evaluate", folder, *told)
            done.write_text(last)


def _run(command: str, folder: Path, *arguments: str) -> None:
    line = [sys.executable, "-m", f"gpt4v_jax.{command}", f"--workdir={folder}", *arguments]
    status = subprocess.run(line).returncode
    if status:
        raise config.InputError(f"gpt4v_jax.{command} of {folder} ended with status {status}: see above; run it again")
