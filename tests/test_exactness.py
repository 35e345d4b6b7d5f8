"""Whole runs in processes of their own: stopped, killed, damaged, and exact to the bit all the same.

They are runs of configs/tiny.py: shuffled pictures and text, dropout, a schedule. make soak runs them; make test has
the same in small, within one process (test_train.py, training/test_checkpoint.py).
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from gpt4v_jax import sharding
from gpt4v_jax.training import metrics, steps, stop
from gpt4v_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parent.parent
VARIANTS = {  # what resumes to the bit
    "AdamW, accumulated, averaged": ["--config.compute.accumulate=2", "--config.optim.ema=0.9"],
    "AdamW": [],
    "AdamW, prefix_lm": ["--config.model.fusion.kind=prefix_lm"],
    "Adafactor, WSD": ["--config.optim.name=adafactor", "--config.optim.schedule=wsd"],
    "Lion, rsqrt": ["--config.optim.name=lion", "--config.optim.schedule=rsqrt", "--config.optim.lr=1e-4"],
    "SGD, moments in bfloat16": ["--config.optim.name=sgd", "--config.optim.state_dtype=bfloat16"],
    "Muon, linear": ["--config.optim.name=muon", "--config.optim.schedule=linear"],
    "bfloat16, loop, remat": ["--config.compute.dtype=bfloat16", "--config.compute.scan=1",
                              "--config.compute.remat=full"],
    "vocabulary in pieces, offload": ["--config.compute.vocab_chunks=3", "--config.compute.remat=offload"],
    "frozen parts, learning rates": ["--config.optim.frozen=^image/", "--config.optim.lr_factors=('^text/=0.1',)"],
    "four reading threads": ["--config.data.threads=4"],
}  # fmt: skip


class Run:
    """A run of configs/tiny.py in `folder`, by the real command in processes of its own."""

    def __init__(self, folder: Path, cache: str, *args: str):
        self.folder, self._cache, self._args = folder, cache, args

    def start(self, *args: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "gpt4v_jax.train", "--config=configs/tiny.py", f"--workdir={self.folder}",
            f"--config.data.cache={self._cache}", "--config.save_every=10", "--config.eval.every=1000",
            "--config.eval.best=", "--config.eval.evaluators=()", *self._args, *args,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, **options)  # fmt: skip

    def go(self, *args: str, status: int = 0, **options) -> str:
        """Runs the command to its end -> what it said."""
        with self.start(*args, **options) as process:
            said = process.communicate(timeout=600)[0]
        assert process.returncode == status, said
        return said

    @contextlib.contextmanager
    def together(self, count: int, devices: int, *args: str):
        """Starts the command as `count` processes with so many devices each -> them; none is left behind."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        running = []
        try:
            for number in range(count):
                env = dict(zip(sharding.MANUAL, (address, str(count), str(number)), strict=True))
                env["JAX_NUM_CPU_DEVICES"] = str(devices)
                running.append(self.start("--distributed", *args, env=env))
            yield running
        finally:
            for process in running:
                process.kill()
                process.communicate()

    def go_together(self, *args, status: int = 0) -> None:
        with self.together(*args) as running:
            said = [process.communicate(timeout=600)[0] for process in running]
        assert {process.returncode for process in running} == {status}, said

    def copy(self, folder: Path) -> "Run":
        shutil.copytree(self.folder, folder)
        return Run(folder, self._cache, *self._args)

    def logged(self, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in metrics.read(self.folder) if name in line}

    def losses(self) -> dict[int, float]:
        return self.logged("loss")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def state(self, step: int) -> dict[str, np.ndarray]:
        """-> {path: value} of all that the checkpoint holds."""
        found = {"step": np.asarray(steps.manifest(self.checkpoints, step)["step"])}
        for item in sorted(path for path in (self.checkpoints / str(step)).iterdir() if path.is_dir()):
            tree = ocp.PyTreeCheckpointer().restore(item)
            for path, x in ocp.tree.to_flat_dict(tree, sep="/").items():
                found[f"{item.name}/{path}"] = np.asarray(x)
        return found


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """Reads what a process says up to the line that matches -> all that it said."""
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(pattern, line):
            return "".join(said)
    raise AssertionError("".join(said))


def differing_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    pairs = [(np.frombuffer(a[k].tobytes(), np.uint8), np.frombuffer(b[k].tobytes(), np.uint8)) for k in a]
    return int(sum((x != y).sum() for x, y in pairs))


@pytest.fixture(scope="module")
def unbroken(digits_world, tmp_path_factory):
    """-> unbroken(*args): the run of 20 steps with these arguments, done once."""
    done = {}

    def get(*args: str) -> Run:
        if args not in done:
            done[args] = Run(tmp_path_factory.mktemp("unbroken") / "run", digits_world.cache, *args)
            done[args].go()
        return done[args]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_ten_and_ten_steps_are_twenty(name, unbroken, tmp_path, shown):
    """The second ten by a new process: parameters, optimizer, guard, moving average, data position; every loss."""
    whole = unbroken(*VARIANTS[name])
    parts = whole.copy(tmp_path / "run")
    shutil.rmtree(parts.checkpoints / "20")  # the first process died behind step 10
    assert "resumed after 10" in parts.go()
    a, b = whole.state(20), parts.state(20)
    assert differing_bytes(a, whole.state(10)) > 100, "the second ten steps move what the first have left"
    different = differing_bytes(a, b)
    assert different == 0 and whole.losses() == parts.losses() and len(whole.losses()) == 20
    total = sum(x.nbytes for x in a.values())
    shown(f"20 steps = 10 + 10 in a new process: {name}", f"{different} of {total:,} bytes differ", "0")


def test_sigterm_twice(unbroken, digits_world, tmp_path, shown):
    """The step in flight is saved, the exit status says so, and the same command goes on to the same numbers."""
    whole = unbroken()
    run = Run(tmp_path / "run", digits_world.cache)
    with run.start("--config.save_every=1000") as process:
        read_until(process, r"^step 3/")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        seconds = time.monotonic() - asked
    assert process.returncode == stop.PREEMPTED, said
    (step,) = steps.finished(run.checkpoints)
    assert 3 <= step < 20 and f"saved step {step} of 20" in said and "Traceback" not in said
    assert {path.name for path in run.checkpoints.iterdir()} == {str(step)}, "no torn checkpoint, no leftovers"
    assert f"resumed after {step}" in run.go()
    assert run.losses() == whole.losses() and differing_bytes(run.state(20), whole.state(20)) == 0
    assert not (run.folder / "lock").exists()
    assert seconds <= 10
    shown("SIGTERM twice: seconds until it has saved and left", f"{seconds:.1f}", "10")
    shown("... torn checkpoints; differing losses afterwards", "0; 0", "0; 0")


def test_sigterm_to_one_of_two_processes(unbroken, digits_world, tmp_path, shown):
    """Both save the same step and leave; one process alone goes on from there."""
    whole, run = unbroken(), Run(tmp_path / "run", digits_world.cache, "--config.save_every=1000")
    with run.together(2, 1) as running:
        read_until(running[0], r"^step 3/")
        running[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [stop.PREEMPTED] * 2, said
    (step,) = steps.finished(run.checkpoints)
    assert f"resumed after {step}" in run.go()
    loss = max(abs(whole.losses()[i] - found) for i, found in run.losses().items())
    assert len(run.losses()) == 20 and loss <= 1e-5
    shown("SIGTERM to one of two processes: exit statuses; |loss difference| when one process goes on",
          f"75, 75; {loss:.1e}", "75, 75; 1e-05")  # fmt: skip


def test_kill_at_eight_moments(digits_world, tmp_path, shown):
    """kill -9 while steps run and checkpoints are written: every later loss is that of the unbroken run."""
    args = ("--config.steps=60", "--config.save_every=1")
    whole, run = (Run(tmp_path / name, digits_world.cache, *args) for name in ("whole", "run"))
    whole.go()
    expected, rng, torn, resumed = whole.losses(), random.Random(0), 0, 0
    for _ in range(8):
        before = steps.named(run.checkpoints) if run.checkpoints.exists() else []
        with run.start() as process:
            said = read_until(process, r"first step done")
            for _ in range(2 + rng.randrange(5)):
                read_until(process, r"^step ")
            process.kill()
        there = steps.named(run.checkpoints)
        torn += sum(bool(steps.damage(run.checkpoints, step)) for step in there)
        assert there, "a step was saved before it was killed"
        resumed += bool(before) == ("resumed after" in said)
        assert run.losses().items() <= expected.items()
    said = run.go()
    assert "resumed after" in said and resumed == 8 and torn == 0 and run.losses() == expected
    assert differing_bytes(run.state(60), whole.state(60)) == 0
    shown("kill -9 at 8 moments: resumed; torn checkpoints; differing losses", f"{resumed}/8; {torn}; 0", "8/8; 0; 0")




@pytest.fixture(scope="module")
def eight(digits_world, tmp_path_factory):
    """-> the run of 20 steps by one process with eight devices."""
    run = Run(tmp_path_factory.mktemp("eight") / "run", digits_world.cache)
    run.go(env={"JAX_NUM_CPU_DEVICES": "8"})
    return run


@pytest.mark.parametrize("mesh", [("data=8",), ("data=2", "fsdp=4"), ("data=2", "fsdp=2", "tensor=2")], ids=str)
def test_two_processes_of_four_devices_are_one_device(mesh, unbroken, eight, digits_world, tmp_path, shown):
    """The whole command, 20 steps; and 10 steps of one process on 8 x 1, then 10 of two processes."""
    whole, axes = unbroken(), [f"--config.mesh.{axis}" for axis in mesh]
    run = Run(tmp_path / "run", digits_world.cache)
    run.go_together(2, 4, *axes)
    expected, found = whole.losses(), run.losses()
    loss = max(abs(expected[step] - found[step]) for step in expected)
    norms, theirs = whole.logged("grad_norm"), run.logged("grad_norm")
    norm = max(abs(norms[step] - theirs[step]) / norms[step] for step in norms)
    assert len(found) == len(expected) == 20 and loss <= 1e-5 and norm <= 1e-5
    shown(f"2 processes x 4 devices, {', '.join(mesh)}, against one: |loss difference|; gradient norm, relative",
          f"{loss:.1e}; {norm:.1e}", "1e-05; 1e-05")  # fmt: skip
    parts = eight.copy(tmp_path / "parts")
    shutil.rmtree(parts.checkpoints / "20")
    parts.go_together(2, 4, *axes)
    loss = max(abs(eight.losses()[step] - found) for step, found in parts.losses().items())
    assert len(parts.losses()) == 20 and loss <= 1e-5
    shown(f"saved on 8 x 1 by one process, restored on 2 processes x 4, {', '.join(mesh)}: |loss difference|",
          f"{loss:.1e}", "1e-05")  # fmt: skip


def small_disk(folder: Path, size: int) -> bool:
    """Mounts a disk of `size` bytes there; False where that is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_disk_that_gets_full(unbroken, digits_world, tmp_path, shown):
    """A real one: the step before is whole, and with room again the run ends as if nothing had been."""
    whole, folder = unbroken(), tmp_path / "disk"
    size = sum(path.stat().st_size for path in (whole.checkpoints / "10").rglob("*"))
    if not small_disk(folder, int(4.5 * size) + 2_000_000):
        pytest.skip("no disk can be mounted here")
    try:
        run = Run(folder / "run", digits_world.cache, "--config.save_every=2")
        ballast = folder / "ballast"
        with run.start() as process:
            read_until(process, "first step done")
            while not steps.finished(run.checkpoints):
                read_until(process, "^step ")
            with ballast.open("wb", buffering=0) as file:  # somebody fills the disk
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            said = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and "No space left on device" in said and "Traceback" not in said, said
        line = next(line for line in said.splitlines() if line.startswith("error: "))
        there = steps.finished(run.checkpoints)
        assert there and not any(steps.damage(run.checkpoints, step) for step in there)
        ballast.unlink()
        assert f"resumed after {there[-1]}" in run.go()
        assert run.losses() == whole.losses() and differing_bytes(run.state(20), whole.state(20)) == 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    shown("disk full while saving: exit status; the error", f"2; {line.replace(str(tmp_path), '...')}", "2; clear")
    shown("... the step before restores; differing losses afterwards", f"step {there[-1]}; 0", "yes; 0")


def test_sixteen_flipped_bits(unbroken, tmp_path, shown):
    """In random places of the newest checkpoint of a real run: seen, the file named, the step before taken."""
    run = unbroken().copy(tmp_path / "run")
    newest, rng, seen = run.checkpoints / "20", random.Random(1), 0
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(16):
        path = rng.choices(files, [path.stat().st_size for path in files])[0]
        content = path.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        said = []
        reader = Checkpoints(run.folder, read_only=True, say=said.append)
        seen += reader.latest() == 10 and str(path.relative_to(newest)) in said[0]
        path.write_bytes(content)
    assert Checkpoints(run.folder, read_only=True).latest() == 20
    assert seen == 16
    shown("single bits flipped in a checkpoint's files: seen, and the step before taken", f"{seen}/16", "16/16")
