"""Where the time of a run goes: <workdir>/goodput.json, and a line at the end of every process.

Counted is from the start of `train` to its end: not the import of libraries, nor what passed after a killed process
last wrote.
"""

import contextlib
import json
import time
from pathlib import Path

from gpt4v_jax import sharding
from gpt4v_jax.training import workdir as workdir_lib

KINDS = ("setup", "compile", "input", "step", "checkpoint", "evaluation")


class Clock:
    """Every second since `started` belongs to just one of KINDS: to the innermost `spent`, or to "setup".

    A step is dispatching a step and waiting for the results of the one before.
    """

    def __init__(self, workdir: Path, start: int, started: float):
        """start: the step that this process goes on from, 0 for a new run; started: time.time() of its beginning."""
        self._path = Path(workdir) / "goodput.json"
        self._earlier = _read(self._path) if start else []
        self._start, self._at, self._kind = start, started, "setup"
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def _turn(self, kind: str) -> str:
        now, before = time.time(), self._kind
        self.seconds[before] += now - self._at
        self._at, self._kind = now, kind
        return before

    @contextlib.contextmanager
    def spent(self, kind: str):
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def busy(self) -> float:
        """Seconds of steps and of waiting for their data."""
        self._turn(self._kind)
        return self.seconds["step"] + self.seconds["input"]

    def total(self) -> float:
        self._turn(self._kind)
        return sum(self.seconds.values())

    def write(self, step: int) -> None:
        """Notes what this process did up to `step`, beside the processes of this run before it."""
        if sharding.is_first():
            workdir_lib.write(self._path, json.dumps([*self._earlier, self._here(step)], indent=1))

    def _here(self, step: int) -> dict:
        self._turn(self._kind)
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return {"start": self._start, "step": step, "seconds": seconds}

    def summary(self, step: int) -> str:
        """What became of the time of this process, and of the run: a step that a later process did again was none."""
        here = self._here(step)
        shares = ", ".join(f"{kind} {value:.1f} s" for kind, value in here["seconds"].items())
        text = f"goodput     {_share([here])} went into steps ({shares})"
        if self._earlier:
            every = [*self._earlier, here]
            text += f"\n            in all {len(every)} processes of the run {_share(every)}"
        return text


def _share(processes: list[dict]) -> str:
    """Of processes one after the other -> "SHARE of SECONDS" that went into steps which no later one did again."""
    total, useful = 0.0, 0.0
    for i, process in enumerate(processes):
        total += sum(process["seconds"].values())
        kept = min([process["step"], *(later["start"] for later in processes[i + 1 :])]) - process["start"]
        useful += process["seconds"]["step"] * max(kept, 0) / max(process["step"] - process["start"], 1)
    return f"{useful / max(total, 1e-9):.1%} of {total:.1f} s"


def _read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []
