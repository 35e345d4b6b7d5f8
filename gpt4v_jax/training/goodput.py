"""Where the time of a run goes: <workdir>/goodput.json, and a line at the end of every process."""

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
        """start: the step that this process goes on from; started: time.time() of its beginning."""
        self._path = Path(workdir) / "goodput.json"
        self._earlier = [p for p in _read(self._path) if p["start"] < start] if start else []
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
        if not sharding.is_first():
            return
        self._turn(self._kind)
        here = {"start": self._start, "step": step, "seconds": {k: round(v, 3) for k, v in self.seconds.items()}}
        workdir_lib.write(self._path, json.dumps([*self._earlier, here], indent=1))

    def summary(self) -> str:
        total = self.total()
        shares = ", ".join(f"{kind} {value:.1f} s" for kind, value in self.seconds.items())
        return f"goodput     {self.seconds['step'] / max(total, 1e-9):.1%} of {total:.1f} s went into steps ({shares})"


def _read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []
