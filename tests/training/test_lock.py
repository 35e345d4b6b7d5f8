"""Two trainers cannot share a workdir; a trainer that was killed holds nothing."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4v_jax import config
from gpt4v_jax.training import lock

HOLDER = """
import sys
from gpt4v_jax.training import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=Path(__file__).parent.parent.parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_trainer_is_refused_until_the_first_is_killed(tmp_path, holder):
    message = rf"--workdir={tmp_path} is in use by pid {holder.pid} on {socket.gethostname()}, since 20"
    for _ in range(2):
        with pytest.raises(config.InputError, match=message), lock.hold(tmp_path):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert f"pid {holder.pid} " in (tmp_path / "lock").read_text(), "it had no time to remove it"
    with lock.hold(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert not (tmp_path / "lock").exists()


def test_the_same_process_is_refused_too(tmp_path):
    with lock.hold(tmp_path):
        with pytest.raises(config.InputError, match=f"pid {os.getpid()}"), lock.hold(tmp_path):
            pass
        with pytest.raises(config.InputError), lock.hold(tmp_path):
            pass
    with lock.hold(tmp_path):
        pass


def test_it_is_freed_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path):
        raise ZeroDivisionError
    with lock.hold(tmp_path):
        pass


def test_a_lock_that_was_removed_while_we_waited_is_none(tmp_path, monkeypatch):
    """The holder ends between our open and our lock: what we then hold is a file that nobody else finds."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path):
        assert len(calls) == 2 and (tmp_path / "lock").exists()
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(config.InputError), lock.hold(tmp_path):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with lock.hold(tmp_path, said.append):
        pass
    assert len(said) == 1 and "no locks on this file system (No locks available)" in said[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(config.InputError, match="cannot be written"), lock.hold(tmp_path / "none"):
        pass


def test_only_the_first_process_of_a_run_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with lock.hold(tmp_path):
        assert not list(tmp_path.iterdir())
