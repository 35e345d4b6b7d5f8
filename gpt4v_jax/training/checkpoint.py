"""Checkpoints of a run: orbax writes them while the run goes on, checksums tell when they are damaged.

`<workdir>/checkpoints/<step>/{params,optimizer,watch,ema}/`, `manifest.json` (step; path, shape and dtype of every
leaf), `metrics.json` (where it was evaluated), `checksums.sha256`. A step is written beside its place, and one rename
at the very end makes it count: the process may be killed at any moment. Of a run of many processes all call these
functions; the first one decides.
"""

import json
import logging as std_logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from gpt4v_jax import config, sharding
from gpt4v_jax.training import checksums, leaves, steps
from gpt4v_jax.training.step import State

Say = Callable[[str], None]
# Orbax prints a traceback in each of its threads for what it also raises, and we then say in one line.
logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "/orbax/checkpoint/" in record.pathname))
# So do its coroutines, and TensorStore's callbacks that find them gone.
std_logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
_unraisable = sys.unraisablehook
sys.unraisablehook = lambda what: str(what.exc_value) == "Event loop is closed" or _unraisable(what)


def on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exists(workdir: Path) -> bool:
    """Does the folder hold a checkpoint, damaged or not? An empty folder named like a step is none."""
    folder = Path(workdir) / "checkpoints"
    return any(not steps.is_empty(folder / str(step)) for step in steps.named(folder))


class Checkpoints:
    """The checkpoints of one workdir.

    Kept are the `keep_last` newest, the best by `metric` ("evaluator/metric"; "": none) and the multiples of
    `keep_every`. read_only: nothing is written, moved or removed, also not what is damaged.
    """

    def __init__(self, workdir: Path, metric: str = "", mode: str = "max", keep_last: int = 2, keep_every: int = 0,
                 read_only: bool = False, say: Say = on_stderr):  # fmt: skip
        """Raises InputError where the folder cannot be written. What a stopped process left is removed, and said."""
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._say = say if jax.process_index() == 0 else lambda line: None
        self._metric, self._sign = metric, -1 if mode == "min" else 1
        self._keep_last, self._keep_every, self._read_only = keep_last, keep_every, read_only
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None  # finishes the step `_saving`; `_error` is why it could not
        self._saving, self._error = 0, None
        self._whole: set[int] = set()  # steps whose every file has been looked at
        if not read_only:
            first_decides(self._open)

    # ---- which steps there are

    def steps(self) -> list[int]:
        """The finished steps, ascending. Whether they are damaged is not looked at."""
        return steps.finished(self.folder)

    def latest(self) -> int | None:
        """The newest step whose every file is what was written; None where there is no step.

        A damaged step is passed over, said, and (unless read_only) moved aside, so that it can be saved again. Raises
        InputError when none is whole: a run that silently started anew would be worse.
        """
        return first_decides(lambda: self._first_whole(steps.named(self.folder)))

    def best(self) -> int | None:
        """As `latest`, but the best step by the metric; the newest where none is named or none has been measured."""

        def choose():
            values = self._measured(self._say)
            by_value = sorted(steps.named(self.folder), key=lambda step: -values.get(step, -math.inf))
            return self._first_whole(by_value)

        return first_decides(choose)

    def _measured(self, say: Say = lambda line: None) -> dict[int, float]:
        """-> {step: its metric, the greater the better}."""
        return {step: self._sign * value for step, value in steps.measured(self.folder, self._metric, say).items()}

    def _first_whole(self, order: list[int]) -> int | None:
        damaged, whole = {}, None
        for step in order:
            wrong = self._damage(step)
            if not wrong:
                whole = step
                break
            if (self.folder / str(step)).is_dir():  # else the run removed it while we looked
                damaged[step] = wrong
        then = "no other step is left" if whole is None else f"going on from step {whole}"
        for wrong in damaged.values():
            self._say(f"{wrong}: {then}")
        damaged = [step for step in damaged if not steps.is_empty(self.folder / str(step))]
        if damaged and whole is None:
            raise config.InputError(
                f"every checkpoint in {self.folder} is damaged: put a copy in the place of one, or remove the folder "
                "to start anew"
            )
        for step in () if self._read_only else damaged:
            steps.aside(self.folder, step, "damaged")
        return whole

    def _damage(self, step: int) -> str:
        wrong = "" if step in self._whole else steps.damage(self.folder, step)
        if not wrong:
            self._whole.add(step)
        return wrong

    # ---- save

    def check_room(self, state: State) -> None:
        """Raises InputError, before the first step, when the disk has no room for one checkpoint of `state`."""
        arrays = jax.tree.leaves(leaves.items(state))
        size = int(1.02 * sum(x.size * x.dtype.itemsize for x in arrays)) + 2**20  # and what is beside the values

        def look():
            free = shutil.disk_usage(self.folder).free
            text = f"{self.folder}: its disk has {_bytes(free)} free, a checkpoint of this run takes {_bytes(size)}"
            if free < size:
                raise config.InputError(f"{text}: make room, or use another --workdir")
            more = self._keep_last + bool(self._metric) + 1 - len(self.steps())  # one is written before one is removed
            if free < more * size:
                self._say(f"{text}, and {more} of them will lie there: the disk may be full before the run is done")

        first_decides(look)

    def save(self, state: State) -> None:
        """Starts writing, and returns when `state` may be given away; waits for the save before this one.

        An item without a leaf is left out, such as the optimizer's state of an imported model. Raises InputError when
        the save BEFORE could not be written.
        """
        self.wait()
        step, items = int(state.step), leaves.items(state)
        manifest = {"step": step, "items": {item: leaves.of(tree) for item, tree in items.items()}}
        if jax.process_index() == 0:
            steps.clean(self.folder, f"{step}.")
        if self._orbax is None:
            handlers = {item: ocp.PyTreeCheckpointHandler() for item in leaves.ITEMS}
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        args = ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree) for item, tree in items.items()})
        try:
            self._orbax.save(self.folder / f"{step}.unfinished", args=args)
        except Exception as error:
            raise self._failure(step, error) from error
        # Not orbax's own callback, which it calls before it has written its last files.
        self._saving, self._thread = step, threading.Thread(target=self._finish, args=(step, manifest))
        self._thread.start()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Writes what an evaluation of a saved step has found; the best step may be another then."""
        self.wait()

        def add():
            text = json.dumps({name: float(value) for name, value in metrics.items()})
            try:
                checksums.add(self.folder / str(step), steps.METRICS, text)
            except OSError as error:
                raise self._failure(step, error) from error
            self._retain()

        first_decides(add)

    def wait(self) -> None:
        """Until the save that was started counts. Raises InputError, in all processes, when one of them failed."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        failed = error is not None
        if jax.process_count() > 1:
            failed = bool(np.any(multihost_utils.process_allgather(np.int32(failed))))
        if failed:
            self._orbax = None  # its threads may be in any state
            raise self._failure(self._saving, error) from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """As `close`, or, on the way out with an error, without the other processes: they may not come to agree."""
        if error is None:
            self.close()
        elif self._thread is not None and jax.process_count() == 1:
            self._thread.join()

    def close(self) -> None:
        """Waits as `wait` does."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _finish(self, step: int, manifest: dict) -> None:
        """In the background: makes a step count once orbax has written it."""
        path, place = self.folder / f"{step}.unfinished", self.folder / str(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index():
                return
            (path / steps.MANIFEST).write_text(json.dumps(manifest))
            checksums.write(path, last=steps.MANIFEST)
            self._whole.discard(step)
            old = steps.aside(self.folder, step, "deleted") if place.exists() else None
            path.rename(place)
            checksums.sync(self.folder)
            if old:
                shutil.rmtree(old, ignore_errors=True)
            self._retain()
        except Exception as error:
            self._error = error
            if jax.process_index() == 0:
                steps.clean(self.folder, path.name)  # a full disk has room again

    def _retain(self) -> None:
        there, measured = self.steps(), self._measured()
        keep = set(there[-self._keep_last :]) | {s for s in there if self._keep_every and s % self._keep_every == 0}
        if measured:
            keep.add(max(measured, key=lambda step: (measured[step], step)))
        try:
            for step in there:
                if step not in keep:
                    shutil.rmtree(steps.aside(self.folder, step, "deleted"))
        except OSError as error:  # the step that was saved counts all the same
            self._say(f"{self.folder}: cannot remove what is not kept: {error.strerror}: {error.filename}")

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(1))
        except OSError as error:
            why = f"{self.folder} cannot be written: {error.strerror}"
            raise config.InputError(f"{why}; give it room and rights, or use another --workdir") from error
        if left := steps.clean(self.folder):
            self._say(f"{self.folder}: removed {', '.join(left)}, left by a process that was stopped")

    def _failure(self, step: int, error: Exception | None) -> Exception:
        """-> what to raise: InputError with the system's words for what a disk does; a mistake of ours as it is."""
        why = "another process of the run could not write its part" if error is None else _system_error(error)
        if not why:
            return error
        there = self.steps()
        left = f"step {there[-1]} is there" if there else "no earlier one is there"
        return config.InputError(f"the checkpoint of step {step} could not be written to {self.folder}: {why}; {left}")

    # ---- restore

    def restore(self, state: State, step: int) -> State:
        """-> the state at `step`, in the shapes, dtypes and shardings of `state`, on any mesh.

        `state` is given up: its memory is free before the new one takes it. Raises InputError naming the first leaf
        that is absent there or here, or has another shape. What had another dtype is converted, and said.
        """
        there, here = self._checked(step), leaves.items(state)
        leaves.check_items(self.folder / str(step), there, here)
        for item, tree in here.items():
            for line in self._compare(item, step, there[item], tree):
                self._say(line)
        targets, place = {item: leaves.abstract(tree) for item, tree in here.items()}, state.step.sharding
        for x in jax.tree.leaves(state):
            x.delete()
        values = {leaves.ITEMS[item]: self.read(step, item, target) for item, target in targets.items()}
        return state.replace(step=jax.device_put(np.int32(step), place), **values)

    def restore_params(self, abstract_params, mesh: jax.sharding.Mesh, step: int):
        """-> the parameters at `step`, on `mesh`, in the dtype in which they were saved.

        Where the run keeps a moving average of them it is that. Raises as `restore` does.
        """
        item, there = self.parameters(step)
        self._compare("params", step, there, abstract_params)
        shapes = jax.tree_util.tree_map_with_path(
            lambda path, x: (x.shape, jnp.dtype(there[sharding.path_name(path)][1])), abstract_params
        )
        target = jax.tree.map(
            lambda place, shape: jax.ShapeDtypeStruct(*shape, sharding=place),
            sharding.params_sharding(abstract_params, mesh), shapes,
        )  # fmt: skip
        return self.read(step, item, target)

    def parameters(self, step: int) -> tuple[str, leaves.Leaves]:
        """-> (what `restore_params` reads: "ema" or "params", its leaves)."""
        there = self._checked(step)
        item = "ema" if "ema" in there else "params"
        return item, there[item]

    def read(self, step: int, item: str, target, partial: bool = False):
        """-> the values of `target`'s leaves, jax.ShapeDtypeStruct with sharding. partial: the item has more."""
        options = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=options, partial_restore=partial)
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(self.folder / str(step) / item, args=args)

    def _checked(self, step: int) -> dict[str, leaves.Leaves]:
        """-> the leaves of each item of a step that is there and whole; raises InputError for another."""

        def look():
            there = self.steps()
            has = f"it has {', '.join(map(str, there)) or 'none'}"
            if step not in there:
                raise config.InputError(f"{self.folder} has no step {step}; {has}")
            if wrong := self._damage(step):
                raise config.InputError(f"{wrong}; {has}")

        first_decides(look)
        items = steps.manifest(self.folder, step)["items"]
        return {i: {path: (tuple(shape), dtype) for path, (shape, dtype) in x.items()} for i, x in items.items()}

    def _compare(self, item: str, step: int, there: leaves.Leaves, tree) -> list[str]:
        return leaves.compare(self.folder / str(step), item, there, leaves.of(tree))


def first_decides(work: Callable[[], int | None]) -> int | None:
    """-> what work() gives in the first process; when it raises there, all do: processes may see a disk differently."""
    if jax.process_count() == 1:
        return work()
    result, error = -2, None
    if jax.process_index() == 0:
        try:
            result = work()
            result = -1 if result is None else result
        except Exception as raised:
            error = raised
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if error:
        raise error
    if agreed == -2:
        raise config.InputError("the first process of the run stopped: it says why")
    return None if agreed == -1 else agreed


def _system_error(error: BaseException | None) -> str:
    """-> the system's words for what is behind an error of orbax, "" when nothing is."""
    while error:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # as TensorStore has it
            return os.strerror(int(found[1]))
        error = error.__cause__ or error.__context__
    return ""


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
