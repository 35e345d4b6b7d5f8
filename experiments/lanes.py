"""The runs of a sweep: one process each, several at a time, each on cores of its own; what is done is not done again.

A run's folder is runs/VARIANT-SEED, its config configs/VARIANT-SEED.json, what it said logs/VARIANT-SEED.txt, and
state/VARIANT-SEED.json says that it is done or why it failed. A failed one is tried again by the next sweep. Where a
variant has stages before, those are runs/VARIANT-SEED.stage1, .stage2, ..., each of which begins with the one before.
"""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gpt4v_jax import config
from gpt4v_jax.training import metrics, steps, workdir
from gpt4v_jax.training.stop import PREEMPTED

HERE = Path(__file__).parent
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # huge pages: faster on Linux, ignored elsewhere; as the Makefile
SHORT = 400  # characters of an error


@dataclasses.dataclass
class Run:
    """One variant with one seed. state: waiting, training, evaluating, done, failed or stopped."""

    variant: str
    config: config.Config
    work: int  # its FLOPs, by which the time that is left is guessed
    before: tuple[config.Config, ...] = ()  # the stages before `config`
    state: str = "waiting"
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.config.seed}"

    @property
    def stages(self) -> list[tuple[str, config.Config]]:
        """-> (name, config) of each in their order; the last has the run's name."""
        before = [(f"{self.name}.stage{k}", made) for k, made in enumerate(self.before, 1)]
        return [*before, (self.name, self.config)]


Execute = Callable[[list[str], Path], int]  # (what to run, where its output goes) -> its exit status


class Lanes:
    """Runs everything in `folder` that is not done, `jobs` at a time. told: what gpt4v_jax.evaluate is told."""

    def __init__(self, folder: Path, runs: list[Run], told: list[str], jobs: int, execute: Execute | None = None):
        self._folder, self._told, self._jobs = folder, told, jobs
        self.runs, self._execute, self._cores = runs, execute or self._process, pinned(jobs)
        self.began, self._lock, self._children = time.time(), threading.RLock(), set()
        self.stopping = threading.Event()
        for run in runs:
            if said(folder, run.name).get("state") == "done":
                run.state = "done"
        self._first = self.progress()

    def __enter__(self):
        waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in self.runs:
            if run.state != "done":
                waiting.put(run)
        self._threads = [threading.Thread(target=self._lane, args=(waiting, k)) for k in range(self._jobs)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, *error):
        if kind:
            self.stop()
        for thread in self._threads:
            thread.join()

    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Nothing more is begun, and what trains is asked to save and to leave. Also from a signal's handler, which may
        come while this goes on: hence an RLock."""
        self.stopping.set()
        with self._lock:
            for child in self._children:
                for number in (signal.SIGTERM, signal.SIGCONT):  # one that was stopped (SIGSTOP) hears it then
                    child.send_signal(number)

    def progress(self) -> float:
        """-> the share of the work that is done."""
        done = sum(run.work * _done(self._folder, run) for run in self.runs)
        return done / max(sum(run.work for run in self.runs), 1)

    def left(self) -> float | None:
        """-> seconds until all is done, at the speed of this process so far; None where nothing is known yet."""
        done = self.progress()
        if done <= self._first:
            return None
        return (1 - done) / (done - self._first) * (time.time() - self.began)

    def _lane(self, waiting: queue.SimpleQueue, k: int) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores[k])  # of this thread, and of what it starts
        while not self.stopping.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._one(run)
            except Exception as error:  # a full disk, say: the other runs go on
                run.error = f"{type(error).__name__}: {error}"
            run.state = "stopped" if self.stopping.is_set() and run.state != "done" else run.state
            if run.error and run.state != "stopped":
                run.state = "failed"
                note(self._folder, run)

    def _one(self, run: Run) -> None:
        log, folder, commands = self._folder / "logs" / f"{run.name}.txt", None, []
        log.parent.mkdir(exist_ok=True)
        for name, made in run.stages:
            made = begins_with(made, folder) if folder else made
            folder, file = self._folder / "runs" / name, self._folder / "configs" / f"{name}.json"
            workdir.write(file, config.to_json(made) + "\n")
            if not trained(folder, made):
                line = ["train", f"--config={HERE / 'from_json.py'}:{file.resolve()}", f"--workdir={folder}"]
                commands.append((line, "training"))
        for command, state in (*commands, (["evaluate", f"--workdir={folder}", *self._told], "evaluating")):
            if self.stopping.is_set():
                continue
            run.state = state
            status = self._execute([sys.executable, "-m", f"gpt4v_jax.{command[0]}", *command[1:]], log)
            if status:
                asked = status in (PREEMPTED, -signal.SIGTERM)
                run.error = "it was asked to stop" if asked else _last_words(log, status, self._folder)
                return
        if not self.stopping.is_set():
            run.state = "done"
            note(self._folder, run)

    def _process(self, line: list[str], log: Path) -> int:
        child = [sys.executable, str(HERE / "child.py"), str(os.getpid()), *line]
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        with log.open("ab") as out:
            process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through `stop`, once
                child, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=HUGE | os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        with self._lock:
            self._children.add(process)
            if self.stopping.is_set():
                process.send_signal(signal.SIGTERM)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._children.discard(process)


def pinned(jobs: int) -> list[set[int]]:
    """-> the cores of each lane, evenly; [] where one lane has all, where there are too few, or none can be pinned."""
    if jobs < 2 or not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // jobs
    return [set(cores[k * share : (k + 1) * share]) for k in range(jobs)] if share else []


def begins_with(run: config.Config, folder: Path) -> config.Config:
    """-> the run with the weights of the one in `folder`, and its tokenizer, by whose tokens they were learnt."""
    there = folder.resolve()
    return dataclasses.replace(
        run, init_from=dataclasses.replace(run.init_from, run=str(there)),
        data=dataclasses.replace(run.data, tokenizer=str(there / "tokenizer.json")),
    )  # fmt: skip


def trained(folder: Path, run: config.Config) -> bool:
    """Whether nothing of a run's training is left to do, its last evaluation included."""
    if run.steps not in steps.finished(folder / "checkpoints"):
        return False
    return not run.eval.evaluators or metrics.evaluated(folder, run.steps)


def said(folder: Path, name: str) -> dict:
    """-> {"state": "done" or "failed", "error"} of a run; {} where it has not ended."""
    path = folder / "state" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(folder: Path, run: Run) -> None:
    workdir.write(folder / "state" / f"{run.name}.json", json.dumps({"state": run.state, "error": run.error}) + "\n")


def last_line(folder: Path, name: str) -> dict:
    """-> the newest line of a run's log that has a loss."""
    return next((line for line in reversed(metrics.read(folder / "runs" / name)) if "loss" in line), {})


def minutes(folder: Path, stages: list[tuple[str, config.Config]]) -> float | None:
    """-> of all of them together; None where nothing has begun."""
    lines = [reversed(metrics.read(folder / "runs" / name)) for name, _ in stages]
    each = [next((x["minutes"] for x in of if "minutes" in x), None) for of in lines]
    return sum(x for x in each if x is not None) if any(x is not None for x in each) else None


def _done(folder: Path, run: Run) -> float:
    if run.state in ("done", "failed", "evaluating"):
        return 1.0
    steps_ = [(last_line(folder, name).get("step", 0), made.steps) for name, made in run.stages]
    return sum(done for done, _ in steps_) / sum(all_ for _, all_ in steps_)


def _last_words(log: Path, status: int, folder: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    words = lines[-1] if lines else ""
    for path in (str(folder.resolve()), str(folder)):  # a result does not depend on where the sweep's folder is
        words = words.replace(path, "WORKDIR")
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {words[:SHORT]}"
