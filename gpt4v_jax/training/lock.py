"""One trainer a workdir: two would delete each other's checkpoints and write their lines into one log."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from gpt4v_jax import config
from gpt4v_jax.training.checkpoint import Say, first_decides, on_stderr


@contextlib.contextmanager
def hold(workdir: Path, say: Say = on_stderr) -> Iterator[None]:
    """Holds <workdir>/lock, which names this process. The kernel frees it when the process dies, kill -9 included.

    The folder is there already. Raises InputError naming the process that holds the lock. Of a run of many processes
    the first holds it. Where the file system knows no locks, that is said and the run goes on.
    """
    file = None

    def take():
        nonlocal file
        file = _open(workdir, say)

    if jax.process_count() > 1 or not jax.process_index():
        first_decides(take)  # where it fails, it fails in all of them
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                (Path(workdir) / "lock").unlink()  # before it is freed: who opened it meanwhile sees that it is gone
            file.close()


def _open(workdir: Path, say: Say):
    """-> the open file that is the lock; None where there are no locks. Raises InputError where another has it."""
    path = Path(workdir) / "lock"
    try:
        file = _take(path)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise config.InputError(f"--workdir={workdir} cannot be written: lock: {error.strerror}") from error
        say(f"{path}: no locks on this file system ({error.strerror}): see to it that no other run uses the folder")
        return None
    if isinstance(file, str):
        raise config.InputError(
            f"--workdir={workdir} is in use by {file or 'another process'}: wait until it is done, stop it, or use "
            "another --workdir"
        )
    return file


def _take(path: Path):
    """-> the open file, which is the lock as long as it is open, or what its holder wrote about itself."""
    while True:
        # Not emptied when it is opened: it may be another's.
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                return file.read().strip()
        except OSError:
            file.close()
            raise
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            return file
        file.close()  # its holder has just ended and removed it
