"""Where numbers go: the terminal (a progress bar and a line an epoch), metrics.jsonl, TensorBoard.

Scalars on the device are read one step late, while the next step is computed, so that the device never waits.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import rich.console
import rich.progress
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from gpt4v_jax import sharding
from gpt4v_jax.config.run import METRICS
from gpt4v_jax.training import goodput
from gpt4v_jax.training import workdir as workdir_lib


class Log:
    """Appends to <workdir>/metrics.jsonl and TensorBoard's event file; a resumed run drops what it will do again.

    Of several processes the first writes. Raises InputError where the disk refuses.
    """

    def __init__(self, workdir: Path, start: int):
        self._waiting, self._file, self._path = None, None, Path(workdir) / "metrics.jsonl"
        if not sharding.is_first():
            return
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= start]
            workdir_lib.write(self._path, "".join(line + "\n" for line in kept))
        with workdir_lib.written(self._path):
            self._file = self._path.open("a")
            self._board = Board(workdir, start)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes now: for numbers that are on the host already."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        with workdir_lib.written(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.add(step, values)

    def later(self, step: int, values: dict) -> None:
        """Keeps values, which `flush` writes."""
        self._waiting = step, values

    def flush(self) -> dict | None:
        """Writes the values that wait, and -> them as floats, with their "step" (None where none wait)."""
        if self._waiting is None:
            return None
        (step, values), self._waiting = self._waiting, None
        done = {name: float(value) for name, value in values.items()}
        self.write(step, done)
        return {"step": step} | done

    def close(self) -> None:
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._board.close()
                self._file = None


class Board:
    """TensorBoard's event file, written in line: tensorboardX's own writer has a thread, and when a disk is full that
    thread dies and the next lines wait for it for good."""

    def __init__(self, workdir: Path, start: int):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(str(Path(workdir) / name))
        self._event(file_version="brain.Event:2")
        if start:  # what an earlier process wrote behind this step is not shown
            self._event(step=start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._event(step=step, summary=summary)

    def _event(self, **fields) -> None:
        self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a killed run left half-written
        return sys.maxsize


def read(workdir: Path) -> list[dict]:
    """-> the lines of metrics.jsonl, without one that a killed run left half-written."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) < sys.maxsize]


def evaluated(workdir: Path, step: int) -> bool:
    """Is there an evaluation of this step?"""
    return any(
        line["step"] == step and any("/" in name and not name.startswith("data/") for name in line)
        for line in read(workdir)
    )


class Report:
    """What a run says while it trains: numbers of every step go in, lines of the log and the terminal come out."""

    def __init__(self, workdir: Path, start: int, total: int, every: int, row_tokens: int, clock: goodput.Clock):
        """every: steps between two lines; row_tokens: positions of a step."""
        minutes = [line["minutes"] for line in read(workdir) if "minutes" in line] if start else []
        self._earlier, self._clock = minutes[-1] if minutes else 0.0, clock
        self._log, self._progress = Log(workdir, start), Progress(total, start)
        self._start, self._total, self._every, self._row_tokens = start, total, every, row_tokens
        self.results: dict[str, float] = {}  # of the newest evaluation
        self._evaluated, self._since, self._first = 0, [], 0.0  # its step; device scalars since the last epoch line

    def __enter__(self):
        self._progress.__enter__()
        return self

    def __exit__(self, *error):
        self._progress.__exit__(*error)
        self._log.close()

    def line(self, text: str) -> None:
        self._progress.line(text)

    def step(self, step: int, values: dict, epoch: int, read: Callable[[], dict[str, float]] = dict) -> None:
        """values: device scalars, which are read one step late; epoch: the one that the step belongs to; read() -> what
        has been read of each source, "data/..."."""
        self.flush()
        if step == self._start + 1:
            jax.block_until_ready(values)
            self._first = self._clock.busy()
            self.line(f"first step done after {self._clock.total():.1f} s, compilation included")
            self._log.write(step, values | read())
        elif step % self._every == 0 or step == self._total:
            rate = self._row_tokens * (step - self._start - 1) / max(self._clock.busy() - self._first, 1e-9)
            more = {"tokens_per_second": rate, "epoch": epoch} | read() | self._minutes()
            self._log.later(step, values | more)
            self._clock.write(step)
        self._progress.advance(step)
        self._since.append((values["loss"], values["accuracy"]))

    def flush(self) -> None:
        self._show(self._log.flush())

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        self._log.write(step, results | self._minutes())
        self.results, self._evaluated = results, step

    def epoch(self, step: int, epoch: int) -> None:
        """A line of means since the last one."""
        self.line(epoch_line(step, epoch, self._since, self.results, self._evaluated))
        self._since = []

    def _minutes(self) -> dict[str, float]:
        return {"minutes": self._earlier + self._clock.total() / 60}

    def _show(self, done: dict | None) -> None:
        if done and "tokens_per_second" in done:
            left = (self._total - done["step"]) * self._row_tokens / done["tokens_per_second"]
            self._progress.show(done["step"], done["loss"], done["tokens_per_second"], left)


def epoch_line(step: int, epoch: int, since, results: dict[str, float], evaluated: int) -> str:
    """since: (loss, accuracy) of each step; results: an evaluation, that of step `evaluated`."""
    loss, accuracy = (sum(float(x) for x in column) / len(since) for column in zip(*since, strict=True))
    held_out = "  ".join(f"{name} {value:.4f}" for name, value in results.items() if _main(name))
    at = "" if evaluated == step else f" of step {evaluated}"
    held_out = f"  | held out{at} {held_out}" if held_out else ""
    return f"epoch {epoch} step {step}  loss {loss:.4f}  token accuracy {accuracy:.4f}{held_out}"


def _main(name: str) -> bool:
    """Whether it is a metric over all kinds, of an evaluator whose name may have slashes."""
    return name.rpartition("/")[2] in METRICS


class Progress:
    """A bar with loss, tokens/s and time left; where the output is no terminal, lines instead."""

    def __init__(self, total: int, done: int):
        self.console = rich.console.Console(highlight=False, soft_wrap=True, quiet=not sharding.is_first())
        self._bar = rich.progress.Progress(
            "step", rich.progress.MofNCompleteColumn(), rich.progress.BarColumn(), "{task.fields[loss]}",
            "{task.fields[rate]}", rich.progress.TimeElapsedColumn(), "left", rich.progress.TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, completed=done, loss="", rate="")
        self._total = total

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, rate: float, left: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"loss {loss:.3f}", rate=f"{rate:,.0f} tokens/s")
        if not self.console.is_terminal:
            self.console.print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:,.0f} tokens/s  {left / 60:.1f} minutes left"
            )

    def line(self, text: str) -> None:
        self.console.print(text)
